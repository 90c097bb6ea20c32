"""Networks over vectors: several inputs and outputs, experts, bare parameters, and code that cannot be traced."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, cat, nn

from networks._make import CLASSES, Draw, Split, numbers, tokens, workload


class Siamese(nn.Module):
    """One tower for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.fc = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(16, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.tower(a), self.tower(b)
        return self.fc(cat([(a - b).abs(), a * b], -1))


class Recommender(nn.Module):
    """A table for each field, then a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.ModuleList(nn.Embedding(20, 6) for _ in range(4))
        inside = [nn.Linear(24, 16), nn.BatchNorm1d(16), nn.PReLU(16), nn.Dropout(0.1), nn.Linear(16, 8), nn.ReLU()]
        self.body = nn.Sequential(*inside, nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(cat([field(x[:, i]) for i, field in enumerate(self.fields)], 1))


class Experts(nn.Module):
    """All experts answer, softly mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.gate, self.fc = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        return self.fc(x + (self.gate(x).softmax(-1).unsqueeze(-1) * answers).sum(1))


class Einsum(nn.Module):
    """Parameters without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 4, 8) * 0.1), nn.Parameter(torch.randn(4, 8, 6) * 0.1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("bi,ihd->bhd", x, self.up))
        return self.fc(x + torch.einsum("bhd,hdi->bi", hidden, self.down))


class Maxout(nn.Module):
    """The larger of each two units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(6, 24), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x).view(-1, 12, 2).amax(-1))


class Pairs(nn.Module):
    """A bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pair, self.fc = nn.Linear(6, 12), nn.Linear(6, 10), nn.Bilinear(12, 10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.pair(self.a(x), self.b(x))))


class Outputs(nn.Module):
    """A dict of outputs, hidden units among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head, self.aux = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.a(x))
        return {"logits": self.head(hidden), "aux": self.aux(hidden), "hidden": hidden}


class Branching(nn.Module):
    """What it computes depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(2 * x if x.sum() > 0 else x)


def two(count: int, generator: torch.Generator) -> Split:
    """Two inputs of six numbers."""
    pair = (torch.randn(count, 6, generator=generator), torch.randn(count, 6, generator=generator))
    return pair, torch.randint(CLASSES, (count,), generator=generator)


NETWORKS: dict[str, tuple[type[nn.Module], Draw]] = {
    "siamese": (Siamese, two),
    "recommender": (Recommender, tokens(4, 20)),
    "soft_experts": (Experts, numbers(6)),
    "einsum": (Einsum, numbers(6)),
    "maxout": (Maxout, numbers(6)),
    "bilinear": (Pairs, numbers(6)),
    "dict_of_outputs": (Outputs, numbers(6)),
    "data_dependent": (Branching, numbers(6)),
}
WORKLOADS = {name: partial(workload, name, build, draw) for name, (build, draw) in NETWORKS.items()}
