"""How small can LeNet be on disk at −0.5 points? Pruned, clustered and entropy-coded, against float32 and int8 + zstd.

    python benchmarks/storage.py            # minutes on two cores; goes on where the last call stopped

All arms start from one trained baseline. Bytes are those of the files that load.py reads; zstd at level 22 packs the same files
of the int8 arm into one. Quality is that of the exported files on the test split, in pairs with the baseline's. "Original,
trained as long" had the same further training without losing a weight. Prints a table and writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recovery import LEVEL, Bench, difference

from quadriga.core.files import atomic_write, write_json
from quadriga.core.recipe import Recipe, Step, step
from quadriga.measure.machine import facts
from quadriga.workloads import load

TABLE = Path(__file__).resolve().parents[1] / "docs/storage.md"
SETTINGS = ((0.8, 4), (0.85, 4), (0.9, 4), (0.9, 3), (0.95, 3))  # share of weights that go, bits of a place in the codebook
END = (step("threads", count=1), step("onnxruntime"))


def further(epochs: float) -> tuple[Step, ...]:
    """A stretch of training after a change, the same for every arm."""
    return step("optimizer", kind="adamw", lr=0.002), step("schedule", kind="linear"), step("train", epochs=epochs)


def recipes(start: Sequence[Step], epochs: float) -> dict[str, Recipe]:
    """Arm → recipe, the baseline first."""
    arms = {
        "baseline": (*start, *END),
        "original, trained as long": (*start, *further(epochs), *further(epochs / 2), *END),
        "int8": (*start, *further(epochs), *further(epochs / 2), step("quantize_int8", activations="weights"), *END),
    }
    for ratio, bits in SETTINGS:
        pruned = (*start, step("prune_weights", ratio=ratio), *further(epochs))
        clustered = (step("cluster_weights", bits=bits), *further(epochs / 2))
        arms[f"pruned {ratio:g}, {bits} bits"] = (*pruned, *clustered, *END, step("entropy_storage"))
    return {name: Recipe(tuple(steps)) for name, steps in arms.items()}


def zstd(folder: Path, files: Sequence[str]) -> int:
    """Bytes of the files in one frame of zstd at its highest level."""
    import zstandard

    content = b"".join((folder / name).read_bytes() for name in files)
    return len(zstandard.ZstdCompressor(level=22).compress(content))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row an arm."""
    workload = load("lenet_fashion")
    bench = Bench(workload, options.work, options.seed)
    planned = recipes(workload.baseline.steps, options.epochs)
    for arm, recipe in planned.items():
        bench.arm(arm, recipe)
    plain, rows = bench.done["baseline"]["bytes"], []
    for arm, recipe in planned.items():
        found, gap = bench.done[arm], difference([bench], arm, "baseline") if arm != "baseline" else None
        row = {
            "arm": arm,
            "recipe": recipe.plain(),
            "bytes": found["bytes"],
            "quality": found["quality"],
            "minus_baseline": gap,
        }
        rows.append({**row, "times_smaller": plain / found["bytes"]})
        if arm == "int8":
            size = zstd(options.work / "work/built" / found["key"], ("runtime.json", "model.onnx"))
            rows.append({**row, "arm": "int8 + zstd", "bytes": size, "times_smaller": plain / size})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    packed = next(r["bytes"] for r in rows if r["arm"] == "int8 + zstd")
    head = ("network", "bytes", "times smaller", "of int8 + zstd", "test %", f"minus baseline ({LEVEL:.0%})")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    for r in rows:
        gap = "{value:+.2f} ({low:+.2f} to {high:+.2f})".format(**r["minus_baseline"]) if r["minus_baseline"] else ""
        cells = (
            r["arm"],
            f"{r['bytes']:,.0f}",
            f"{r['times_smaller']:.1f}",
            f"{r['bytes'] / packed:.2f}",
            f"{r['quality']:.2f}",
            gap,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=16, help="after pruning; half as many after clustering")
    parser.add_argument("--threads", type=int, default=1, help="of training")
    parser.add_argument("--work", type=Path, default=Path("out/storage"), help="what every arm leaves, so that it is done once")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/storage.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = measure(options)
    print(table(rows), flush=True)
    source = load("lenet_fashion").data_note["source"]
    made = f"Made by `QUADRIGA_DATA={source} python benchmarks/storage.py`; what the arms are stands there."
    atomic_write(TABLE, f"# LeNet on disk\n\n{made}\n\n{table(rows)}")
    given = {"seed": options.seed, "epochs": options.epochs}
    write_json(options.out, {"benchmark": "storage", "level": LEVEL, "options": given, "machine": facts(), "rows": rows})
    print(json.dumps({"benchmark": "storage", "out": str(options.out)}))


if __name__ == "__main__":
    main()
