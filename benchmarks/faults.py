"""Kill a rank of two in the middle of a training, twenty times, and let torchrun start all again.

Each round trains the small GPT for ten steps with a checkpoint behind each, under FSDP2 and DDP in turn; the last rank ends by
SIGKILL in the sixth step. It is good if the kill fired, torchrun ended well, and all ten losses are those of an unbroken
run in one process within 1e-5. Prints a line for each round and one line of JSON, and writes benchmarks/results/faults.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quadriga.core.files import write_json
from quadriga.parallel.launch import command, environment
from quadriga.testing.resume import killed, losses, train

ROUNDS, STOP, LIMIT = 20, 5, 1e-5
KEPT = Path(__file__).parent / "results" / "faults.json"


def one(number: int, expected: list[float], folder: Path) -> dict[str, Any]:
    """A round: train, be killed, be started again."""
    place, plan = folder / f"round-{number}", ("fsdp", "ddp")[number % 2]
    words = [f"{place}={plan}:{STOP}!"]
    start = time.monotonic()
    try:
        env = environment(2, {**os.environ, "OMP_NUM_THREADS": "1"})
        done = subprocess.run(
            command(words, 2, 3, "quadriga.testing.resume"), env=env, capture_output=True, text=True, timeout=600, check=False
        )
        status, tail = done.returncode, done.stderr[-300:]
    except subprocess.TimeoutExpired:
        status, tail = -1, "it hung"
    fired = killed(place).exists()
    apart = float("inf")
    if status == 0:
        apart = max(abs(a - b) for a, b in zip(expected, losses(place), strict=True))
    good = fired and status == 0 and apart <= LIMIT
    row = {"plan": plan, "fired": fired, "status": status, "apart": apart if status == 0 else None, "good": good}
    return {**row, "seconds": round(time.monotonic() - start, 1), **({} if good else {"said": tail})}


def main() -> int:
    """All rounds; 0 if every one is good."""
    folder = Path(tempfile.mkdtemp(prefix="quadriga-faults-"))
    rows: list[dict[str, Any]] = []
    try:
        train(folder / "unbroken", "one")
        expected = losses(folder / "unbroken")
        for number in range(ROUNDS):
            rows.append(one(number, expected, folder))
            print(f"{number + 1} of {ROUNDS}: {rows[-1]}", file=sys.stderr, flush=True)
            write_json(KEPT, {"benchmark": "faults", "good": sum(r["good"] for r in rows), "of": len(rows), "rounds": rows})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"benchmark": "faults", "good": sum(r["good"] for r in rows), "of": len(rows)}))
    return 0 if len(rows) == ROUNDS and all(r["good"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
