"""Weight pruning: single weights become zero, at once or in training. It saves bytes under entropy coding, usually no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._gradual import Thinning, check_gradual
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


class WeightFade(Thinning):
    """Zeroes ever more of the smallest weights in the course of training; a weight that is zero stays so."""

    def __init__(self, method: PruneWeights, model: nn.Module) -> None:
        super().__init__(method.gradual)
        self.method, self.found = method, method.weights(model)
        self.stays: dict[str, Tensor] = {}

    def choose(self, share: float) -> None:
        """The smallest go."""
        self.stays = masks(self.found, self.method.ratio * share, self.method.scope)
        self._mask()

    def _mask(self) -> None:
        self.masks = [(self.found[name], stays.to(self.found[name])) for name, stays in self.stays.items()]

    def state_dict(self) -> dict[str, Any]:
        """What stays."""
        return {"stays": dict(self.stays), "times": self.times}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        self.stays, self.times = {name: stays.clone() for name, stays in state["stays"].items()}, state["times"]
        self._mask()


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Method):
    """Set the weights of smallest magnitude to zero, and keep them there during the `train` step that follows.

    Dense runtimes multiply by zeros as by other numbers, so latency stays: in ONNX Runtime, OpenVINO and PyTorch on a CPU it is
    worth nothing in time. It is worth bytes, with `entropy_storage`, most with `cluster_weights` between.

    Args:
        ratio: share of the weights that become zero, in (0, 1).
        scope: "global" ranks the weights of all layers together, "layer" takes the same share of each.
        gradual: part of the train step that follows in which ever more weights become zero, from 0 (all at once) to 1.
        embeddings: whether the tables of embeddings are pruned too.
        only: layers to act on: globs of names, comma-separated.

    Source: Han et al. 2015, arXiv:1506.02626; Zhu & Gupta 2017, arXiv:1710.01878 (gradual).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1506.02626"
    requires = frozenset({"FLOAT_WEIGHTS"})
    writes = frozenset({"training"})
    search: ClassVar = {"ratio": (0.8, 0.9, 0.6), "scope": ("global", "layer"), "gradual": (0.0, 0.7)}

    ratio: float = 0.8
    scope: Literal["global", "layer"] = "global"
    gradual: float = 0.0
    embeddings: bool = True
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_weights.ratio is {self.ratio!r}", "it is the share that becomes zero, between 0 and 1")
        check_gradual(self.name, self.gradual)

    def needs(self) -> frozenset[str]:
        """Gradual pruning takes place in training."""
        return self.requires | ({"TRAIN_DATA"} if self.gradual else set())

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What it acts on. Raises NotApplicable if there is nothing."""
        found: dict[str, Tensor] = dict(weights(model, self.only, self.embeddings))
        if not found:
            raise NotApplicable("no matrix or kernel matches")
        return found

    def zeroed(self, model: nn.Module) -> nn.Module:
        """The model with its smallest weights at zero, in place."""
        found = self.weights(model)
        with torch.no_grad():
            for name, stays in masks(found, self.ratio, self.scope).items():
                found[name].mul_(stays)
        return model

    def apply(self, setup: Setup) -> Setup:
        training = setup.training
        self.weights(setup.model)
        if self.gradual:
            hooks, finish = partial(WeightFade, self), (*training.finish, self.zeroed)
            return replace(setup, training=replace(training, make_hooks=(*training.make_hooks, hooks), finish=finish))
        model = self.zeroed(setup.model)
        return replace(setup, model=model, training=replace(training, make_hooks=(*training.make_hooks, hold_zeros)))
