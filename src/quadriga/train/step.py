"""One training step as the runtime executes it: forward, reduced loss, backward; and the settings around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core import rng
from quadriga.core.batch import Batch, Tree, call, device_of, rows, tree_map
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.half import HALF, in_float
from quadriga.core.metric import Loss
from quadriga.core.products import matmul_precision
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, RuntimeSpec
from quadriga.core.spread import local
from quadriga.parallel.recompute import outermost, recomputing
from quadriga.parallel.share import Share
from quadriga.train.checkpoint import State, read_state, save_state
from quadriga.train.state import kept_tensors, optimizer_state
from quadriga.train.transfer import Transfer


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
    check_shape(losses, batch)
    return losses.mean() if batch.weight is None else (batch.weight * losses).sum() / batch.weight.sum()


def check_shape(losses: Tensor, batch: Batch) -> None:
    """Raises BadInput if there is not one loss per example."""
    if losses.shape != batch.index.shape:
        problem = f"the loss returned the shape {tuple(losses.shape)} for {len(batch)} examples"
        raise BadInput(problem, "return one value per example, or one number")


def weight_of(batch: Batch) -> Tensor | int:
    """Σ weight of a batch's examples."""
    return len(batch) if batch.weight is None else batch.weight.sum()


@lru_cache(maxsize=16)
def even(count: int, total: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count] times 1 / total."""
    return torch.full((count,), 1 / total, dtype=dtype, device=device)


def shares(losses: Tensor, part: Batch, whole: Tensor | int) -> Tensor:
    """The factors, of the losses' shape, with which a part's losses add up to the reduced loss of a batch of weight `whole`.

    They are its gradient too, so that backward can start from the losses. Of a part of weight 0 they are 0.

    Example:
        >>> part = Batch(None, None, torch.arange(2), torch.tensor([1.0, 3.0]))
        >>> shares(torch.tensor([4.0, 8.0]), part, 8)
        tensor([0.1250, 0.3750])
    """
    if losses.dim() == 0:
        return torch.ones_like(losses) * (weight_of(part) / whole)
    check_shape(losses, part)
    if part.weight is not None:
        return (part.weight / whole).to(losses.dtype)
    return even(len(part), int(whole), losses.dtype, losses.device)


def parts(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch cut into parts of `size` examples; the last may be smaller."""
    for start in range(0, len(batch), size):
        yield rows(batch, slice(start, start + size))


def named(device: str) -> torch.device:
    """The device with its number, as tensors that lie there say it."""
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


class Runner:
    """How the runtime slot executes training: `forward_backward`, `update`, and where batches have to be.

    Args:
        model: trained in place.
        loss: (output, batch) → [batch] or scalar.
        spec: the runtime slot.
        micro: a larger batch is worked off in parts of at most so many examples.

    Attributes:
        model: what is trained here.
        losses: of the last batch, detached: [batch], or one number of a scalar loss.
        share: the part of a batch that is worked off here.
    """

    def __init__(self, model: nn.Module, loss: Loss, spec: RuntimeSpec, micro: int | None = None) -> None:
        self.model, self.loss, self.device, self.channels_last = model, loss, named(spec.device), spec.channels_last
        self.graphs = spec.compile and spec.compile_mode == "reduce-overhead"
        if self.graphs and micro is not None:
            raise NotApplicable("CUDA graphs overwrite the gradients that accumulate", 'compile with mode = "default"')
        self.forward: Any = torch.compile(model, mode=spec.compile_mode) if spec.compile else model
        self.transfer = Transfer(self.device) if self.device.type == "cuda" else None
        self.micro, self.half = micro, HALF.get(spec.autocast)
        scaled = self.half is torch.float16  # whose smallest number is 6e-8, larger than many gradients
        self.scaler = torch.amp.GradScaler(self.device.type) if scaled else None
        self.losses = torch.empty(0)
        self.share, self.scale = Share(), 1.0  # of a batch that several processes work off; what gradients are averaged over

    def forward_backward(self, batch: Batch) -> Tensor:
        """Add the gradients of the reduced loss to the parameters' and return the loss, detached."""
        whole = weight_of(batch)
        if self.micro is None or len(batch) <= self.micro:
            self.losses, loss = self._backward(batch, whole)
            return loss
        done = [self._backward(part, whole) for part in parts(batch, self.micro)]
        loss = torch.stack([part_of_loss for _, part_of_loss in done]).sum()
        self.losses = torch.cat([losses for losses, _ in done]) if done[0][0].dim() else loss
        return loss

    def _backward(self, part: Batch, whole: Tensor | int) -> tuple[Tensor, Tensor]:
        """A part's losses, and what they add to the reduced loss."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the last step is needed any more
        losses = self._losses(part)
        factors = shares(losses, part, whole)
        start = factors if self.scale == 1 else factors * self.scale
        losses.backward(start if self.scaler is None else self.scaler.scale(start))
        losses = losses.detach().clone() if self.graphs else losses.detach()  # a loss may be the model's own output
        return losses, torch.dot(losses, factors) if losses.dim() else losses * factors

    def _losses(self, batch: Batch) -> Tensor:
        if self.half is None:
            return self.loss(call(self.forward, batch.inputs), batch)
        with torch.autocast(self.device.type, self.half):
            output = call(self.forward, batch.inputs)
        return self.loss(in_float(output), batch)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients in their own scale, before anybody looks at them."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, left out where scaled gradients overflowed; gradients are gone afterwards."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def observed(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The last batch and its losses, for hooks that watch."""
        return batch, self.losses

    def finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(local(p.detach()).isfinite().all()) for p in self.model.parameters())

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, of those that lie here as the weights of their names do."""
        return dict(tensors)

    def evaluated(self) -> AbstractContextManager[nn.Module]:
        """The model as it may be called for an evaluation."""
        return nullcontext(self.model)

    def agreed(self, value: float) -> float:
        """A number that has to be the same in all processes that train together: the first one's."""
        return value

    def kept(self) -> Callable[[], None]:
        """Keep a copy of the weights; what is returned puts them back."""
        return kept_tensors(self.model)

    def generators(self) -> dict[str, Any]:
        """The states of the random generators, of all processes."""
        return rng.capture()

    def restore(self, states: Mapping[str, Any]) -> None:
        """Put back what `generators` gave."""
        rng.restore(states)

    def part(self) -> None:
        """From now on processes that see other examples draw other random numbers."""

    def accept(self, optimizer: torch.optim.Optimizer, hooks: Sequence[Hook]) -> None:
        """Raises NotApplicable if these cannot act on what is trained here."""

    def groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """An optimizer's groups, with names for the parameters."""
        return optimizer_state(self.model, optimizer)["groups"]

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]) -> None:
        """Write a complete state; see `checkpoint.save_state`."""
        save_state(folder, self.model, optimizer, extra)

    def read(self, folder: Path, *, fall_back: bool = False) -> State | None:
        """The state of a folder, which can be loaded into this model; see `checkpoint.read_state`."""
        return read_state(folder, fall_back=fall_back)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        return dict(self.scaler.state_dict()) if self.scaler is not None else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

    def place(self, batch: Batch) -> Batch:
        """The batch on the runtime's device."""
        inputs, target = batch.inputs, batch.target
        plain = isinstance(inputs, Tensor) and isinstance(target, Tensor) and batch.weight is None  # as it usually is
        if plain and inputs.device == target.device == batch.index.device == self.device:
            return batch
        return batch.to(self.device) if self.transfer is None else self.transfer(batch)

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
    """The process-wide settings of a runtime slot, put back afterwards: threads and the precision of products."""
    threads = torch.get_num_threads()
    with matmul_precision(spec.matmul, spec.device):
        try:
            if spec.threads is not None:
                torch.set_num_threads(spec.threads)
            yield
        finally:
            torch.set_num_threads(threads)


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
        again = spec.parallel.recompute if spec.parallel else ""
        try:
            with recomputing(outermost(model) if again else (), again):
                yield Runner(model.train(), setup.training.loss, spec, setup.training.micro)
        finally:
            model.zero_grad(set_to_none=True)
            model.to(home).train(was)
