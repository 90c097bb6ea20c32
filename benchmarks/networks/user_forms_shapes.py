"""Forms of inputs, outputs, targets and metrics; and forwards that decide, draw or remember."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from user_forms import CLASSES, Plain, fitted, form, mlp, seeded, splits, vectors


class Returns(nn.Module):
    """A network whose outputs are put together in some way."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.body, self.head, self.shape = nn.Linear(12, 24), nn.Linear(24, CLASSES), shape

    def forward(self, x: Tensor) -> Any:
        features = torch.relu(self.body(x))
        return self.shape(self.head(features), features)


@form("a dict with `logits`")
def dict_output() -> Plain:
    return {"model": seeded(lambda: Returns(lambda y, f: {"features": f, "logits": y})), **vectors()}


@form("a tuple, the logits first")
def tuple_output() -> Plain:
    return {"model": seeded(lambda: Returns(lambda y, f: (y, f))), **vectors()}


@form("a Python list, the logits first")
def list_output() -> Plain:
    return {"model": seeded(lambda: Returns(lambda y, f: [y, f])), **vectors()}


@dataclass
class Output:
    logits: Tensor
    features: Tensor


@form("a dataclass with `logits`", out="dict_output")
def dataclass_output() -> Plain:
    return {"model": seeded(lambda: Returns(lambda y, f: Output(y, f))), **vectors()}


@form("a scalar beside the logits (an auxiliary loss)")
def scalar_beside() -> Plain:
    def loss(output: Any, target: Tensor) -> Tensor:
        return functional.cross_entropy(output[0], target) + 0.01 * output[1]

    return {"model": seeded(lambda: Returns(lambda y, f: (y, f.square().mean()))), **vectors(), "loss": loss}


@form("predicted classes beside the logits, integers and booleans")
def integer_outputs() -> Plain:
    model = seeded(lambda: Returns(lambda y, f: {"logits": y, "class": y.argmax(1), "sure": y.amax(1) > 0}))
    return {"model": model, **vectors()}


def _both() -> Plain:
    def draw(count: int, generator: torch.Generator) -> tuple[Any, Tensor]:
        x = torch.randn(count, 12, generator=generator)
        return (x[:, :8], x[:, 8:]), x[:, :CLASSES].argmax(1)

    return splits(draw)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, image: Tensor, more: Tensor) -> Tensor:
        return self.body(torch.cat([image, more], 1))


@form("two inputs in a tuple")
def tuple_inputs() -> Plain:
    return {"model": seeded(Two), **_both()}


class Keywords(Two):
    def forward(self, *, image: Tensor, more: Tensor) -> Tensor:
        return super().forward(image, more)


@form("a forward that takes keywords only")
def keywords_only() -> Plain:
    data = {name: ({"image": a, "more": b}, y) for name, ((a, b), y) in _both().items()}
    return {"model": seeded(Keywords), **data}


class Nested(Two):
    def forward(self, image: Tensor, extra: Any) -> Tensor:
        return super().forward(image, extra["more"])


@form("a dict within a dict as inputs")
def nested_inputs() -> Plain:
    data = {name: ({"image": a, "extra": {"more": b}}, y) for name, ((a, b), y) in _both().items()}
    return {"model": seeded(Nested), **data}


class Branch(nn.Module):
    def __init__(self, where: bool = False) -> None:
        super().__init__()
        self.body, self.where = mlp(), where

    def forward(self, x: Tensor) -> Tensor:
        if self.where:
            return self.body(torch.where(x.sum() > 0, x * 2, x))
        if x.sum() > 0:
            x = x * 2
        return self.body(x)


@form("`if x.sum() > 0` in the forward", out="branch_where")
def branch() -> Plain:
    return {"model": seeded(Branch), **vectors()}


@form("the same by `torch.where`")
def branch_where() -> Plain:
    return {"model": seeded(lambda: Branch(where=True)), **vectors()}


class Sampling(nn.Module):
    """A variational autoencoder that draws its code in eval mode too, or in training only."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.encode, self.decode, self.always = nn.Linear(12, 16), nn.Linear(8, 12), always

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.encode(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * spread) if self.always or self.training else mean
        return self.decode(code), mean, spread


def _autoencoder(always: bool) -> Plain:
    def loss(output: Any, target: Tensor) -> Tensor:
        x, mean, spread = output
        return ((x - target) ** 2).mean(1) + 0.01 * (mean**2 + spread.exp() - 1 - spread).mean(1)

    data = {name: (x, x) for name, (x, _) in vectors().items()}
    score = lambda outputs, target: float(((outputs[0] - target) ** 2).mean())  # noqa: E731
    return {
        "model": seeded(lambda: Sampling(always)), **data, "loss": loss, "metric": "mean_squared_error", "score": score,
        "lr": 0.02,
    }  # fmt: skip


@form("a VAE that draws in eval mode", out="vae_mean")
def vae_random() -> Plain:
    return _autoencoder(always=True)


@form("a VAE that draws in training only")
def vae_mean() -> Plain:
    return _autoencoder(always=False)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.body(x)


@form("a buffer that is updated in eval mode", out="plain")
def buffer_in_eval() -> Plain:
    return {"model": seeded(Counting), **vectors()}


@form("functional dropout, by `self.training`")
def functional_dropout() -> Plain:
    class Dropping(Returns):
        def forward(self, x: Tensor) -> Any:
            return super().forward(functional.dropout(x, 0.3, self.training))

    return {"model": seeded(lambda: Dropping(lambda y, f: y)), **vectors()}


@form("functional dropout that is always on (a common mistake)", out="functional_dropout")
def dropout_always() -> Plain:
    class Dropping(Returns):
        def forward(self, x: Tensor) -> Any:
            return super().forward(functional.dropout(x, 0.3))

    return {"model": seeded(lambda: Dropping(lambda y, f: y)), **vectors()}


def f1(output: Tensor, target: Tensor) -> float:
    """Macro F1 of the whole split."""
    found, scores = output.argmax(1), []
    for c in range(CLASSES):
        hit = ((found == c) & (target == c)).sum()
        scores.append(2 * hit / ((found == c).sum() + (target == c).sum()).clamp_min(1))
    return float(torch.stack(scores).mean())


@form("a set metric (F1) on tiny data")
def set_metric() -> Plain:
    data = {name: (x[:24], y[:24]) if name != "train" else (x, y) for name, (x, y) in vectors().items()}
    return {"model": seeded(mlp), **data, "metric": f1, "score": f1}


@form("10,000 classes")
def many_classes() -> Plain:
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(10_000, (count,), generator=generator)
        return functional.one_hot(y % 100, 100).float() + 0.1 * torch.randn(count, 100, generator=generator), y

    model = seeded(lambda: nn.Sequential(nn.Linear(100, 16), nn.ReLU(), nn.Linear(16, 10_000)))
    return {"model": model, **splits(draw)}


@form("a fixed batch size in the forward", out="plain")
def fixed_batch() -> Plain:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.view(16, 12))

    data = vectors()
    return {"model": seeded(lambda: fitted(Fixed(), *data["train"], steps=0)), **data}
