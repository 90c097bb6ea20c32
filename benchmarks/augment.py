"""Are Quadriga's augmentations at least as fast as kornia's? Seconds per batch on one thread, in turn, as a table.

    python benchmarks/augment.py            # one to two minutes

Both act on the same batch with the same strengths, each drawing its own parameters. A ratio above 1 says that Quadriga's takes
less time. kornia is no dependency: none of its transforms was measured as faster, and none can be seeded without PyTorch's
global generator, on which a bit-exact resume must not rest. It stays the reference in the tests. randaugment gains least, and
its interval ends close to 1: kornia draws two operations for the whole batch, Quadriga, as the paper, two for each image.
With a copy of each share of the batch instead of slices of it, it had taken longer than kornia's on the smaller batch (0.96).
Prints a table and writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import kornia
import kornia.augmentation as K
import torch
from kornia.augmentation.auto import RandAugment
from kornia.augmentation.auto.rand_augment.rand_augment import default_policy
from torch import Tensor

from quadriga.core.batch import Batch
from quadriga.core.files import atomic_write, write_json
from quadriga.core.slots import Moment
from quadriga.measure.machine import facts
from quadriga.measure.stats import ratio
from quadriga.methods.training.color import Color
from quadriga.methods.training.crop import Crop
from quadriga.methods.training.cutmix import Cutmix
from quadriga.methods.training.erase import Erase
from quadriga.methods.training.flip import Flip
from quadriga.methods.training.mixup import Mixup
from quadriga.methods.training.randaugment import Randaugment, operations
from quadriga.methods.training.rotate import Rotate

TABLE = Path(__file__).resolve().parents[1] / "docs/augment.md"
SHAPES = ((64, 1, 32, 32), (64, 3, 64, 64))
CLASSES, LEVEL = 10, 0.99
ALL = frozenset({"color", "rotation", "translation"})
Run = Callable[[], Any]


def pairs(shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[Batch, Moment], Batch], Callable[..., Any]]]:
    """(name, Quadriga's transform, kornia's module), of the same strength."""
    size, colours, keys = shape[2:], 0.2 if shape[1] == 3 else 0.0, ["input", "class"]
    yield "flip", Flip().transform, K.RandomHorizontalFlip(p=0.5)
    slices = {"padding": 4, "padding_mode": "replicate", "cropping_mode": "slice"}
    yield "crop", Crop(padding=4).transform, K.RandomCrop((size[0], size[1]), p=1.0, **slices)
    yield "rotate", Rotate(degrees=15.0).transform, K.RandomRotation(15.0, p=1.0)
    yield "erase", Erase(fill="zero").transform, K.RandomErasing(p=0.5)
    yield "color", Color(hue=colours / 4).transform, K.ColorJitter(0.2, 0.2, colours, colours / 4, p=1.0)
    yield "mixup", partial(Mixup(alpha=1.0).transform, classes=CLASSES), K.RandomMixUpV2(data_keys=keys)
    cut = K.RandomCutMixV2(data_keys=keys, use_correct_lambda=True)
    yield "cutmix", partial(Cutmix(probability=1.0).transform, classes=CLASSES), cut
    names = operations(ALL, shape[1])
    out = {"invert", "solarize_add"} | (set() if shape[1] == 3 else {"color"})  # not the paper's, or of three channels
    policy = [p for p in default_policy if p[0][0] not in out]
    yield "randaugment", partial(Randaugment().transform, names=names), RandAugment(n=2, m=9, policy=policy)


def arms(shape: tuple[int, ...]) -> dict[str, tuple[Run, Run]]:
    """Name → (kornia's call, Quadriga's call), on one batch in [0, 1]."""
    images, labels = torch.rand(shape), torch.randint(CLASSES, shape[:1])
    batch = Batch(images, labels, torch.arange(shape[0]))
    generator, epoch = torch.Generator(), torch.zeros(shape[0], dtype=torch.int64)
    seeds = iter(range(10**9))

    def ours(transform: Callable[[Batch, Moment], Batch]) -> Tensor:  # seeded anew for each batch, as the loader does
        return transform(batch, Moment(generator.manual_seed(next(seeds)), 0.5, epoch)).inputs

    made: dict[str, tuple[Run, Run]] = {}
    for name, transform, module in pairs(shape):
        given = (images, labels) if name in ("mixup", "cutmix") else (images,)
        made[name] = (partial(module, *given), partial(ours, transform))
    return made


def seconds(run: Run, calls: int) -> float:
    """Processor time of one call, the mean over several."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def compare(opponent: Run, winner: Run, restarts: int, blocks: int, budget: float) -> dict[str, Any]:
    """Both in turn, block by block; `budget` seconds for both together."""
    for run in (opponent, winner):
        seconds(run, 3)
    calls = max(1, int(budget / (restarts * blocks) / (seconds(opponent, 5) + seconds(winner, 5))))
    times: dict[Run, list[list[float]]] = {opponent: [], winner: []}
    for restart in range(restarts):
        rows: dict[Run, list[float]] = {opponent: [], winner: []}
        for block in range(blocks):
            for run in (opponent, winner) if (restart + block) % 2 else (winner, opponent):
                rows[run].append(seconds(run, calls))
        for run in (opponent, winner):
            times[run].append(rows[run])
    return {**ratio(times[opponent], times[winner], level=LEVEL).plain(), "calls": calls, "blocks": blocks}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a method and shape."""
    rows = []
    with torch.no_grad():
        for shape in SHAPES:
            for name, (theirs, ours) in arms(shape).items():
                found = compare(theirs, ours, options.restarts, options.blocks, options.seconds)
                rows.append({"method": name, "shape": list(shape), **found})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [f"| method | batch | kornia's time / Quadriga's ({LEVEL:.0%}) | Quadriga is |", "|---|---|---|---|"]
    for r in rows:
        shape = "×".join(map(str, r["shape"]))
        lines.append(f"| {r['method']} | {shape} | {r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f}) | {r['verdict']} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=8, help="groups of blocks, over which the interval is taken")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="for each comparison")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/augment.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(options)
    print(table(rows), flush=True)
    made = (
        f"Made by `python benchmarks/augment.py --seconds {options.seconds:g}`, against kornia "
        f"{kornia.__version__} on one thread; what is compared stands there. The intervals are over "
        f"{options.restarts} groups of blocks in one process, not over processes, so that they may be too "
        "narrow: read them as the order of size. Of randaugment, kornia draws two operations for a batch, "
        "ours two for each image."
    )
    atomic_write(TABLE, f"# Augmentation beside kornia\n\n{made}\n\n{table(rows)}")
    given = {"restarts": options.restarts, "blocks": options.blocks, "seconds": options.seconds}
    facts_of = {"kornia": kornia.__version__, "machine": facts()}
    write_json(options.out, {"benchmark": "augment", "level": LEVEL, "options": given, **facts_of, "rows": rows})
    print(json.dumps({"benchmark": "augment", "out": str(options.out)}))


if __name__ == "__main__":
    main()
