"""Knowledge distillation: learn from a teacher's softened answers as well as from the labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from quadriga.core.batch import Batch, Tree, call, device_of, evaluating, primary, to_device
from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher/T ‖ student/T) per example.

    The factor T² keeps the gradient's size; as T grows it tends to half the squared distance of the centred logits / classes.

    Args:
        student, teacher: logits [batch, classes].
        temperature: T > 0.

    Returns:
        [batch], in nats.
    """
    p, q = log_softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)
    return temperature**2 * kl_div(q, p, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Distill(Method):
    """Mix the loss with the divergence from the teacher: (1 − a) loss + a T² KL(teacher/T ‖ student/T).

    The teacher (the trained baseline) sees the same inputs, after all batch transforms, in evaluation mode and without
    gradients. Stands before a `train` step.

    Args:
        temperature: T, above 0.
        alpha: a, in [0, 1].

    Source: Hinton et al. 2015, arXiv:1503.02531; Beyer et al. 2022, arXiv:2106.05237 (same view, long schedule).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1503.02531"
    writes = frozenset({"training"})
    requires = frozenset({"TEACHER", "CLASSES", "TRAIN_DATA"})
    search: ClassVar = {"temperature": (2.0, 4.0), "alpha": (0.5, 0.9)}

    temperature: float = 2.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise BadInput(f"distill.temperature is {self.temperature!r}", "give a number above 0")
        if not 0 <= self.alpha <= 1:
            raise BadInput(f"distill.alpha is {self.alpha!r}", "give a number from 0 to 1")

    def apply(self, setup: Setup) -> Setup:
        inner, teacher = setup.training.loss, setup.context.teacher  # wrapped, not replaced
        assert teacher is not None, "TEACHER was promised"

        def loss(output: Tree, batch: Batch) -> Tensor:  # returns [batch]
            plain = inner(output, batch)
            if self.alpha == 0:
                return plain
            logits = primary(output)
            soft = soft_divergence(logits, answers(teacher, batch.inputs).to(logits.device), self.temperature)
            return (1 - self.alpha) * plain + self.alpha * soft

        return replace(setup, training=replace(setup.training, loss=loss))


def answers(teacher: nn.Module, inputs: Tree) -> Tensor:
    """The teacher's logits [batch, classes], in evaluation mode, without gradients; its mode is given back."""
    with evaluating(teacher), torch.no_grad():
        return primary(call(teacher, to_device(inputs, device_of(teacher))))
