"""One training step as the runtime executes it: forward, reduced loss, backward; and the settings around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, Tree, call, device_of, tree_map
from quadriga.core.errors import BadInput
from quadriga.core.metric import Loss
from quadriga.core.setup import RuntimeSpec, Setup


def reduce(losses: Tensor, batch: Batch) -> Tensor:
    """Σ weight·loss / Σ weight of per-example losses [batch]; a scalar loss is taken as it is.

    Raises:
        BadInput: the loss has another shape.

    Example:
        >>> batch = Batch(None, None, torch.arange(2), torch.tensor([1.0, 3.0]))
        >>> float(reduce(torch.tensor([4.0, 8.0]), batch))
        7.0
    """
    if losses.dim() == 0:
        return losses
    if losses.shape != batch.index.shape:
        problem = f"the loss returned the shape {tuple(losses.shape)} for {len(batch)} examples"
        raise BadInput(problem, "return one value per example, or one number")
    return losses.mean() if batch.weight is None else (batch.weight * losses).sum() / batch.weight.sum()


class Runner:
    """How the runtime slot executes training: `forward_backward`, and where batches have to be.

    Args:
        model: trained in place.
        loss: (output, batch) → [batch] or scalar.
        spec: the runtime slot.
    """

    def __init__(self, model: nn.Module, loss: Loss, spec: RuntimeSpec) -> None:
        self.loss, self.device, self.channels_last = loss, torch.device(spec.device), spec.channels_last
        self.forward: Any = torch.compile(model) if spec.compile else model

    def forward_backward(self, batch: Batch) -> Tensor:
        """Add the gradients of the reduced loss to the parameters' and return the loss, detached."""
        loss = reduce(self.loss(call(self.forward, batch.inputs), batch), batch)
        loss.backward()
        return loss.detach()

    def place(self, batch: Batch) -> Batch:
        """The batch on the runtime's device."""
        return batch.to(self.device)

    def layout(self, batch: Batch) -> Batch:
        """The batch with 4-d inputs in the runtime's memory format."""
        return replace(batch, inputs=to_channels_last(batch.inputs)) if self.channels_last else batch


def to_channels_last(inputs: Tree) -> Tree:
    """4-d tensors of a tree as channels-last; others as they are."""
    return tree_map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, inputs)


@contextmanager
def entered(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """All of them at once, entered in order and left in reverse, however it ends."""
    with ExitStack() as stack:
        for one in contexts:
            stack.enter_context(one)
        yield


@contextmanager
def settings(spec: RuntimeSpec) -> Iterator[None]:
    """The process-wide settings of a runtime slot, put back afterwards: threads and matmul precision."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        torch.set_float32_matmul_precision(spec.matmul)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@contextmanager
def prepared(setup: Setup) -> Iterator[Runner]:
    """The model in training mode, on the device and in the memory format of the runtime slot, with its settings.

    Mode and device are put back afterwards; the memory format stays, it changes no value.
    """
    model, spec = setup.model, setup.runtime
    home, was = device_of(model), model.training
    with settings(spec):
        model.to(spec.device)
        if spec.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            yield Runner(model.train(), setup.training.loss, spec)
        finally:
            model.zero_grad(set_to_none=True)
            model.to(home).train(was)
