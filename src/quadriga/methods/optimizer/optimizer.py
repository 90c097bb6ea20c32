"""The base optimizer: torch's, the package pytorch-optimizer's, and our own Muon and schedule-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup, plain_sgd
from quadriga.methods.optimizer._groups import Roles, roles
from quadriga.methods.optimizer._kinds import KINDS
from quadriga.methods.optimizer._schedule_free import Averaged


@dataclass(frozen=True, kw_only=True)
class Optimizer(Method):
    """How a gradient becomes an update, each kind in its fastest implementation.

    | kind | usual lr | usual decay | from | source |
    |---|---|---|---|---|
    | sgd | 0.1 | 0 | torch | Sutskever et al. 2013 (momentum) |
    | adam | 0.001 | 0 | torch | Kingma & Ba 2015, arXiv:1412.6980 |
    | adamw | 0.001 | 0.01 | torch | Loshchilov & Hutter 2019, arXiv:1711.05101 |
    | nadam | 0.002 | 0 | torch | Dozat 2016, "Incorporating Nesterov Momentum into Adam" |
    | rmsprop | 0.001 | 0 | torch | Hinton 2012, lecture 6e |
    | adagrad | 0.01 | 0 | torch | Duchi et al. 2011 |
    | adafactor | 0.01 | 0 | torch | Shazeer & Stern 2018, arXiv:1804.04235 |
    | muon | 0.003 | 0.01 | here | Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982 |
    | schedule_free | 0.003 | 0.01 | here | Defazio et al. 2024, arXiv:2405.15682, with AdamW's steps |
    | schedule_free_sgd | 1.0 | 0 | here | the same, with SGD's |
    | lion | 0.0001 | 0.1 | extra | Chen et al. 2023, arXiv:2302.06675 |
    | soap | 0.003 | 0.01 | extra | Vyas et al. 2024, arXiv:2409.11321 |
    | adan | 0.001 | 0.01 | extra | Xie et al. 2022, arXiv:2208.06677 |
    | prodigy | 1.0 | 0.01 | extra | Mishchenko & Defazio 2023, arXiv:2306.06101 |

    The extras are those of `pip install "quadriga[optimizers]"`. Muon orthogonalises the momentum of matrices and kernels
    between hidden units; embeddings, the output layer (the last linear layer in the order of modules), norms and biases take
    AdamW, at the same rate. Schedule-free needs no falling rate; a warm-up is the method `schedule`'s.

    Args:
        kind: one of the table.
        lr: the learning rate; None for the kind's usual one.
        scale: multiplies the learning rate, so that it can be searched for all kinds alike.
        momentum: of sgd, rmsprop and muon; None for the kind's usual one, 0.95 for muon, else 0.
        nesterov: of sgd; needs momentum. Muon's always is.
        betas: of the kinds that average gradients; None for the kind's usual ones. Adan has three. The first of schedule-free
            says how near to the average gradients are taken, and is positive.
        alpha: of rmsprop.
        eps: of the adaptive kinds, save adafactor and lion.
        weight_decay: added to the gradient for sgd, adam, nadam, rmsprop, adagrad and schedule_free_sgd, decoupled for the
            others; None for the kind's usual one.
        decay_biases: let biases and norms (parameters of at most one dimension, or of a norm's module) decay too.
        decay_embeddings: let embeddings decay too. One that is tied to the output layer counts as output layer and decays.

    Source: of each kind, in the table; the docs of torch.optim and of pytorch-optimizer.
    """

    family = Family.OPTIMIZER
    numerics = Numerics.CHANGED
    source = "arXiv:1412.6980, arXiv:1711.05101, arXiv:2502.16982, arXiv:2405.15682"
    search: ClassVar = {
        "kind": ("adamw", "muon", "schedule_free", "sgd", "adam", "nadam", "rmsprop", "lion", "soap", "adan", "prodigy"),
        "scale": (1.0, 0.3, 3.0, 10.0),
        "momentum": (None, 0.9),
        "weight_decay": (None, 0.0005, 0.05),
    }
    requires = frozenset({"TRAIN_DATA"})

    kind: Literal[
        "sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad", "adafactor", "muon", "schedule_free", "schedule_free_sgd",
        "lion", "soap", "adan", "prodigy",
    ] = "sgd"  # fmt: skip
    lr: float | None = None
    scale: float = 1.0
    momentum: float | None = None
    nesterov: bool = False
    betas: tuple[float, ...] | None = None
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float | None = None
    decay_biases: bool = False
    decay_embeddings: bool = False

    def __post_init__(self) -> None:
        betas = self.values["betas"]
        count, averaged = len(KINDS[self.kind].betas), self.kind.startswith("schedule_free")
        self.insist(
            ("lr", self.lr is None or self.lr > 0, "give a positive number"),
            ("scale", self.scale > 0, "give a positive number"),
            ("momentum", 0 <= self.values["momentum"] < 1, "give a number in [0, 1)"),
            (
                "nesterov",
                not self.nesterov or (self.values["momentum"] > 0 and self.kind == "sgd"),
                "it needs sgd with momentum",
            ),
            ("betas", len(betas) == count and all(0 <= b < 1 for b in betas), f"give {count} numbers in [0, 1)"),
            ("betas", not averaged or betas[0] > 0, f"{self.kind} needs a positive first one"),
            ("alpha", 0 <= self.alpha < 1, "give a number in [0, 1)"),
            ("eps", self.eps > 0, "give a positive number"),
            ("weight_decay", self.weight_decay is None or self.weight_decay >= 0, "give a number of at least 0"),
        )

    def apply(self, setup: Setup) -> Setup:
        if setup.optimizer.make is not plain_sgd:  # replacing it would drop what stands there
            raise NotApplicable(
                "an optimizer, or a penalty around one, stands already",
                "put one optimizer step first, before l1, l2 and the like",
            )
        KINDS[self.kind].check()
        hooks = (Averaged,) if self.kind.startswith("schedule_free") else ()
        slot = replace(setup.optimizer, make=self.make, make_hooks=(*setup.optimizer.make_hooks, *hooks))
        return replace(setup, optimizer=slot)

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for a model's trainable parameters, those that do not decay in a group of their own."""
        kind, found = KINDS[self.kind], roles(model)
        groups = self.groups(found, found.matrices if self.kind == "muon" else [])
        rate = (kind.rate if self.lr is None else self.lr) * self.scale
        return kind.make(groups, model, rate, {name: self.values[name] for name in kind.takes})

    def groups(self, found: Roles, matrices: list[nn.Parameter]) -> list[dict[str, Any]]:
        """What decays, with `matrices` apart, and what does not; in the order of the model."""
        still = {*(() if self.decay_biases else found.vectors), *(() if self.decay_embeddings else found.tables)}
        decay = self.values["weight_decay"]
        parts: list[tuple[list[nn.Parameter], float, bool]] = [(matrices, decay, True)]
        rest = [p for p in found.all if p not in set(matrices)]
        if decay:
            parts += [([p for p in rest if p not in still], decay, False), ([p for p in rest if p in still], 0.0, False)]
        else:
            parts.append((rest, 0.0, False))
        return [{"params": p, "weight_decay": d} | ({"matrix": True} if m else {}) for p, d, m in parts if p]

    @property
    def values(self) -> dict[str, Any]:
        """The fields that optimizers take, with the kind's usual values for None."""
        kind, names = KINDS[self.kind], ("momentum", "nesterov", "betas", "alpha", "eps", "weight_decay")
        given = {name: getattr(self, name) for name in names}
        usual = {"momentum": kind.momentum, "betas": kind.betas, "weight_decay": kind.decay}
        return given | {name: value for name, value in usual.items() if given[name] is None}
