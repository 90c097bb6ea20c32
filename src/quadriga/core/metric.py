"""Losses and metrics that return one value per example, so that models can be compared in pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quadriga.core.batch import Batch, Tree, primary
from quadriga.core.classes import class_dim
from quadriga.core.errors import BadInput

Loss = Callable[[Tree, Batch], Tensor]  # (output, batch) -> [batch] losses, or a scalar


@dataclass(frozen=True)
class Metric:
    """A task's quality. The value of a split is `scale · Σ weight·value / Σ weight`.

    Args:
        name: "accuracy", …
        unit: "pt" for percentage points, "bits/byte", …
        higher_is_better: its direction.
        examples: (output, batch) → (values [batch], weights [batch]); None for a set metric.
        whole: (outputs, targets) → number, for a metric of the whole split (F1, mAP); bootstrapped over examples.
            A user's callable may also return [n] values, which are then compared in pairs.
        scale: 100 turns fractions into points.
        predict: output → [batch] discrete predictions, for the rate of disagreement; None where there are none.
        guess: targets → (the unscaled value of the best answer that is the same for every input, that answer in words);
            None where it is not known.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    examples: Callable[[Tree, Batch], tuple[Tensor, Tensor]] | None = None
    whole: Callable[[Any, Any], float] | None = None
    scale: float = 1.0
    predict: Callable[[Tree], Tensor] | None = None
    guess: Callable[[Tree], tuple[float, str]] | None = None

    def gain(self, value: float, reference: float) -> float:
        """The difference with the sign turned so that positive is better."""
        return value - reference if self.higher_is_better else reference - value


@dataclass(frozen=True)
class Floor:
    """How much quality may be lost: `-0.5pt` (points of the metric) or `-0.5%rel` (of the baseline's value).

    Example:
        >>> Floor.parse("-0.5pt").margin(88.0), Floor.parse("-1%rel").margin(2.0)
        (0.5, 0.02)
    """

    amount: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Read `-0.5pt` or `-0.5%rel`.

        Raises:
            BadInput: another form, or a unit is missing.
        """
        match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*(pt|%rel)\s*", str(text))
        if not match:
            raise BadInput(f"the floor is {text!r}", "give a loss with its unit, such as -0.5pt or -0.5%rel")
        return cls(-float(match[1]), match[2] == "%rel")

    def margin(self, baseline: float) -> float:
        """The loss allowed, in the metric's unit; negative when a gain is demanded."""
        return self.amount * (abs(baseline) / 100 if self.relative else 1.0)

    def __str__(self) -> str:
        return f"{-self.amount:+g}{'%rel' if self.relative else 'pt'}"


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy per example [batch], in nats.

    Logits [batch, classes] with targets [batch] int64 or [batch, classes] float (soft); or logits
    [batch, classes, positions…] or [batch, positions…, classes] with [batch, positions…] int64, or soft ones of the logits'
    shape, averaged over positions (−100 is ignored).

    Args:
        classes_dim: 1 or −1, the dimension of the classes; None: told from the shapes.

    Raises:
        BadInput: the shapes do not fit, or fit both ways and `classes_dim` is None.
    """

    classes_dim: int | None = None

    def __call__(self, output: Tree, batch: Batch) -> Tensor:
        logits, target = primary(output), batch.target
        if logits.dim() <= 2:
            return functional.cross_entropy(logits, target, reduction="none")
        losses, valid = nats(logits, target, self.classes_dim)
        return (losses * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp_min(1)


cross_entropy = CrossEntropy()


def nats(logits: Tensor, target: Tensor, classes_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position [batch, positions…], and 1 where it counts, 0 where the target is −100.

    Args:
        logits: [batch, classes, positions…] or [batch, positions…, classes].
        target: [batch, positions…] int64, or probabilities of the logits' shape.
        classes_dim: 1 or −1; None: told from the shapes.

    Raises:
        BadInput: see `class_dim`.
    """
    soft = target.is_floating_point()
    dim = class_dim(logits.shape, target.shape, classes_dim, soft=soft)
    if soft:
        losses = functional.cross_entropy(logits.movedim(dim, 1), target.movedim(dim, 1), reduction="none")
        return losses, torch.ones_like(losses)
    if dim == 1:
        losses = functional.cross_entropy(logits, target, reduction="none")
    else:
        losses = functional.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
    return losses, (target != -100).to(losses.dtype)


def squared_error(output: Tree, batch: Batch) -> Tensor:
    """Mean squared error per example [batch]; output and target need equal shapes, since broadcasting hides mistakes."""
    values = primary(output)
    if values.shape != batch.target.shape:
        raise BadInput(f"outputs {tuple(values.shape)} and targets {tuple(batch.target.shape)} differ", "give equal shapes")
    return (values - batch.target).square().flatten(1).mean(1) if values.dim() > 1 else (values - batch.target).square()


@dataclass(frozen=True)
class Correct:
    """(1 where the highest score is the target's, 1 for each example): [batch], or means over positions; −100 is ignored.

    Args:
        classes_dim: as of `CrossEntropy`.
    """

    classes_dim: int | None = None

    def __call__(self, output: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, target = primary(output), batch.target
        hit = (logits.argmax(class_dim(logits.shape, target.shape, self.classes_dim)) == target).double()
        valid = (target != -100).double()
        counts = valid.flatten(1).sum(1) if valid.dim() > 1 else valid
        return (hit * valid).flatten(1).sum(1) / counts.clamp_min(1) if hit.dim() > 1 else hit, (counts > 0).double()


def predicted(output: Tree) -> Tensor:
    """The class of each example [batch], of scores [batch, classes]; nothing [0] where there are several positions."""
    scores = primary(output)
    return scores.argmax(-1) if scores.dim() == 2 else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Bits:
    """(bits per position that counts, their number) of each example: [batch] each.

    Args:
        classes_dim: as of `CrossEntropy`.
    """

    classes_dim: int | None = None

    def __call__(self, output: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        losses, valid = nats(primary(output).float(), batch.target, self.classes_dim)
        count = valid.flatten(1).sum(1).double()
        return (losses * valid).double().flatten(1).sum(1) / count.clamp_min(1) / math.log(2), count


def _majority(target: Tree) -> tuple[float, str]:
    classes, counts = target[target != -100].unique(return_counts=True)
    return int(counts.max()) / int(counts.sum()), f"always class {classes[counts.argmax()].item()}"


def _unigram(target: Tree) -> tuple[float, str]:
    share = target[target != -100].unique(return_counts=True)[1].double()
    share = share / share.sum()
    return float(-(share * share.log2()).sum()), "how often each target occurs"


def _mean(target: Tree) -> tuple[float, str]:
    values = target.double()
    return float((values - values.mean(0)).square().mean()), "the targets' mean"


accuracy = Metric("accuracy", "pt", True, Correct(), scale=100.0, predict=predicted, guess=_majority)
bits_per_byte = Metric("bits_per_byte", "bits/byte", False, Bits(), predict=None, guess=_unigram)
mean_squared_error = Metric(
    "mean_squared_error", "", False, lambda o, b: (e := squared_error(o, b).double(), torch.ones_like(e)), guess=_mean
)

METRICS = {m.name: m for m in (accuracy, bits_per_byte, mean_squared_error)}
LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "squared_error": squared_error}


def reads_classes(function: object) -> bool:
    """Whether a loss, or a metric's `examples`, is one of those here that read scores of classes."""
    return isinstance(function, CrossEntropy | Correct | Bits)


def laid_out(function: Any, classes_dim: int | None) -> Any:
    """A loss or a metric for outputs whose classes are in that dimension; a user's own as it is.

    Example:
        >>> laid_out(accuracy, 1).examples
        Correct(classes_dim=1)
    """
    if isinstance(function, Metric):
        return replace(function, examples=laid_out(function.examples, classes_dim))
    return replace(function, classes_dim=classes_dim) if reads_classes(function) else function
