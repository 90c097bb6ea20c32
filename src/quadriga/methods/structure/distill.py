"""Knowledge distillation: learn from a teacher's softened answers as well as from the labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from quadriga.core.batch import Batch, Tree, primary
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._cache import LEAVE, Cache
from quadriga.methods.structure._teacher import needed, teacher_of

IGNORED = -100  # the target of positions that losses pass over


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher/T ‖ student/T) per position.

    The factor T² keeps the gradient's size; as T grows it tends to half the squared distance of the centred logits / classes.

    Args:
        student, teacher: logits [batch, ..., classes].
        temperature: T > 0.

    Returns:
        [batch, ...], in nats.

    Example:
        >>> float(soft_divergence(torch.zeros(1, 2), torch.zeros(1, 2) + 3.0, 2.0))
        0.0
    """
    p, q = log_softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)
    return temperature**2 * kl_div(q, p, reduction="none", log_target=True).sum(-1)


def per_example(values: Tensor, target: Tree) -> Tensor:
    """Values [batch, ...] averaged over the positions of each example, but for those whose integer target is −100.

    Example:
        >>> per_example(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[0, 1], [2, -100]])).tolist()
        [2.0, 5.0]
    """
    if values.dim() == 1:
        return values
    told = isinstance(target, Tensor) and not target.is_floating_point() and target.shape == values.shape
    counted = (target != IGNORED).to(values.dtype) if told else torch.ones_like(values)
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class Distill(Method):
    """Mix the loss with the divergence from the teacher: (1 − a) loss + a T² KL(teacher/T ‖ student/T).

    The teacher sees the same inputs, after all batch transforms, in evaluation mode and without gradients; for sequences
    the divergence is averaged over the positions of an example. Stands before a `train` step. It is not free: six epochs of
    a LeNet lost 0.1 to 0.4 points by it (T = 3, a = 0.7), and each batch costs a forward pass of the teacher.

    Args:
        temperature: T, above 0.
        alpha: a, in [0, 1].
        teacher: "baseline" (the trained baseline) or "present" (a frozen copy of the network as it stands at this step,
            such as a larger one that the recipe trained before it and prunes after it).
        cache: ask the teacher once for each example and keep its answers, at most 2 GiB of them; it pays from the
            second epoch on, and is refused where inputs are augmented.

    Source: Hinton et al. 2015, arXiv:1503.02531; Beyer et al. 2022, arXiv:2106.05237 (same view, long schedule).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1503.02531"
    writes = frozenset({"training"})
    shapes = False
    requires = frozenset({"TEACHER", "LOGITS", "TRAIN_DATA"})
    search: ClassVar = {"temperature": (2.0, 4.0), "alpha": (0.5, 0.9)}

    temperature: float = 2.0
    alpha: float = 0.5
    teacher: Literal["baseline", "present"] = "baseline"
    cache: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise BadInput(f"distill.temperature is {self.temperature!r}", "give a number above 0")
        if not 0 <= self.alpha <= 1:
            raise BadInput(f"distill.alpha is {self.alpha!r}", "give a number from 0 to 1")

    def needs(self) -> frozenset[str]:
        return needed(self.requires, self.teacher)

    def apply(self, setup: Setup) -> Setup:
        if self.cache and setup.training.transforms:
            raise NotApplicable("the inputs are augmented, so the teacher's answers to them cannot be kept", LEAVE)
        inner, teacher = setup.training.loss, teacher_of(setup, self.teacher)  # wrapped, not replaced
        cache, dim = Cache(teacher, self.name) if self.cache else None, setup.context.classes_dim
        assert dim is not None, "LOGITS was promised"

        def loss(output: Tree, batch: Batch) -> Tensor:  # returns [batch]
            plain = inner(output, batch)
            if self.alpha == 0:
                return plain
            wanted = primary(teacher(batch.inputs)) if cache is None else cache(batch)
            scores = [t.movedim(dim, -1) for t in (primary(output), wanted)]
            soft = soft_divergence(scores[0], scores[1], self.temperature)
            return (1 - self.alpha) * plain + self.alpha * per_example(soft, batch.target)

        hooks = setup.training.make_hooks if cache is None else (*setup.training.make_hooks, cache.hook)
        return replace(setup, training=replace(setup.training, loss=loss, make_hooks=hooks))
