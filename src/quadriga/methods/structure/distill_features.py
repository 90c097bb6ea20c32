"""Feature distillation: hidden layers learn from the teacher's hidden layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from quadriga.core.batch import Batch, Tree
from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._taps import Pair, caught, pairs, spread, tapped
from quadriga.methods.structure._teacher import (
    Teacher,
    Term,
    add_term,
    needed,
    refusal,
    teacher_of,
    visible,
)


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """For each example, how differently two layers see its likeness to the others of the batch.

    The rows of the Gram matrices F Fᵀ are scaled to length 1 and their squared distances summed: what is left does not
    depend on widths, nor on a rotation or the scale of the features. (The paper divides by batch², this by batch.)

    Args:
        student, teacher: [batch, ...], of any widths.

    Returns:
        [batch], from 0 to 4.

    Example:
        >>> features = torch.randn(5, 3)
        >>> bool((gram_distance(features, 2 * features.roll(1, dims=1)) < 1e-9).all())
        True
    """
    mine, theirs = (_likeness(f) for f in (student, teacher))
    return (mine - theirs).square().sum(1)


def _likeness(features: Tensor) -> Tensor:
    rows = features.flatten(1).float()
    return normalize(rows @ rows.T, dim=1)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two layers for each example, divided by the teacher's mean square in the batch.

    Args:
        student, teacher: [batch, ...], of one shape.

    Returns:
        [batch], 0 or more; 1 on average for a student that is silent.
    """
    error = (student.float() - teacher.float()).square().flatten(1).mean(1)
    return error / teacher.float().square().mean().clamp_min(1e-12)


DISTANCES = {"gram": gram_distance, "mse": relative_error}


@dataclass(frozen=True, kw_only=True)
class DistillFeatures(Method):
    """Add to the loss how far hidden layers are from the teacher's: loss + b · mean distance over some layers.

    Layers belong together by name, blocks of lists of unequal length by relative depth. The teacher sees the same
    inputs, in evaluation mode and without gradients. Stands before a `train` step and acts in it; later steps may still
    prune the network. Distillation is not free: that of logits lost 0.1 to 0.4 points in six epochs of a LeNet, and each
    batch costs a forward pass of the teacher.

    Args:
        kind: "gram" (likenesses between the examples of a batch: any widths) or "mse" (squared differences: equal shapes).
        beta: b, above 0.
        count: how many layers, evenly spaced, when `only` is "*".
        only: layers to compare, all that match: globs of names, comma-separated.
        teacher: "baseline" (the trained baseline) or "present" (a frozen copy of the network as it stands at this step).

    Source: Tung & Mori 2019, arXiv:1907.09682 (gram); Romero et al. 2015, FitNets, arXiv:1412.6550 (mse, without its
    learned projection).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1907.09682"
    writes = frozenset({"training"})
    shapes = False
    requires = frozenset({"TEACHER", "TRAIN_DATA"})
    search: ClassVar = {"kind": ("gram", "mse"), "beta": (1.0, 10.0)}

    kind: Literal["gram", "mse"] = "gram"
    beta: float = 1.0
    count: int = 3
    only: str = "*"
    teacher: Literal["baseline", "present"] = "baseline"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise BadInput(f"distill_features.beta is {self.beta!r}", "give a number above 0")
        if self.count < 1:
            raise BadInput(f"distill_features.count is {self.count!r}", "give at least 1")

    def needs(self) -> frozenset[str]:
        return needed(self.requires, self.teacher)

    def apply(self, setup: Setup) -> Setup:
        teacher, example = teacher_of(setup, self.teacher), setup.context.example
        self.chosen(setup.model, teacher.model, example)  # what cannot be is refused now
        return add_term(setup, teacher, self.beta, lambda model: self.listen(model, teacher, example))

    def chosen(self, student: nn.Module, teacher: nn.Module, example: Tree) -> list[Pair]:
        """The layers to compare. Raises NotApplicable where there are none, or shapes differ that may not."""
        found = pairs(student, teacher, example, self.only)
        if not found:
            what = "hidden layer" if self.only == "*" else f'layer that matches "{self.only}" and'
            raise refusal(self.name, f"there is no {what} with one row per example in both networks", "name layers by only")
        if self.kind == "mse":
            equal = [p for p in found if p.shapes[0] == p.shapes[1]]
            if not equal or (self.only != "*" and len(equal) < len(found)):
                odd = next(p for p in found if p not in equal)
                raise refusal(self.name, f"shapes differ: {odd}", 'use kind = "gram"')
            found = equal
        return found if self.only != "*" else spread(found, self.count)

    @contextmanager
    def listen(self, model: nn.Module, teacher: Teacher, example: Tree) -> Iterator[Term]:
        """Catch the model's layers; gives the term of the last forward pass."""
        chosen = self.chosen(model, teacher.model, example)
        names = [p.student for p in chosen]
        with tapped(model, names) as seen:

            def term(teacher: Teacher, batch: Batch) -> Tensor:
                mine = caught(seen, names, self.name)
                with tapped(teacher.model, [p.teacher for p in chosen]) as theirs:
                    teacher(batch.inputs)
                parts = [self.distance(mine[p.student], theirs[p.teacher], batch) for p in chosen]
                return torch.stack(parts).mean(0)

            yield term

    def distance(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """[batch], padding left out."""
        mask = visible(batch.inputs)
        if mask is not None and student.dim() == 3 and student.shape[:2] == teacher.shape[:2] == mask.shape:
            student, teacher = student * mask[..., None], teacher * mask[..., None]
        return DISTANCES[self.kind](student, teacher)
