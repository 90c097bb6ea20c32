"""Every structure method on networks that it was not written for: fewer parameters and the same interface, or a reason.

    python benchmarks/zoo.py                     # go on where the last call stopped (out/zoo.json); a good half hour
    python benchmarks/zoo.py --only swin,unet    # some networks; prints, and writes no table

The ready-made workloads (`quadriga fetch` brings the weights of two), plain networks of `benchmarks/networks/`, and
architectures of `transformers` from small random configurations. A cell is the share of parameters that is left where the
method works: outputs of the same shapes and finite, exported and run, a step of training finite. – is a refusal, ✗ a failure.
Methods have the first choice of their search, or the nearest that does something.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from networks import WORKLOADS

from quadriga import methods
from quadriga.core.files import atomic_write, write_json
from quadriga.core.method import Family

ROOT = Path(__file__).parents[1]
STATE, RESULTS, TABLE = Path("out/zoo.json"), ROOT / "benchmarks/results/zoo.json", ROOT / "docs/zoo.md"
Row = dict[str, Any]


def structure() -> list[str]:
    """Names of the structure methods."""
    return [name for name, method in methods.available().items() if method.family is Family.STRUCTURE]


def row(name: str) -> Row:
    """All methods on one network, in this process: method → status, where, reason, share of parameters left."""
    import torch

    from quadriga.core.recipe import Recipe, Step
    from quadriga.testing import make_setups, starting
    from quadriga.testing.combine import Combiner
    from quadriga.testing.setups import fake_time

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    build = WORKLOADS[name]
    combine, setups = Combiner(build(), {"time": fake_time}), make_setups({name: lambda trained=True: build()})
    setups = {k: make for k, make in setups.items() if k.endswith("trained")}
    before = combine(Recipe(()))
    found: Row = {"": [before.status, before.at, before.reason, before.parameters]}
    for method in structure():
        one = starting(methods.available()[method], setups)
        fields = {k: v for k in type(one).fields() if (v := getattr(one, k)) is not None}
        outcome = combine(Recipe((Step(method, fields),)))
        left = round(outcome.parameters / before.parameters, 3) if before.parameters else 0
        found[method] = [outcome.status, outcome.at, outcome.reason, left]
    return found


def run(names: list[str], jobs: int) -> dict[str, Row]:
    """Fill in what is missing."""
    known: dict[str, Row] = json.loads(STATE.read_text()) if STATE.exists() else {}
    missing = [n for n in names if set(known.get(n, {})) != {"", *structure()}]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(row, name): name for name in missing}
        for count, done in enumerate(as_completed(waiting), 1):
            name = waiting[done]
            try:
                known[name] = done.result()
            except Exception as error:  # a network that does not run at all is a row of failures
                known[name] = {m: ["fails", "row", f"{type(error).__name__}: {error}"[:300], 0] for m in ("", *structure())}
            write_json(STATE, known)
            told = dict(Counter(v[0] for v in known[name].values()))
            print(f"{name}: {told}; {len(missing) - count} to go", file=sys.stderr, flush=True)
    return {name: known[name] for name in names}


def table(known: dict[str, Row]) -> str:
    """Markdown."""
    return "\n".join(_lines(known)) + "\n"


def _lines(known: dict[str, Row]) -> Iterator[str]:
    names = structure()
    counts = Counter(v[0] for one in known.values() for k, v in one.items() if k)
    yield "# Structure methods on networks that they were not written for\n"
    yield "Made by `python benchmarks/zoo.py`. " + " ".join((__doc__ or "").split("\n\n")[2].split("\n")) + "\n"
    told = f"{counts['works']} work, {counts['refused']} are refused, {counts['fails']} fail"
    yield f"**{len(known)} networks, {sum(counts.values())} pairs: {told}.** Reasons are in `benchmarks/results/zoo.json`.\n"
    yield "| network | " + " | ".join(n.replace("_", " ") for n in names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for name, one in known.items():
        yield f"| {name} | " + " | ".join(_cell(one[n]) for n in names) + " |"


def _cell(found: list[Any]) -> str:
    return {"works": f"{found[3]:.2f}", "refused": "–", "fails": "✗"}[found[0]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="networks, comma-separated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: the number of cores")
    parser.add_argument("--fresh", action="store_true", help="forget what is known")
    given = parser.parse_args()
    if given.fresh:
        STATE.unlink(missing_ok=True)
    known = run(given.only.split(",") if given.only else list(WORKLOADS), given.jobs)
    failed = {f"{n} {m}": v[2] for n, one in known.items() for m, v in one.items() if v[0] == "fails"}
    if given.only:
        print(table(known))
    else:
        write_json(RESULTS, known)
        atomic_write(TABLE, table(known))
    print(json.dumps({"networks": len(known), "fail": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
