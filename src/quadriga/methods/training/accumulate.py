"""Gradient accumulation: a batch is worked off in parts whose gradients add up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Training


def in_parts(training: Training, steps: int, keep_batch: bool) -> Training:
    """The training slot whose batches are `steps` times as large, in parts as before; or as large, in so many parts.

    Example:
        >>> one = Training(lambda output, batch: output, batch_size=20)
        >>> [(t.batch_size, t.micro) for t in (in_parts(one, 3, False), in_parts(one, 3, True))]
        [(60, 20), (20, 7)]
    """
    part = min(training.batch_size, training.micro or training.batch_size)
    if keep_batch:
        return replace(training, micro=-(-part // steps))
    return replace(training, micro=part, batch_size=training.batch_size * steps)


@dataclass(frozen=True, kw_only=True)
class Accumulate(Method):
    """Take a step of the optimizer with the gradients of several parts of a batch, for a larger batch than memory holds.

    The gradient is that of the whole batch, a ragged last part and weighted examples included, since each part counts by its
    weight in the batch. Exceptions are what looks at a part alone: batch normalization takes its statistics over it, dropout
    draws for it. A loss that is already a mean over the batch does not tell how much each example weighed in it, so that
    ragged parts would count wrongly: therefore one loss per example is required. Transforms see the whole batch. Twice, the
    numbers multiply.

    The learning rate is left alone; with fewer, larger steps a larger one is usual.

    Args:
        steps: number of parts, at least 2.
        keep_batch: the batch stays as it is and is cut into `steps` parts, which saves memory and changes nothing else; by
            default the parts stay as large as the batch was, and the batch grows.

    Source: Ott et al. 2018, arXiv:1806.00187, section 3.2 (as "delayed updates"); Goyal et al. 2017, arXiv:1706.02677, section
    3.1 (large batches by weighted sums of gradients).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1806.00187, arXiv:1706.02677"
    search: ClassVar = {"steps": (2, 4, 8)}
    requires = frozenset({"PER_EXAMPLE_LOSS", "TRAIN_DATA"})

    steps: int = 2
    keep_batch: bool = False

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise BadInput(f"accumulate.steps is {self.steps}", "give at least 2 parts")

    def apply(self, setup: Setup) -> Setup:
        before, examples = setup.training, setup.context.examples
        after = in_parts(before, self.steps, self.keep_batch)
        if not self.keep_batch and examples is not None and after.batch_size > examples:
            reason = f"a batch of {self.steps} · {before.batch_size} is larger than the {examples} training examples"
            raise NotApplicable(reason, "lower steps or the batch size, or give keep_batch=True")
        if self.keep_batch and after.micro == min(before.batch_size, before.micro or before.batch_size):
            raise NotApplicable(f"a part of {after.micro} example cannot be cut further", "leave it out")
        return replace(setup, training=after)
