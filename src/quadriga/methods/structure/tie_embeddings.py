"""Tie the output layer to the input embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from quadriga.core.axes import Patch, Reference, check_interface
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup

Start = Literal["embedding", "head", "mean"]


def tie(embedding: nn.Embedding, head: nn.Linear, start: Start, patch: Patch) -> None:
    """Let both use the embedding's parameter; the head's bias stays.

    Args:
        embedding: weight[rows, width].
        head: weight[rows, width].
        start: whose values the shared weight starts from.
        patch: records the change.

    Example:
        >>> embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5)
        >>> tie(embedding, head, "mean", Patch())
        >>> head.weight is embedding.weight
        True
    """
    values: dict[str, Tensor] = {"embedding": embedding.weight.data, "head": head.weight.data}
    values["mean"] = (values["embedding"] + values["head"]) / 2
    if start != "embedding":
        patch.data(embedding.weight, values[start])
    patch.parameter(head, "weight", embedding.weight)


def pairs(model: nn.Module) -> Iterator[tuple[str, nn.Embedding, str, nn.Linear]]:
    """Embeddings and Linear layers whose weights have the same shape and are not tied to anything."""
    named = dict(model.named_modules())
    counts: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        counts[id(p)] = counts.get(id(p), 0) + 1
    tables = {n: m for n, m in named.items() if isinstance(m, nn.Embedding) and counts.get(id(m.weight)) == 1}
    heads = {n: m for n, m in named.items() if type(m) is nn.Linear and counts.get(id(m.weight)) == 1}
    for name, table in tables.items():
        yield from ((name, table, n, head) for n, head in reversed(heads.items()) if head.weight.shape == table.weight.shape)


@dataclass(frozen=True, kw_only=True)
class TieEmbeddings(Method):
    """Let the output layer and the input embedding share one weight, where both are [vocabulary, width].

    Training has to follow: one matrix now serves two ends. Where several pairs fit, the last Linear layer is taken.

    Args:
        start: whose values the shared weight starts from: "embedding", "head" or their "mean".

    Source: Press and Wolf 2017, arXiv:1608.05859.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1608.05859"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"start": ("head", "embedding", "mean")}

    start: Start = "head"

    def apply(self, setup: Setup) -> Setup:
        found, reasons = list(pairs(setup.model)), list[str]()
        if not found:
            raise NotApplicable("no embedding and Linear layer have weights of one shape that are not tied yet")
        reference = Reference.of(setup.model, setup.context.example)
        for name, table, path, head in found:
            if table.weight.dtype != head.weight.dtype:
                reasons.append(f"{name} and {path} have other types")
                continue
            if table.weight.requires_grad != head.weight.requires_grad:
                reasons.append(f"one of {name} and {path} is frozen, the other is not")
                continue
            patch = Patch()
            try:
                tie(table, head, self.start, patch)
                check_interface(setup.model, setup.context.example, reference)
                return replace(setup, model=setup.model)
            except NotApplicable as error:
                patch.undo()
                reasons.append(f"{path}: {error.reason}")
        raise NotApplicable("; ".join(reasons[:3]))
