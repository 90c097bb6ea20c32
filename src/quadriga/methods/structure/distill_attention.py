"""Attention distillation: attend to what the teacher attends to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from quadriga.core.batch import Batch, Tree
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._attend import Attention, attention_distance, overheard
from quadriga.methods.structure._taps import Pair, at_depth, caught, pairs, tapped
from quadriga.methods.structure._teacher import (
    Teacher,
    Term,
    add_term,
    needed,
    refusal,
    teacher_of,
    trial,
    visible,
)


def map_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """For each example the squared distance of two spatial attention maps Σ_c a_c², each scaled to length 1.

    Args:
        student, teacher: feature maps [batch, channels, height, width], of one height and width.

    Returns:
        [batch], from 0 to 2.

    Example:
        >>> maps = torch.randn(2, 3, 4, 4)
        >>> map_distance(maps, -2 * maps.roll(1, dims=1)).max().item() < 1e-9
        True
    """
    mine, theirs = (normalize(a.float().square().sum(1).flatten(1), dim=1) for a in (student, teacher))
    return (mine - theirs).square().sum(1)


def matched(student: list[Attention], teacher: list[Attention], layers: str) -> list[tuple[Attention, Attention]]:
    """Attentions that belong together: of equal lengths, at the same relative depth among those.

    Args:
        student, teacher: in order of their calls.
        layers: "last" (of the student's) or "all".
    """
    found = []
    for one in student if layers == "all" else student[-1:]:
        mine, theirs = ([a for a in made if a.lengths == one.lengths] for made in (student, teacher))
        if theirs:
            place = next(i for i, a in enumerate(mine) if a is one)
            found.append((one, theirs[at_depth(place, len(mine), len(theirs))]))
    return found


@dataclass(frozen=True, kw_only=True)
class DistillAttention(Method):
    """Add to the loss how far the network's attention is from the teacher's: loss + b · mean distance over some layers.

    In transformers KL(teacher ‖ student) of attention weights plus that of value relations softmax(V Vᵀ), seen where
    `scaled_dot_product_attention` is called; in convolutional networks the squared distance of the maps Σ_c a_c², scaled
    to length 1, where sizes are equal. Stands before a `train` step and acts in it; later steps may still prune the
    network. Distillation is not free: that of logits lost 0.1 to 0.4 points in six epochs of a LeNet, and each batch
    costs a forward pass of the teacher.

    Args:
        layers: "last" (the last attention, or the last feature map) or "all" (each, or the last map of each size).
        beta: b, above 0.
        teacher: "baseline" (the trained baseline) or "present" (a frozen copy of the network as it stands at this step).

    Source: Wang et al. 2020, MiniLM, arXiv:2002.10957 (last layer, values); Jiao et al. 2020, TinyBERT,
    arXiv:1909.10351 (all layers); Zagoruyko & Komodakis 2017, arXiv:1612.03928 (maps).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:2002.10957"
    writes = frozenset({"training"})
    shapes = False
    requires = frozenset({"TEACHER", "TRAIN_DATA"})
    search: ClassVar = {"layers": ("last", "all"), "beta": (1.0, 10.0)}

    layers: Literal["last", "all"] = "last"
    beta: float = 1.0
    teacher: Literal["baseline", "present"] = "baseline"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise BadInput(f"distill_attention.beta is {self.beta!r}", "give a number above 0")

    def needs(self) -> frozenset[str]:
        return needed(self.requires, self.teacher)

    def apply(self, setup: Setup) -> Setup:
        if setup.runtime.compile or setup.context.runtime.compile:
            raise NotApplicable("compile hides the calls of attention in the forward pass", "leave out compile")
        teacher, example = teacher_of(setup, self.teacher), setup.context.example
        if not self.attends(setup.model, teacher.model, example):
            self.maps(setup.model, teacher.model, example)  # what cannot be is refused now
        return add_term(setup, teacher, self.beta, lambda model: self.listen(model, teacher, example))

    def attends(self, student: nn.Module, teacher: nn.Module, example: Tree) -> bool:
        """Whether there are attentions to compare. Raises NotApplicable if both have some that do not fit."""
        made = []
        for model in (student, teacher):
            with overheard(model) as calls:
                trial(model, example)
            made.append(list(calls))
        if all(made) and not matched(made[0], made[1], self.layers):
            lengths = [made[0][-1].lengths, made[1][-1].lengths]
            kind = type(student).__name__
            raise refusal(
                self.name, f"the last attention of {kind} has the queries and keys {lengths[0]}, its teacher's {lengths[1]}"
            )
        return all(made)

    def maps(self, student: nn.Module, teacher: nn.Module, example: Tree) -> list[Pair]:
        """The feature maps to compare. Raises NotApplicable where there are none, or sizes differ."""
        images = [p for p in pairs(student, teacher, example) if all(len(s) == 4 and s[2] * s[3] > 1 for s in p.shapes)]
        equal = {p.shapes[0][2:]: p for p in images if p.shapes[0][2:] == p.shapes[1][2:]}  # the last of each size
        if not images:
            kind = type(student).__name__
            reason = f"there is no attention in {kind}: no call of scaled_dot_product_attention, and no feature map"
            raise refusal(self.name, reason, "distill or distill_features may do")
        if not equal:
            raise refusal(self.name, f"there are no feature maps of one size: {images[-1]}", "distill_features may do")
        return list(equal.values()) if self.layers == "all" else list(equal.values())[-1:]

    @contextmanager
    def listen(self, model: nn.Module, teacher: Teacher, example: Tree) -> Iterator[Term]:
        """Catch the model's attention; gives the term of the last forward pass."""
        if self.attends(model, teacher.model, example):
            with overheard(model) as made:
                yield lambda teacher, batch: self.divergence(made, teacher, batch)
        else:
            chosen = self.maps(model, teacher.model, example)
            with tapped(model, [p.student for p in chosen]) as seen:
                yield lambda teacher, batch: self.difference(seen, chosen, teacher, batch)

    def divergence(self, made: list[Attention], teacher: Teacher, batch: Batch) -> Tensor:
        """[batch], averaged over attentions and over the queries that are no padding."""
        mine = list(made)
        made.clear()  # else the graph would live until the next pass
        with overheard(teacher.model) as theirs:
            teacher(batch.inputs)
        found = matched(mine, theirs, self.layers)
        if not found:
            raise refusal(self.name, "no attention was seen in this forward pass", "leave it out")
        return torch.stack([_mean(attention_distance(*two), batch) for two in found]).mean(0)

    def difference(self, seen: dict[str, Tensor], chosen: list[Pair], teacher: Teacher, batch: Batch) -> Tensor:
        """[batch], averaged over feature maps."""
        mine = caught(seen, [p.student for p in chosen], self.name)
        with tapped(teacher.model, [p.teacher for p in chosen]) as theirs:
            teacher(batch.inputs)
        return torch.stack([map_distance(mine[p.student], theirs[p.teacher]) for p in chosen]).mean(0)


def _mean(values: Tensor, batch: Batch) -> Tensor:
    """[batch] of values [batch or more, queries]: windows of one example count as its queries."""
    mask = visible(batch.inputs)
    if mask is None or mask.shape != values.shape:
        return values.reshape(len(batch), -1).mean(1)
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)
