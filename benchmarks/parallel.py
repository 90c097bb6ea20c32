"""Plans for several processes against one process, on the CPU through Gloo: gradients, weights, memory and traffic.

Every plan trains in 2 or 4 ranks, all of one number in one launch of torchrun; then checkpoints that 2 ranks wrote are
continued by 4, by 2 · 2 and by 1. Writes benchmarks/results/parallel.json and docs/parallel.md, and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quadriga.core.files import atomic_write, read_json, write_json
from quadriga.parallel.launch import command, environment
from quadriga.testing.resume import losses, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "parallel.json", ROOT / "docs" / "parallel.md"
SAVED = ("fsdp", "ddp", "tp", "pp")  # by two ranks, behind four steps
GOES_ON = ("fsdp", "dp × tp", "pp × fsdp")  # in four


def torchrun(module: str, nproc: int, *words: str) -> int:
    """Launch a module in so many ranks; its exit status."""
    env = environment(nproc, {**os.environ, "OMP_NUM_THREADS": "1"})
    return subprocess.run(command(words, nproc, 0, module), env=env, check=False).returncode


def plans() -> dict[str, Any]:
    """A row for each plan."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for nproc in (2, 4):
            out = Path(folder) / f"{nproc}.json"
            torchrun("quadriga.testing.ranks", nproc, str(out))
            rows |= read_json(out)
    return rows


def checkpoints() -> list[dict[str, Any]]:
    """A row for each continuation: the largest difference of ten losses from those of an unbroken run in one process."""
    folder = Path(tempfile.mkdtemp(prefix="quadriga-parallel-"))
    try:
        train(folder / "unbroken", "one")
        expected = losses(folder / "unbroken")
        torchrun("quadriga.testing.resume", 2, *(f"{folder / by}={by}:4" for by in SAVED))
        for by in SAVED:
            for plan in (*GOES_ON, "one"):
                shutil.copytree(folder / by, folder / f"{by}, {plan}")
        torchrun("quadriga.testing.resume", 4, *(f"{folder / f'{by}, {plan}'}={plan}" for by in SAVED for plan in GOES_ON))
        rows = []
        for by in SAVED:
            train(folder / f"{by}, one", "one")
            for plan in (*GOES_ON, "one"):
                found = losses(folder / f"{by}, {plan}")
                rows.append({"saved": by, "by": plan, "apart": max(abs(a - b) for a, b in zip(expected, found, strict=True))})
        return rows
    finally:
        shutil.rmtree(folder, ignore_errors=True)


ABOUT = """# Training in several processes

`make bench-parallel` writes this page: PyTorch on the CPU through Gloo, on one machine. A GPT of 4 blocks, width 64, on
Shakespeare (batch 8 · 128 bytes) and LeNet on Fashion-MNIST (batch 16). *Gradients* are those of the first step, *weights*
those after ten steps of SGD at 0.1: the largest difference of any entry from one process, at most 1e-5. Rows in which
gradients are not exchanged, or doubled, have to be found unequal. *Memory* is the most bytes of weights, gradients and
activations that a rank holds in a forward and backward pass, *sent* what it sends there by a ring; of the rank where they are
largest.
"""
PLANS = ("plan", "ranks", "gradients", "weights", "equal", "memory, MB", "of one process", "sent, MB")


def page(rows: dict[str, Any], went_on: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    trained = [_row(name, row) for name, row in rows.items() if "gradients" in row]
    called = [(name, row["ranks"], f"{row['outputs']:.1e}") for name, row in rows.items() if "outputs" in row]
    continued = [(r["saved"], "1 process" if r["by"] == "one" else f"4: {r['by']}", f"{r['apart']:.1e}") for r in went_on]
    inference = "The finished network called by all ranks, with 1, 5, a batch and more than two batches of examples."
    saved = """Written by two ranks behind four of ten steps (AdamW, clipped, with an average of the weights), and
continued: the largest difference of the ten losses from those of an unbroken run in one process."""
    parts = [
        ABOUT,
        _table(PLANS, trained),
        "## Inference\n",
        inference + "\n",
        _table(("plan", "ranks", "outputs apart"), called),
    ]
    parts += ["## Checkpoints\n", saved + "\n", _table(("written by 2", "continued by", "losses apart"), continued)]
    return "\n".join(parts)


def _row(name: str, row: dict[str, Any]) -> tuple[object, ...]:
    equal = "yes" if row["equal"] else "**no**"
    spent: tuple[str, ...] = ("–", "–", "–")
    if "memory" in row:
        held = row["memory"] / 1e6, row["memory"] / row["alone"]["memory"]
        spent = f"{held[0]:.2f}", f"{held[1]:.2f}", f"{row['sent'] / 1e6:.3f}"
    return (name, row["ranks"], f"{row['gradients']:.1e}", f"{row['weights']:.1e}", equal, *spent)


def _table(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def main() -> int:
    """Run everything; 0 if every plan is as it should be and every continuation within 1e-5."""
    rows, went_on = plans(), checkpoints()
    write_json(RESULTS, {"benchmark": "parallel", "plans": rows, "checkpoints": went_on})
    atomic_write(PAGE, page(rows, went_on))
    good = all(r["good"] for r in rows.values()) and all(r["apart"] <= 1e-5 for r in went_on)
    print(json.dumps({"benchmark": "parallel", "plans": len(rows), "checkpoints": len(went_on), "good": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
