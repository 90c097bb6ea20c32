"""The kinds of base optimizers: where each comes from, what it takes, and its usual values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.errors import NotApplicable
from quadriga.methods.optimizer._muon import Muon
from quadriga.methods.optimizer._schedule_free import ScheduleFree

PACKAGE = "pytorch_optimizer"
Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One kind.

    Args:
        name: of its class, in torch.optim or the package; empty for ours.
        rate: the usual learning rate.
        takes: the fields of the method that it has.
        decay, momentum, betas: the usual values.
        fused: whether torch has a fused form. Where not, its own choice is left: foreach on GPUs, the plain loop on CPUs.
        extra: whether it is of the package.
        also: further options.

    Measured, one thread of a CPU, µs a step in fused, foreach and plain form:

    | kind | LeNet | GPT of 2 M parameters |
    |---|---|---|
    | sgd, with momentum | 51, 87, 97 | 3980, 7970, 7090 |
    | adam | 100, 290, 343 | 7410, 12910, 9200 |
    | adamw | 98, 321, 556 | 2110, 9410, 8770 |
    | adagrad | 83, 223, 200 | 1190, 8310, 7260 |
    | nadam | none, 476, 478 | none, 12120, 10300 |
    | rmsprop | none, 371, 298 | none, 7600, 7830 |
    | adafactor | none, 1024, 934 | none, 16660, 15290 |
    """

    name: str
    rate: float
    takes: tuple[str, ...] = ("betas", "eps")
    decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    fused: bool = False
    extra: bool = False
    also: tuple[tuple[str, Any], ...] = ()

    def check(self) -> None:
        """Refuse where the package is absent; it is not imported."""
        if self.extra and util.find_spec(PACKAGE) is None:
            raise NotApplicable(f"{self.name} needs the package {PACKAGE}", 'pip install "quadriga[optimizers]"')

    def make(self, groups: Groups, model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
        """The optimizer, which takes sparse gradients too."""
        self.check()
        cls: Any = getattr(import_module(PACKAGE) if self.extra else torch.optim, self.name)
        sparse = any(getattr(m, "sparse", False) for m in model.modules())
        real = all(p.is_floating_point() for p in model.parameters())
        form = {"fused": True} if self.fused and real and not sparse else {}
        made: torch.optim.Optimizer = cls(list(groups), lr=lr, **options, **dict(self.also), **form)
        keeps = cls is torch.optim.SGD and not any(g["momentum"] or g["weight_decay"] for g in made.param_groups)
        if sparse and not keeps:  # plain SGD alone leaves the rows that were not looked up as they are
            made.register_step_pre_hook(densify)
        if self.name == "SOAP":
            made.register_step_post_hook(row_major)
        return made


@dataclass(frozen=True)
class OwnMuon(Kind):
    """Ours; it takes the groups' entry `matrix`."""

    def make(self, groups: Groups, model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
        return Muon(groups, lr, **options)


@dataclass(frozen=True)
class OwnScheduleFree(Kind):
    """Ours, with AdamW's steps or SGD's."""

    def make(self, groups: Groups, model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
        return ScheduleFree(groups, lr, **options, **dict(self.also))


def densify(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Make sparse gradients dense."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense()


def row_major(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Keep SOAP's bases as a checkpoint gives them back; products of column-major ones round otherwise."""
    for state in optimizer.state.values():
        if state.get("Q") is not None:
            state["Q"] = [q.contiguous() if isinstance(q, Tensor) else q for q in state["Q"]]


KINDS = {
    "sgd": Kind("SGD", 0.1, ("momentum", "nesterov"), fused=True),
    "adam": Kind("Adam", 1e-3, fused=True),
    "adamw": Kind("AdamW", 1e-3, decay=0.01, fused=True),
    "nadam": Kind("NAdam", 2e-3),
    "rmsprop": Kind("RMSprop", 1e-3, ("momentum", "alpha", "eps")),
    "adagrad": Kind("Adagrad", 0.01, ("eps",), fused=True),
    "adafactor": Kind("Adafactor", 0.01, ()),
    "muon": OwnMuon("", 3e-3, ("momentum", "betas", "eps"), decay=0.01, momentum=0.95),
    "schedule_free": OwnScheduleFree("", 3e-3, decay=0.01),
    "schedule_free_sgd": OwnScheduleFree("", 1.0, also=(("adaptive", False),)),
    "lion": Kind("Lion", 1e-4, ("betas",), decay=0.1, betas=(0.9, 0.99), extra=True),
    "soap": Kind("SOAP", 3e-3, decay=0.01, betas=(0.95, 0.95), extra=True),
    "adan": Kind("Adan", 1e-3, decay=0.01, betas=(0.98, 0.92, 0.99), extra=True),
    "prodigy": Kind("Prodigy", 1.0, decay=0.01, extra=True),
}
