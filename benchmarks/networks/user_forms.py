"""Forms of models that people bring, each as a small workload: the registry, and what the forms share.

A form is a function that returns plain data: "model", "train", "val", "test", and further arguments of `quadriga.Workload`.
Decorated, it is what a user's file holds, a function that returns the workload; `FORMS[name].plain()` gives the data without
a line of Quadriga, from which `benchmarks/user_models.py` makes its reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"train": 256, "val": 64, "test": 64}
EPOCHS, CLASSES = 3, 3
Plain = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form of model.

    Args:
        about: what it is, for the page.
        file: where its function is.
        plain: gives "model" and the splits, without Quadriga.
        out: the way out that a refusal of this form names, as another form; "" where none is refused.
    """

    about: str
    file: Path
    plain: Callable[[], Plain]
    out: str = ""


FORMS: dict[str, Form] = {}


def form(about: str, out: str = "") -> Callable[[Callable[[], Plain]], Callable[[], Any]]:
    """Register a function under its name, and make of it one that returns a workload."""

    def register(function: Callable[[], Plain]) -> Callable[[], Any]:
        FORMS[function.__name__] = Form(about, Path(inspect.getfile(function)), function, out)

        @wraps(function)
        def workload() -> Any:
            from quadriga import Workload
            from quadriga.core.recipe import Recipe, step

            given = {"batch_size": 16, "name": function.__name__, **function()}
            given.pop("score", None)
            if not given.get("trained"):
                rate = given.pop("lr", 0.05)
                given["baseline"] = Recipe((step("optimizer", kind="sgd", lr=rate), step("train", epochs=EPOCHS)), "baseline")
            return Workload(**given)

        workload.__annotations__ = {}
        return workload

    return register


def splits(draw: Callable[[int, torch.Generator], tuple[Any, Any]], sizes: dict[str, int] | None = None) -> Plain:
    """Three splits from one function, always the same."""
    generator = torch.Generator().manual_seed(1)
    return {name: draw(count, generator) for name, count in (sizes or SIZES).items()}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A module whose weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def vectors(width: int = 12, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> Plain:
    """x [n, width]; the class is the largest of the first numbers."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, width, generator=generator)
        return x.to(dtype), x[:, :classes].argmax(1)

    return splits(draw)


def images(size: int = 8, dtype: torch.dtype = torch.float32) -> Plain:
    """x [n, 1, size, size] with a bright third, which is the class."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = torch.randn(count, 1, size, size, generator=generator), torch.randint(CLASSES, (count,), generator=generator)
        for image, c in zip(x, y.tolist(), strict=True):
            image[0, :, c * size // 3 : (c + 1) * size // 3] += 2
        return x.to(dtype), y

    return splits(draw)


def tokens(length: int = 8, vocabulary: int = 40) -> Plain:
    """x [n, length] int64; the class is the first token modulo three."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randint(1, vocabulary, (count, length), generator=generator)
        return x, x[:, 0] % CLASSES

    return splits(draw)


def padded(length: int = 8, vocabulary: int = 40) -> Plain:
    """{"tokens" [n, length], 0 where a sequence has ended, "lengths" [n]}; the class is the last token modulo three."""

    def draw(count: int, generator: torch.Generator) -> tuple[Any, Tensor]:
        x = torch.randint(1, vocabulary, (count, length), generator=generator)
        lengths = torch.randint(4, length + 1, (count,), generator=generator)
        y = x[torch.arange(count), lengths - 1] % CLASSES
        return {"tokens": x * (torch.arange(length) < lengths[:, None]), "lengths": lengths}, y

    return splits(draw)


def mlp(width: int = 12, hidden: int = 24, classes: int = CLASSES) -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def cnn() -> nn.Sequential:
    """Two convolutions, pooled."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(108, CLASSES),
    )  # fmt: skip


def fitted(model: nn.Module, x: Tensor, y: Tensor, steps: int = 120) -> nn.Module:
    """A model trained by plain PyTorch, for forms that come trained."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model.train()
        for _ in range(steps):
            rows = torch.randint(len(x), (32,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()
