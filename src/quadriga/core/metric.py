"""Losses and metrics that return one value per example, so that models can be compared in pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quadriga.core.batch import Batch, Tree, primary
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


def cross_entropy(output: Tree, batch: Batch) -> Tensor:
    """Cross-entropy per example [batch], in nats.

    Logits [batch, classes] with targets [batch] int64 or [batch, classes] float (soft); or logits
    [batch, positions, classes] with [batch, positions] int64, averaged over positions (−100 is ignored).
    """
    logits, target = primary(output), batch.target
    if logits.dim() <= 2:
        return functional.cross_entropy(logits, target, reduction="none")
    losses = functional.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
    valid = (target != -100).to(losses.dtype)
    return (losses * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp_min(1)


def squared_error(output: Tree, batch: Batch) -> Tensor:
    """Mean squared error per example [batch]; output and target need equal shapes, since broadcasting hides mistakes."""
    values = primary(output)
    if values.shape != batch.target.shape:
        raise BadInput(f"outputs {tuple(values.shape)} and targets {tuple(batch.target.shape)} differ", "give equal shapes")
    return (values - batch.target).square().flatten(1).mean(1) if values.dim() > 1 else (values - batch.target).square()


def argmax(output: Tree) -> Tensor:
    """Predicted classes along the last dimension."""
    return primary(output).argmax(-1)


def _correct(output: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    hit = (argmax(output) == batch.target).double()
    return (hit, torch.ones_like(hit)) if hit.dim() == 1 else (hit.flatten(1).mean(1), torch.ones(len(hit)).double())


def _bits(output: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = primary(output).float()
    nats = functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="none").view(batch.target.shape)
    valid = batch.target != -100
    count = valid.sum(1).double()
    return (nats * valid).double().sum(1) / count.clamp_min(1) / math.log(2), count


def _majority(target: Tree) -> tuple[float, str]:
    classes, counts = target.unique(return_counts=True)
    return int(counts.max()) / target.numel(), f"always class {classes[counts.argmax()].item()}"


def _unigram(target: Tree) -> tuple[float, str]:
    share = target[target != -100].unique(return_counts=True)[1].double()
    share = share / share.sum()
    return float(-(share * share.log2()).sum()), "how often each target occurs"


def _mean(target: Tree) -> tuple[float, str]:
    values = target.double()
    return float((values - values.mean(0)).square().mean()), "the targets' mean"


accuracy = Metric("accuracy", "pt", True, _correct, scale=100.0, predict=argmax, guess=_majority)
bits_per_byte = Metric("bits_per_byte", "bits/byte", False, _bits, predict=None, guess=_unigram)
mean_squared_error = Metric(
    "mean_squared_error", "", False, lambda o, b: (e := squared_error(o, b).double(), torch.ones_like(e)), guess=_mean
)

METRICS = {m.name: m for m in (accuracy, bits_per_byte, mean_squared_error)}
LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "squared_error": squared_error}
