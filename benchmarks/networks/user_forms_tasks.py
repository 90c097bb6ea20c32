"""Forms of tasks: segmentation, detection with padded and ragged targets, a generator, attention between examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from user_forms import CLASSES, Plain, fitted, form, seeded, splits, vectors

SIZE = 16


def block(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = block(1, 8), block(8, 16), nn.ConvTranspose2d(16, 8, 2, 2)
        self.out = nn.Sequential(block(16, 8), nn.Conv2d(8, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(x)
        return self.out(torch.cat([self.up(self.middle(functional.max_pool2d(first, 2))), first], 1))


def bright(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 16, 16] and the class of each pixel [n, 16, 16]."""
    x = functional.interpolate(torch.randn(count, 1, 4, 4, generator=generator), SIZE, mode="bilinear", align_corners=False)
    return x, (x[:, 0] > -0.3).long() + (x[:, 0] > 0.3).long()


def pixels(outputs: Tensor, target: Tensor) -> float:
    return 100 * float((outputs.argmax(1) == target).double().mean())


@form("U-Net, logits [n, classes, height, width], loss and metric by name")
def unet() -> Plain:
    return {"model": seeded(UNet), **splits(bright), "score": pixels}


@form("U-Net with a loss and a metric of the user's own")
def unet_own() -> Plain:
    def accuracy(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).float().flatten(1).mean(1)

    return {
        "model": seeded(UNet), **splits(bright), "loss": functional.cross_entropy, "metric": accuracy,
        "score": lambda o, t: float(accuracy(o, t).mean()),
    }  # fmt: skip


class Head(nn.Module):
    """Three boxes and their scores for an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(1, 8), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 32), nn.ReLU())
        self.boxes, self.scores = nn.Linear(32, 12), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"boxes": self.boxes(x).view(-1, 3, 4), "scores": self.scores(x)}


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Images, and up to three boxes each, padded with −1, with their number."""
    number = torch.randint(1, 4, (count,), generator=generator)
    boxes = torch.rand(count, 3, 4, generator=generator)
    absent = torch.arange(3) >= number[:, None]
    images = torch.randn(count, 1, SIZE, SIZE, generator=generator) * 0.1 + number[:, None, None, None]
    return images, {"boxes": boxes.masked_fill(absent[..., None], -1.0), "number": number}


def box_loss(output: Any, target: Any) -> Tensor:
    there = (target["boxes"][..., 0] >= 0).float()
    far = (output["boxes"] - target["boxes"]).abs().mean(2) * there
    return far.mean(1) + functional.binary_cross_entropy_with_logits(output["scores"], there, reduction="none").mean(1)


def box_hits(output: Any, target: Any) -> Tensor:
    """The share of places [n, 3] that are rightly called taken or free."""
    return ((output["scores"] > 0) == (target["boxes"][..., 0] >= 0)).float().mean(1)


@form("a detector's head, padded targets")
def detector_padded() -> Plain:
    return {
        "model": seeded(Head), **splits(scenes), "loss": box_loss, "metric": box_hits,
        "score": lambda o, t: float(box_hits(o, t).mean()),
    }  # fmt: skip


class Scenes(Dataset):
    def __init__(self, images: Tensor, target: dict[str, Tensor]) -> None:
        self.images, self.target = images, target

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i], self.target["boxes"][i, : int(self.target["number"][i])]


def gathered(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """The collate function of torchvision's detection references: a list of boxes."""
    return torch.stack([x for x, _ in rows]), [boxes for _, boxes in rows]


@form("a detector's head, ragged targets in a list", out="detector_padded")
def detector_ragged() -> Plain:
    def loss(output: Any, target: list[Tensor]) -> Tensor:
        number = torch.tensor([len(t) for t in target])
        return functional.binary_cross_entropy_with_logits(output["scores"], (torch.arange(3) < number[:, None]).float())

    def metric(output: Any, target: list[Tensor]) -> Tensor:
        number = torch.tensor([len(t) for t in target])
        return ((output["scores"] > 0).sum(1) == number).float()

    loaders = {name: DataLoader(Scenes(*pair), 16, collate_fn=gathered) for name, pair in splits(scenes).items()}
    return {"model": seeded(Head), **loaders, "loss": loss, "metric": metric}


@form("a GAN's generator, trained, measured against drawn samples")
def gan_generator() -> Plain:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, 64), nn.Unflatten(1, (16, 2, 2)), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    model = seeded(build).eval()

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = torch.randn(count, 8, generator=generator)
        with torch.no_grad():
            return z, model(z) + 0.01 * torch.randn(count, 1, 8, 8, generator=generator)

    score = lambda o, t: float(((o - t) ** 2).mean())  # noqa: E731
    data = splits(draw)
    return {
        "model": model, "val": data["val"], "test": data["test"], "trained": True, "loss": "squared_error",
        "metric": "mean_squared_error", "score": score,
    }  # fmt: skip


class Between(nn.Module):
    """Each example sees the mean of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x - 0.5 * x.mean(0))


@form("examples that depend on their batch", out="plain")
def batch_dependent() -> Plain:
    return {"model": seeded(Between), **vectors()}


@form("regression, targets [n] against outputs [n, 1] squeezed")
def regression() -> Plain:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).squeeze(1)

    data = {name: (x, x[:, 0] - 0.5 * x[:, 1]) for name, (x, _) in vectors().items()}
    score = lambda o, t: float(((o - t) ** 2).mean())  # noqa: E731
    return {"model": seeded(Squeezed), **data, "loss": "squared_error", "metric": "mean_squared_error", "score": score}


@form("an ensemble over `torch.func.vmap`")
def vmapped() -> Plain:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 12, CLASSES) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(lambda w: x @ w)(self.weights).mean(0)

    data = vectors()
    return {"model": seeded(lambda: fitted(Ensemble(), *data["train"])), **data, "trained": True}
