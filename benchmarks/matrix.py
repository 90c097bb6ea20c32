"""Every ordered pair of registered methods on a small CNN, LSTM and GPT: it works, or it is refused with a reason.

    python benchmarks/matrix.py            # go on where the last call stopped (out/matrix.json); a quarter of an hour
    python benchmarks/matrix.py --table    # only write docs/matrix.md from what is there

"Works" means: outputs of the same shapes and finite, realised in the runtime that the pair names (eager, if none) with finite
outputs, and a step of training with a finite loss. A pair that is refused is refused before any training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from quadriga import methods
from quadriga.core.files import atomic_write, write_json

ROOT = Path(__file__).parents[1]
STATE = Path("out/matrix.json")  # rows so far, so that a stopped call goes on
RESULTS, TABLE = ROOT / "benchmarks/results/matrix.json", ROOT / "docs/matrix.md"
NETWORKS = {"cnn": "cnn", "lstm": "lstm", "gpt": "transformer"}  # our word → the tiny workload's
SIGNS = {"works": "●", "refused": "–", "fails": "✗"}
Row = dict[str, list[str]]  # second method → [status, at, reason]


def row(network: str, first: str) -> Row:
    """All pairs that begin with one method, in this process."""
    from quadriga.core.recipe import Recipe

    combine = _combiner(network)
    found = {}
    for second in methods.available():
        outcome = combine(Recipe((_step(network, first), _step(network, second))))
        found[second] = [outcome.status, outcome.at, outcome.reason]
    return found


@cache
def _combiner(network: str) -> Callable:
    import torch

    from quadriga.testing.combine import Combiner
    from quadriga.testing.setups import fake_time
    from quadriga.testing.workloads import TINY

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return Combiner(TINY[NETWORKS[network]](trained=True), {"time": fake_time})


@cache
def _step(network: str, name: str):
    """A step where its search starts, or one choice away, where only that does something on this network."""
    from quadriga.core.recipe import Step
    from quadriga.testing import make_setups, starting
    from quadriga.testing.workloads import TINY

    tiny = NETWORKS[network]
    setups = {k: make for k, make in make_setups({tiny: TINY[tiny]}).items() if k.endswith("trained")}
    one = starting(methods.available()[name], setups)
    given = {f: getattr(one, f) for f in type(one).fields()}
    return Step(name, {k: v for k, v in given.items() if v is not None})


def run(jobs: int) -> int:
    """Fill in what is missing; returns how many pairs fail."""
    known = json.loads(STATE.read_text()) if STATE.exists() else {}
    names = list(methods.available())
    missing = [(n, m) for n in NETWORKS for m in names if set(known.get(n, {}).get(m, {})) != set(names)]

    def keep(key: tuple[str, str], found: Row) -> None:
        known.setdefault(key[0], {})[key[1]] = found
        missing.remove(key)
        write_json(STATE, known)
        print(f"{' '.join(key)}: {dict(Counter(v[0] for v in found.values()))}; {len(missing)} rows to go", flush=True)

    while missing:
        broken = rows(missing, jobs, keep)
        for key in missing[: jobs if broken else 0]:  # those that ran when a process died: each in a process of its own
            if rows([key], 1, keep):
                keep(key, {name: ["fails", "process", "the process died"] for name in names})
    write_json(RESULTS, {network: {name: rows[name] for name in names} for network, rows in known.items()})
    table(known)
    return sum(v[0] == "fails" for made in known.values() for one in made.values() for v in one.values())


def rows(keys: list[tuple[str, str]], jobs: int, keep: Callable[[tuple[str, str], Row], None]) -> bool:
    """Run these rows in processes and keep each when it is done; True if a process died."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(row, *key): key for key in list(keys)}
        try:
            for done in as_completed(waiting):
                keep(waiting[done], done.result())
        except BrokenProcessPool:
            return True
    return False


def table(known: dict[str, dict[str, Row]]) -> None:
    """Write docs/matrix.md."""
    atomic_write(TABLE, "\n".join(_lines(known)) + "\n")


def _lines(known: dict[str, dict[str, Row]]) -> Iterator[str]:
    names = list(methods.available())
    yield "# Every ordered pair of methods\n"
    yield "Made by `make matrix`. Rows act first, columns second, each with the first choice of its search (or the nearest that"
    yield "does something). ● works: outputs finite and of the same shapes, exported and run, a step of training finite."
    yield "– refused, before any training, with a reason; the reasons are in `benchmarks/results/matrix.json`. ✗ fails.\n"
    for network, made in known.items():
        counts = Counter(v[0] for one in made.values() for v in one.values())
        total = sum(counts.values())
        yield f"## {network}: {total} pairs, {counts['works']} work, {counts['refused']} are refused, {counts['fails']} fail\n"
        yield "| first \\ second | " + " | ".join(str(k) for k in range(1, len(names) + 1)) + " |"
        yield "|---" * (len(names) + 1) + "|"
        for k, first in enumerate(names, 1):
            one = made.get(first, {})
            yield f"| {k} {first} | " + " | ".join(SIGNS.get(one.get(n, [""])[0], "") for n in names) + " |"
        yield ""
        yield from _reasons(made)


def _reasons(rows: dict[str, Row]) -> Iterator[str]:
    """Who refuses most, and an example of why."""
    refused: dict[str, list[str]] = {}
    for one in rows.values():
        for status, at, reason in one.values():
            if status == "refused":
                refused.setdefault(at, []).append(reason)
    yield "| refused by | pairs | for example |"
    yield "|---|---|---|"
    for at, reasons in sorted(refused.items(), key=lambda item: -len(item[1])):
        text = Counter(reasons).most_common(1)[0][0].replace("|", "\\|").replace("\n", " ")
        yield f"| {at} | {len(reasons)} | {text[:200]} |"
    yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: the number of cores")
    parser.add_argument("--fresh", action="store_true", help="forget what is known")
    parser.add_argument("--table", action="store_true", help="write docs/matrix.md and stop")
    given = parser.parse_args()
    if given.fresh:
        STATE.unlink(missing_ok=True)
    if given.table:
        table(json.loads(RESULTS.read_text()))
        return 0
    failed = run(given.jobs)
    print(json.dumps({"pairs": 3 * len(methods.available()) ** 2, "fail": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
