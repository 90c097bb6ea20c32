"""From a module class to a workload: drawn data, three classes, drawn weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.workload import Workload

CLASSES, EXAMPLES, BATCH = 3, 24, 12
Split = tuple[Any, Tensor]
Draw = Callable[[int, torch.Generator], Split]


def numbers(*shape: int, classes: int = CLASSES) -> Draw:
    """Inputs [n, *shape], normally distributed."""

    def draw(count: int, generator: torch.Generator) -> Split:
        return torch.randn(count, *shape, generator=generator), torch.randint(classes, (count,), generator=generator)

    return draw


def tokens(length: int, vocabulary: int = 40) -> Draw:
    """Inputs [n, length], integers."""

    def draw(count: int, generator: torch.Generator) -> Split:
        words = torch.randint(vocabulary, (count, length), generator=generator)
        return words, torch.randint(CLASSES, (count,), generator=generator)

    return draw


def workload(name: str, build: Callable[[], nn.Module], draw: Draw, trained: bool = True) -> Workload:
    """A workload of that module; the same weights and data each time."""
    generator = torch.Generator().manual_seed(1)
    data = {split: draw(EXAMPLES, generator) for split in ("train", "val", "test")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    metric = "accuracy" if data["val"][1].dim() == 1 else "bits_per_byte"
    return Workload(model=model, **data, metric=metric, batch_size=BATCH, trained=trained, name=name)
