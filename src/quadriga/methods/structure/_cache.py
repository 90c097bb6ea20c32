"""A teacher's answers to the examples of one split, computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, Tree, primary, tensors
from quadriga.core.data import Data
from quadriga.core.slots import Hook
from quadriga.methods.structure._teacher import Teacher, refusal

LIMIT = 2 * 2**30  # bytes of answers
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LEAVE = "leave out cache or the transforms"


def fingerprints(inputs: Tree) -> Tensor:
    """A number for each example's bits, equal on every device and in every memory format: [batch] int64.

    Args:
        inputs: a tree of tensors [batch, ...].

    Example:
        >>> row = torch.rand(3, 4)
        >>> fingerprints(row).equal(fingerprints(row.clone())), bool((fingerprints(row) == fingerprints(row.flip(1))).any())
        (True, False)
    """
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors(inputs):
        bits = tensor.detach().reshape(len(tensor), -1).contiguous()
        place = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x1E3779B97F4A7C15
        place = (place ^ (place >> 29)) * 0x3F58476D1CE4E5B9
        total = total.to(bits.device) * 31 + (bits.view(INTEGERS[bits.element_size()]) * place).sum(1)
    return total


class Cache:
    """The teacher's logits by example index, while a train step runs; outside of one, the teacher is asked each time.

    They are computed when they are first needed, for the neighbours in the split too: the groups are the same in every
    run, so that an answer does not depend on the batch that asked first (the last bits of a matrix product depend on
    a row's place), and a resumed run has the bits of a straight one.

    Args:
        teacher: whose answers.
        step: the name of the step, for refusals.
    """

    def __init__(self, teacher: Teacher, step: str) -> None:
        self.teacher, self.step = teacher, step
        self.data: Data | None = None

    def hook(self, model: nn.Module) -> Hook:
        """For one train step."""
        return Keeping(self)

    @contextmanager
    def over(self, data: Data) -> Iterator[None]:
        """Keep answers to the examples of a split."""
        self.data, self.size, self.known = data, 0, torch.zeros(len(data), dtype=torch.bool)
        self.rows, self.marks = torch.empty(0), torch.empty(0, dtype=torch.int64)
        try:
            yield
        finally:
            self.data, self.rows = None, torch.empty(0)

    def __call__(self, batch: Batch) -> Tensor:
        """The teacher's logits for a batch.

        Raises:
            NotApplicable: its inputs are not those of the split that its index names, or all answers would not fit.
        """
        if self.data is None:
            return primary(self.teacher(batch.inputs))
        if batch.augmented:
            raise refusal(self.step, "the inputs are augmented, so answers to them cannot be kept", LEAVE)
        self._check_index(batch, len(self.data))
        self._fill(batch, self.data)
        if bool((self.marks[batch.index] != fingerprints(batch.inputs)).any()):
            reason = "the inputs of an example change from one reading to the next, so answers to them cannot be kept"
            raise refusal(self.step, reason, "leave out cache, or what the data set draws or pads at random")
        return self.rows[batch.index]

    def _check_index(self, batch: Batch, length: int) -> None:
        low, high = batch.index.aminmax()
        if int(low) < 0 or int(high) >= length:
            reason = f"the batch names the examples {int(low)} to {int(high)} of a split of {length}"
            raise refusal(self.step, reason, "leave out cache")

    def _fill(self, batch: Batch, data: Data) -> None:
        self.size = self.size or len(batch)
        index = batch.index.cpu()
        for group in (index[~self.known[index]] // self.size).unique().tolist():
            first = group * self.size
            places = torch.arange(first, first + self.size) % len(data)  # a full group, whose last rows may be no news
            asked = data.batch(places).to(batch.index.device)
            own = slice(first, min(first + self.size, len(data)))
            self._keep(own, primary(self.teacher(asked.inputs)), fingerprints(asked.inputs))

    def _keep(self, own: slice, answers: Tensor, marks: Tensor) -> None:
        if len(self.rows) == 0:
            self._reserve(answers)
        if answers.shape[1:] != self.rows.shape[1:]:
            shapes = f"{tuple(self.rows.shape[1:])} and {tuple(answers.shape[1:])}"
            reason = f"the teacher's answers have the shapes {shapes}, which cannot be kept together"
            raise refusal(self.step, reason, "leave out cache")
        count = own.stop - own.start
        self.rows[own], self.marks[own], self.known[own] = answers[:count], marks[:count], True

    def _reserve(self, answers: Tensor) -> None:
        need = len(self.known) * answers[0].numel() * answers.element_size()
        if need > LIMIT:
            reason = f"the teacher's answers to {len(self.known)} examples take {need / 2**30:.1f} GiB, over {LIMIT / 2**30:g}"
            raise refusal(self.step, reason, "leave out cache")
        self.rows = answers.new_empty((len(self.known), *answers.shape[1:]))
        self.marks = torch.empty(len(self.known), dtype=torch.int64, device=answers.device)


class Keeping(Hook):
    """Lets a cache keep answers during one train step."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def train(self, model: nn.Module, data: Data) -> AbstractContextManager[Any]:
        return self.cache.over(data)
