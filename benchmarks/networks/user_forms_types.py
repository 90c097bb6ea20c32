"""Forms with unusual numbers: other float types, complex values, sparse matrices, operations of the user's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from user_forms import CLASSES, Plain, cnn, fitted, form, images, mlp, seeded, splits, tokens, vectors


def _trained(dtype: torch.dtype, convolutions: bool = False) -> Plain:
    """Trained in float32, converted, as people do it."""
    data = images() if convolutions else vectors()
    model = seeded(lambda: fitted(cnn() if convolutions else mlp(), *data["train"])).to(dtype)
    data = {name: (x.to(dtype), y) for name, (x, y) in data.items()}
    return {"model": model, **data, "trained": True}


@form("float16 throughout", out="plain")
def half() -> Plain:
    return _trained(torch.float16)


@form("bfloat16 throughout", out="bfloat16_inside")
def bfloat16() -> Plain:
    return _trained(torch.bfloat16)


@form("bfloat16 convolutions", out="bfloat16_inside")
def bfloat16_images() -> Plain:
    return _trained(torch.bfloat16, convolutions=True)


@form("float64 throughout, to be trained", out="plain")
def float64() -> Plain:
    return {"model": seeded(mlp).double(), **vectors(dtype=torch.float64)}


@form("float64 convolutions", out="plain")
def float64_images() -> Plain:
    return _trained(torch.float64, convolutions=True)


class Inside(nn.Module):
    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.dtype)).float()


@form("bfloat16 inside, float32 in and out", out="plain")
def bfloat16_inside() -> Plain:
    data = vectors()
    return {"model": Inside(seeded(lambda: fitted(mlp(), *data["train"])), torch.bfloat16), **data, "trained": True}


class Rotation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(6) * 0.3
        self.register_buffer("turn", torch.polar(torch.ones(6), angles))
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(-1, 6, 2)) * self.turn
        return self.out(torch.view_as_real(turned).flatten(1))


@form("a complex buffer (rotary embedding)")
def complex_buffer() -> Plain:
    return {"model": seeded(Rotation), **vectors()}


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.out = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.stft(x, 16, 8, window=self.window, return_complex=True)
        return self.out(found.abs().clamp_min(1e-5).log().mean(-1))


@form("`torch.stft` inside, with a complex result")
def stft() -> Plain:
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (count,), generator=generator)
        waves = torch.sin(torch.arange(64) * (0.4 + 0.8 * y[:, None]))
        return waves + 0.3 * torch.randn(count, 64, generator=generator), y

    return {"model": seeded(Spectrum), **splits(draw)}


class Graph(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        ring = torch.eye(12) + torch.eye(12).roll(1, 0)
        self.register_buffer("near", ring.to_sparse() if sparse else ring)
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.near @ x.t()).t())


@form("a sparse adjacency matrix as a buffer", out="dense_adjacency")
def sparse_adjacency() -> Plain:
    return {"model": seeded(lambda: Graph(sparse=True)), **vectors()}


@form("the same matrix, dense")
def dense_adjacency() -> Plain:
    return {"model": seeded(lambda: Graph(sparse=False)), **vectors()}


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(Swish.apply(self.one(x)))


@form("a custom `autograd.Function`")
def custom_function() -> Plain:
    return {"model": seeded(Custom), **vectors()}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


@form("checkpointed blocks")
def checkpointed() -> Plain:
    return {"model": seeded(Checkpointed), **vectors()}


class Normalizing(nn.Module):
    def __init__(self, cloning: bool) -> None:
        super().__init__()
        self.body, self.cloning = mlp(), cloning

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if self.cloning else x
        x.sub_(0.1).div_(1.1)
        return self.body(x)


@form("a forward that changes its input in place", out="in_place_cloned")
def in_place() -> Plain:
    return {"model": seeded(lambda: Normalizing(cloning=False)), **vectors()}


@form("the same on a clone of its input")
def in_place_cloned() -> Plain:
    return {"model": seeded(lambda: Normalizing(cloning=True)), **vectors()}


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.float() / 64 - 2)


@form("uint8 images, scaled inside")
def byte_images() -> Plain:
    data = {name: (((x + 2) * 64).clamp(0, 255).to(torch.uint8), y) for name, (x, y) in images().items()}
    return {"model": seeded(Bytes), **data}


@form("a channels-last model")
def channels_last() -> Plain:
    return {"model": seeded(cnn).to(memory_format=torch.channels_last), **images()}


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(40, 16, mode=mode, padding_idx=0), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bag(x))


@form("`EmbeddingBag` of [n, length], padded")
def embedding_bag() -> Plain:
    return {"model": seeded(lambda: Bag("mean")), **tokens(4)}


@form("`EmbeddingBag` with the largest")
def embedding_bag_max() -> Plain:
    return {"model": seeded(lambda: Bag("max")), **tokens(4)}


class Offsets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(40, 16), nn.Linear(16, CLASSES)

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        return self.out(self.bag(words, offsets))


class Ragged(Dataset):
    def __init__(self, count: int) -> None:
        x, y = tokens()["train"]
        self.rows = [(x[i][: 2 + i % 6], y[i]) for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.rows[i]


def joined(rows: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The collate function of PyTorch's tutorial on text."""
    lengths = torch.tensor([0] + [len(x) for x, _ in rows[:-1]])
    return (torch.cat([x for x, _ in rows]), lengths.cumsum(0)), torch.stack([y for _, y in rows])


@form("`EmbeddingBag` with offsets, ragged", out="embedding_bag")
def embedding_bag_offsets() -> Plain:
    loaders = {name: DataLoader(Ragged(n), 16, collate_fn=joined) for name, n in (("train", 128), ("val", 64), ("test", 64))}
    return {"model": seeded(Offsets), **loaders}
