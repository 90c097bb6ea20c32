"""Weight pruning: single weights become zero. It saves bytes under entropy coding, and usually no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._held import Hold, weights


def masks(weights: Mapping[str, Tensor], ratio: float, scope: str = "global") -> dict[str, Tensor]:
    """Which weights stay: all but the `ratio` of smallest magnitude.

    Args:
        weights: name → tensor of any shape.
        ratio: share that goes.
        scope: "global" ranks the weights of all tensors together, "layer" takes the share of each.

    Returns:
        name → bool of the tensor's shape. Exactly round(ratio · n) are False; of equals the first goes.

    Example:
        >>> masks({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([0.5, 2.0])}, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    if scope == "layer":
        return {name: masks({name: w}, ratio)[name] for name, w in weights.items()}
    flat = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    stays = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    stays[flat.argsort(stable=True)[: round(ratio * len(flat))]] = False
    parts = stays.split([w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def hold_zeros(model: nn.Module) -> Hold:
    """A hook that keeps every weight at zero that is zero now."""
    zeros = {name: p.detach() == 0 for name, p in weights(model)}
    return Hold(model, {n: lambda w, z=z: w.masked_fill(z.to(w.device), 0) for n, z in zeros.items() if bool(z.any())})


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Method):
    """Set the weights of smallest magnitude to zero, and keep them there during the `train` step that follows.

    Dense runtimes multiply by zeros as by other numbers, so latency stays: in ONNX Runtime, OpenVINO and PyTorch on a CPU it is
    worth nothing in time. It is worth bytes, with `entropy_storage`, most with `cluster_weights` between.

    Args:
        ratio: share of the weights that become zero, in (0, 1).
        scope: "global" ranks the weights of all layers together, "layer" takes the same share of each.
        embeddings: whether the tables of embeddings are pruned too.
        only: layers to act on: globs of names, comma-separated.

    Source: Han et al. 2015, arXiv:1506.02626.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1506.02626"
    requires = frozenset({"FLOAT_WEIGHTS"})
    writes = frozenset({"training"})
    search: ClassVar = {"ratio": (0.8, 0.9, 0.6), "scope": ("global", "layer")}

    ratio: float = 0.8
    scope: Literal["global", "layer"] = "global"
    embeddings: bool = True
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_weights.ratio is {self.ratio!r}", "it is the share that becomes zero, between 0 and 1")

    def apply(self, setup: Setup) -> Setup:
        found = dict(weights(setup.model, self.only, self.embeddings))
        if not found:
            raise NotApplicable("no matrix or kernel matches")
        with torch.no_grad():
            for name, stays in masks(found, self.ratio, self.scope).items():
                found[name].mul_(stays)
        training = setup.training
        return replace(setup, training=replace(training, make_hooks=(*training.make_hooks, hold_zeros)))
