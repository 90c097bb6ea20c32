"""All of timm: the smallest network of each of its modules through exports, folding, pruning, low rank and int8.

    python benchmarks/timm_networks.py                       # go on where the last call stopped (out/timm.json)
    python benchmarks/timm_networks.py --only swin,levit     # some modules
    python benchmarks/timm_networks.py --again crashed,late  # once more what ended so
    python benchmarks/timm_networks.py --table               # the table of what is known

Networks are below 60 M parameters, have ten classes, random weights and random statistics, and see random images of the
smallest size that they take. **onnxruntime, openvino**: the unchanged network, equal to PyTorch at batch 1, 2 and 3 within
1e-4 of the largest output; the number is the largest error. **fold_batchnorm**: equal outputs; the number is the share of
normalizations that stay. **prune_*, low_rank**: the changed network runs with as many outputs, and ONNX Runtime gives the same;
the number is the share of parameters that is left. **static_int8**: in ONNX Runtime, outputs finite; the number is their error
against what differs from image to image. Random weights stand rounding badly: an error above 0.5 is held against layers that
round in float, in PyTorch, and is wrong if it is more than three times theirs (ONNX Runtime rounds the terms of sums too).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from timm_cells import TESTS, Cells, Choice, choose, load_timm

from quadriga.core.files import atomic_write, write_json
from quadriga.core.quiet import quiet

ROOT = Path(__file__).parents[1]
STATE, RESULTS, TABLE = Path("out/timm.json"), ROOT / "benchmarks/results/timm.json", ROOT / "docs/timm.md"
LOG = Path("out/timm.log")  # what runtimes and exporters print
NOTHING = ("no ", "the model has no ")  # how refusals begin where there is nothing to act on
Row = dict[str, Any]
SIGNS = {"refused": "–", "wrong": "✗ wrong", "crashed": "✗ crashed", "late": "⏱"}


def apart(work: Callable[[], Any], seconds: float, gigabytes: float) -> Row:
    """What `work` returns, in a child process with limits: its result, or {"status": "late" or "crashed", "reason"}."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _act(work, write)
    os.close(write)
    try:
        ended = _watched(child, seconds, gigabytes)
        with os.fdopen(read, "rb") as pipe:
            told = pipe.read()
    finally:
        _end(child)
    if ended:
        return ended
    return json.loads(told) if told else {"status": "crashed", "reason": "the process ended without a word"}


def _act(work: Callable[[], Any], write: int) -> None:
    """In the child: never returns."""
    with LOG.open("ab") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    try:
        result = work()
    except BaseException as error:
        traceback.print_exc()
        result = {"status": "crashed", "reason": f"{type(error).__name__}: {error}"[:300]}
    with os.fdopen(write, "wb") as pipe:
        pipe.write(json.dumps(result).encode())
    sys.stdout.flush()
    os._exit(0)


def _watched(child: int, seconds: float, gigabytes: float) -> Row | None:
    """Wait for it; a reason where a limit was passed or a signal ended it. The pipe holds what little a child has to say."""
    process, end = psutil.Process(child), time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            return {"status": "crashed", "reason": f"ended by {signal.Signals(number).name}"} if number else None
        if time.monotonic() > end:
            return {"status": "late", "reason": f"more than {seconds:.0f} s"}
        if process.memory_info().rss > gigabytes * 2**30:
            return {"status": "late", "reason": f"more than {gigabytes:.0f} GiB of memory"}
        time.sleep(0.05)


def _end(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):  # it has ended
        pass


def chosen(module: str) -> Row:
    """In a child: the module's network as plain data."""
    try:
        return {"status": "works", **vars(choose(module))}
    except Exception as error:
        return {"status": "refused", "reason": str(error)[:300]}


def cell(choice: Row, name: str) -> Row:
    """In a child: one test of one network."""
    started = time.monotonic()
    picked = Choice(*(choice[k] for k in ("name", "size", "given", "parameters")))
    return {**Cells(picked).run(name), "seconds": round(time.monotonic() - started, 1)}


def run(modules: list[str], again: set[str], tests: list[str], seconds: float, gigabytes: float) -> dict[str, Row]:
    """Fill in what is missing."""
    known: dict[str, Row] = json.loads(STATE.read_text()) if STATE.exists() else {}
    for module in modules:
        row = known.setdefault(module, {})
        if row.get("network", {}).get("status") not in ("works", "refused"):
            row["network"] = apart(lambda module=module: chosen(module), 3 * seconds, gigabytes)
            write_json(STATE, known)
        if row["network"]["status"] != "works":
            print(f"{module}: {row['network']['reason']}", file=sys.stderr, flush=True)
            continue
        for name in tests:
            if name not in row or row[name]["status"] in again:
                row[name] = apart(lambda row=row, name=name: cell(row["network"], name), seconds, gigabytes)
                write_json(STATE, known)
        told = ", ".join(f"{n} {row[n]['status']}" for n in tests if row[n]["status"] not in ("works", "refused"))
        print(f"{module} ({row['network']['name']}): {told or 'nothing wrong'}", file=sys.stderr, flush=True)
    return {m: known[m] for m in modules}


def table(known: dict[str, Row]) -> str:
    """Markdown."""
    return "\n".join(_lines(known)) + "\n"


def _lines(known: dict[str, Row]) -> Iterator[str]:
    import timm

    counts = {name: Counter(row[name]["status"] for row in known.values() if name in row) for name in TESTS}
    total = sum(counts.values(), Counter())
    about = " ".join((__doc__ or "").split("\n\n")[2].split("\n"))
    yield "# All of timm\n"
    yield f"Made by `make bench-timm`: timm {timm.__version__}, torch {torch.__version__}, one thread. {about}\n"
    modules = len({m for m, row in known.items() if any(name in row for name in TESTS)})
    told = ", ".join(f"{total[s]} {s}" for s in ("works", "refused", "wrong", "crashed", "late"))
    yield f"**{modules} of {len(timm.list_modules())} modules, {sum(total.values())} tests: {told}.**\n"
    yield "| | " + " | ".join(TESTS) + " |"
    yield "|---" * (len(TESTS) + 1) + "|"
    for status in ("works", "refused", "wrong", "crashed", "late"):
        yield f"| {status} | " + " | ".join(str(counts[name][status]) for name in TESTS) + " |"
    large = [m for m, row in known.items() if row["network"]["status"] == "refused"]
    if large:
        yield f"\nNo network below the limit, or none that runs: {', '.join(large)}."
    yield "\n| module | network | image | parameters | " + " | ".join(TESTS) + " |"
    yield "|---" * (len(TESTS) + 4) + "|"
    for module, row in known.items():
        one = row["network"]
        if one["status"] == "works" and any(name in row for name in TESTS):
            head = f"| {module} | {one['name']} | {one['size']} | {one['parameters'] / 1e6:.2f} M"
            yield f"{head} | " + " | ".join(_shown(row.get(name)) for name in TESTS) + " |"
    yield "\n## Reasons\n"
    yield "By test; where there is nothing to act on, the refusals are counted.\n"
    yield from _reasons(known)


def _shown(found: Row | None) -> str:
    if found is None:
        return ""
    return SIGNS.get(found["status"]) or f"{found.get('number', '')}"


def _reasons(known: dict[str, Row]) -> Iterator[str]:
    for name in TESTS:
        rows = {m: row[name] for m, row in known.items() if name in row and row[name]["status"] != "works"}
        if not rows:
            continue
        plain = Counter(r["reason"].split(" (")[0] for r in rows.values() if r["reason"].startswith(NOTHING))
        yield f"**{name}**" + "".join(f"; {n} × {reason}" for reason, n in plain.most_common()) + "\n"
        for module, row in rows.items():
            if not row["reason"].startswith(NOTHING):
                yield f"- {module} ({row['status']}): {row['reason'][:240]}"
        yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="modules, comma-separated")
    parser.add_argument("--tests", default=",".join(TESTS), help="comma-separated")
    parser.add_argument("--again", default="", help="statuses to try once more, comma-separated")
    parser.add_argument("--seconds", type=float, default=240, help="of each test")
    parser.add_argument("--gigabytes", type=float, default=6, help="of memory of each test")
    parser.add_argument("--table", action="store_true", help="write the table of what is known")
    given = parser.parse_args()
    LOG.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    timm = load_timm()
    known: dict[str, Row] = json.loads(STATE.read_text()) if STATE.exists() else {}
    if not given.table:
        for name in ("onnxruntime", "onnxscript", "openvino", "torch.onnx"):  # each child has them then
            importlib.import_module(name)
        with quiet():  # what an export imports on its way
            torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), dynamo=True, verbose=False)
        modules = given.only.split(",") if given.only else timm.list_modules()
        run(modules, set(given.again.split(",")), given.tests.split(","), given.seconds, given.gigabytes)
        known = json.loads(STATE.read_text())
    if given.table or not given.only:
        write_json(RESULTS, known)
        atomic_write(TABLE, table(known))
    bad = {f"{m} {t}": r["reason"] for m, row in known.items() for t, r in row.items() if r["status"] in ("wrong", "crashed")}
    print(json.dumps({"modules": len(known), "bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
