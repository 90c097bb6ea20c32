"""The opponent's side of `recovery.py` as methods, so that every arm is a recipe and is trained, kept and scored alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from quadriga import methods
from quadriga.core.batch import call, primary
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup


@dataclass(frozen=True, kw_only=True)
class TorchPruning(Method):
    """Torch-Pruning's high-level pruner.

    Args:
        ratio: of channels that go.
        ranking: "local" takes the ratio from each layer, "isomorphic" ranks layers of one kind together.
        steps: in which it prunes, each after gradients of the calibration batches.
        round_to: widths are multiples of it.

    Source: Fang et al. 2023, arXiv:2301.12900; torch-pruning 1.6.1.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:2301.12900"
    requires: ClassVar[frozenset[str]] = frozenset({"FLOAT_WEIGHTS", "CLASSES"})

    ratio: float
    ranking: Literal["local", "isomorphic"] = "local"
    steps: int = 5
    round_to: int = 8

    def apply(self, setup: Setup) -> Setup:
        import torch_pruning as tp

        model, context = setup.model.eval(), setup.context
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == context.classes]
        everywhere = self.ranking == "isomorphic"
        pruner = tp.pruner.BasePruner(
            model, context.example, importance=tp.importance.GroupTaylorImportance(), pruning_ratio=self.ratio,
            iterative_steps=self.steps, ignored_layers=heads, round_to=self.round_to, global_pruning=everywhere,
            isomorphic=everywhere,
        )  # fmt: skip
        for _ in range(self.steps):
            model.zero_grad()
            for batch in context.calibration:
                nn.functional.cross_entropy(primary(call(model, batch.inputs)), batch.target).backward()
            pruner.step()
        model.zero_grad()
        return replace(setup, model=model)


@dataclass(frozen=True, kw_only=True)
class Reinitialize(Method):
    """Draw all weights anew, convolutions as He et al. 2015 do: the same shapes, from scratch."""

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1502.01852"

    def apply(self, setup: Setup) -> Setup:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setup.context.seed)
            for module in setup.model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return replace(setup, model=setup.model)


def register(*found: type[Method]) -> None:
    """Make methods known to recipes of this process, as a plug-in's are."""
    methods._found().update({cls.name: cls for cls in found})
