"""Tiny workloads of five kinds of network, made from random numbers: built in milliseconds, learnable in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.workload import Workload

ALL_INVARIANCES = frozenset({"color", "horizontal_flip", "rotation", "translation"})


class TinyCnn(nn.Module):
    """A small LeNet with a batch norm: two 5×5 convolutions, a `reshape` with a constant, dropout, two linear layers."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 5)
        self.fc1 = nn.Linear(32, 16)
        self.drop = nn.Dropout(0.1)
        self.fc2 = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [batch, 1, 20, 20] → logits [batch, classes]."""
        x = functional.max_pool2d(functional.relu(self.norm(self.conv1(x))), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return self.fc2(self.drop(functional.relu(self.fc1(x.reshape(-1, 32)))))


class TinyPooled(nn.Module):
    """A small residual network that ends in global pooling, so that it takes images of any size."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 12, 3, 2, 1)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [batch, 1, height, width] → logits [batch, classes]."""
        x = functional.max_pool2d(functional.relu(self.norm1(self.conv1(x))), 2)
        x = functional.relu(x + self.norm2(self.conv2(x)))
        return self.fc(functional.relu(self.down(x)).mean((2, 3)))


class TinyLstm(nn.Module):
    """A two-layer LSTM that classifies token sequences by its last state."""

    def __init__(self, vocabulary: int = 20, width: int = 12, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.lstm = nn.LSTM(8, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, positions] → logits [batch, classes]."""
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


class TinyBlock(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, width] → the same shape."""
        batch, positions, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, positions, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class TinyTransformer(nn.Module):
    """A two-block language model whose head is tied to its embedding."""

    def __init__(self, vocabulary: int = 20, width: int = 16, positions: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(positions, width) * 0.02)
        self.blocks = nn.ModuleList(TinyBlock(width, 2) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, positions] → logits [batch, positions, vocabulary]."""
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TinyAttention(nn.Module):
    """A classifier of sequences by grouped-query attention, two query heads to a key-value head."""

    width = 4  # of a head

    def __init__(self, vocabulary: int = 20, width: int = 16, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.RMSNorm(width)
        self.query, self.out = nn.Linear(width, self.width * heads), nn.Linear(self.width * heads, width)
        self.key, self.value = nn.Linear(width, self.width * shared), nn.Linear(width, self.width * shared)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, positions] → logits [batch, vocabulary]."""
        x = self.embed(tokens)
        normed = self.norm(x)
        projections = (self.query, self.key, self.value)
        q, k, v = (p(normed).view(*x.shape[:2], -1, self.width).transpose(1, 2) for p in projections)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))  # one for two query heads
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head((x + self.out(mixed.reshape(*x.shape[:2], -1)))[:, -1])


Split = tuple[Tensor, Tensor]


def _splits(make: Callable[[int, torch.Generator], Split], sizes: tuple[int, int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {name: make(size, generator) for name, size in zip(("train", "val", "test"), sizes, strict=True)}


def _module(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _quadrants(count: int, generator: torch.Generator) -> Split:
    """Images [1, 20, 20] with a bright quadrant, which is the class."""
    images, classes = torch.randn(count, 1, 20, 20, generator=generator), torch.randint(4, (count,), generator=generator)
    for image, c in zip(images, classes.tolist(), strict=True):
        image[0, 10 * (c // 2) :, 10 * (c % 2) :][:10, :10] += 2
    return images, classes


def of_images(build: Callable[[], nn.Module], sizes: tuple[int, int, int], trained: bool, seed: int, name: str) -> Workload:
    """The images of `tiny_cnn` for any network of four classes."""
    data, invariances = _splits(_quadrants, sizes), ALL_INVARIANCES
    return Workload(model=_module(build, seed), **data, batch_size=16, invariances=invariances, trained=trained, name=name)


def tiny_cnn(sizes: tuple[int, int, int] = (96, 48, 48), *, trained: bool = False, seed: int = 0) -> Workload:
    """Images [1, 20, 20] with a bright quadrant, which is the class; all invariances are declared.

    Args:
        sizes: examples in train, val and test.
        trained: whether the model passes as trained.
        seed: of its weights.
    """
    return of_images(TinyCnn, sizes, trained, seed, "tiny_cnn")


def tiny_pooled(sizes: tuple[int, int, int] = (96, 48, 48), *, trained: bool = False, seed: int = 0) -> Workload:
    """The images of `tiny_cnn`, for a residual network that takes any size."""
    return of_images(TinyPooled, sizes, trained, seed, "tiny_pooled")


def tiny_mlp(sizes: tuple[int, int, int] = (96, 48, 48), *, trained: bool = False, seed: int = 0) -> Workload:
    """Vectors [10] whose class is the sign of their sum."""

    build = lambda: nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))  # noqa: E731
    return of_vectors(build, sizes, trained, seed, "tiny_mlp")


def of_vectors(build: Callable[[], nn.Module], sizes: tuple[int, int, int], trained: bool, seed: int, name: str) -> Workload:
    """The vectors of `tiny_mlp` for any network of two classes."""

    def make(count: int, generator: torch.Generator) -> Split:
        x = torch.randn(count, 10, generator=generator)
        return x, (x.sum(1) > 0).long()

    return Workload(model=_module(build, seed), **_splits(make, sizes), batch_size=16, trained=trained, name=name)


def tiny_lstm(sizes: tuple[int, int, int] = (96, 48, 48), *, trained: bool = False, seed: int = 0) -> Workload:
    """Token sequences [10] whose class is the last token modulo 3."""

    def make(count: int, generator: torch.Generator) -> Split:
        tokens = torch.randint(20, (count, 10), generator=generator)
        return tokens, tokens[:, -1] % 3

    return Workload(model=_module(TinyLstm, seed), **_splits(make, sizes), batch_size=16, trained=trained, name="tiny_lstm")


def tiny_attention(sizes: tuple[int, int, int] = (96, 48, 48), *, trained: bool = False, seed: int = 0) -> Workload:
    """Token sequences [12]; the class is the one after the last token, modulo 20."""

    def make(count: int, generator: torch.Generator) -> Split:
        tokens = torch.randint(20, (count, 12), generator=generator)
        return tokens, (tokens[:, -1] + 1) % 20

    model = _module(TinyAttention, seed)
    return Workload(model=model, **_splits(make, sizes), batch_size=16, trained=trained, name="tiny_attention")


def tiny_transformer(sizes: tuple[int, int, int] = (96, 48, 48), *, trained: bool = False, seed: int = 0) -> Workload:
    """Token sequences [12] that count upwards, to be continued; embedding and head are tied."""

    def make(count: int, generator: torch.Generator) -> Split:
        tokens = (torch.randint(20, (count, 1), generator=generator) + torch.arange(13)) % 20
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return Workload(
        model=_module(TinyTransformer, seed),
        **_splits(make, sizes),
        metric="bits_per_byte",
        batch_size=16,
        trained=trained,
        name="tiny_transformer",
    )


TINY: dict[str, Callable[..., Workload]] = {
    "cnn": tiny_cnn,
    "mlp": tiny_mlp,
    "lstm": tiny_lstm,
    "transformer": tiny_transformer,
    "attention": tiny_attention,
}

MORE: dict[str, Callable[..., Workload]] = {"pooled": tiny_pooled}  # for methods that can do nothing with those of TINY
