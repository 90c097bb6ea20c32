"""What the distilling methods share: the teacher, whether its answers fit, and the term that they add during a train step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, Tree, call, device_of, evaluating, primary, tensors, to_device
from quadriga.core.copies import copy_model
from quadriga.core.data import Data
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook

Source = Literal["baseline", "present"]


class Teacher:
    """A frozen network that answers in evaluation mode and without gradients, on the device of what it is asked.

    Args:
        model: moved to that device when it is first asked there; its mode is given back after each answer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.__qualname__ = f"Teacher {content(model)}"  # what checkpoints compare: no run goes on with another teacher

    def __call__(self, inputs: Tree) -> Tree:
        device = tensors(inputs)[0].device
        if device_of(self.model) != device:
            self.model.to(device)
        asleep = not any(m.training for m in self.model.modules())  # the usual case: nothing to do for each batch
        with nullcontext() if asleep else evaluating(self.model), torch.no_grad():
            return call(self.model, inputs)


def content(model: nn.Module) -> str:
    """Twelve hexadecimal digits of a network's kind, names, shapes and values.

    Example:
        >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> content(one) == content(copy_model(one)) != content(two)
        True
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def needed(requires: frozenset[str], source: Source) -> frozenset[str]:
    """A method's required traits: a teacher that is the present network has to be trained; no baseline is asked for."""
    return requires if source == "baseline" else requires - {"TEACHER"} | {"TRAINED"}


def teacher_of(setup: Setup, source: Source) -> Teacher:
    """The trained baseline, or a frozen copy of the network as it stands.

    Raises:
        NotApplicable: its answers have another shape than the network's.
    """
    if source == "present":
        return Teacher(copy_model(setup.model).eval().requires_grad_(False))
    assert setup.context.teacher is not None, "TEACHER was promised"
    teacher = Teacher(setup.context.teacher)
    mine, theirs = (primary(trial(model, setup.context.example)) for model in (setup.model, teacher.model))
    if mine.shape != theirs.shape:
        problem = f"the teacher answers with the shape {tuple(theirs.shape)}, the network with {tuple(mine.shape)}"
        raise NotApplicable(problem, "the teacher has to do the same task")
    return teacher


def trial(model: nn.Module, inputs: Tree) -> Tree:
    """A model's answer in evaluation mode, without gradients; the model and the random numbers to come stay as they are."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        return call(model, to_device(inputs, device_of(model)))


def refusal(step: str, reason: str, remedy: str = "") -> NotApplicable:
    """A refusal that shows only when training starts, with the step that it comes from."""
    error = NotApplicable(reason, remedy)
    error.add_note(step)
    return error


Term = Callable[[Teacher, Batch], Tensor]  # → [batch], about the forward pass that was just made
Listen = Callable[[nn.Module], AbstractContextManager[Term]]


class Listener:
    """The term of the train step that runs; None outside of one, as when another method tries the loss.

    Args:
        listen: (model) → a context in which the model's forward passes are caught, and which gives the term.
    """

    def __init__(self, listen: Listen) -> None:
        self.listen = listen
        self.term: Term | None = None

    def hook(self, model: nn.Module) -> Hook:
        """For one train step."""
        return Listening(self)

    @contextmanager
    def during(self, model: nn.Module) -> Iterator[None]:
        """Entered around a train step."""
        with self.listen(model) as self.term:
            try:
                yield
            finally:
                self.term = None


class Listening(Hook):
    """Lets a listener hear the forward passes of one train step."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def train(self, model: nn.Module, data: Data) -> AbstractContextManager[Any]:
        return self.listener.during(model)


def add_term(setup: Setup, teacher: Teacher, beta: float, listen: Listen) -> Setup:
    """The setup with beta · the term that a listener gives in a train step, [batch], added to its loss."""
    inner, listener = setup.training.loss, Listener(listen)

    def loss(output: Tree, batch: Batch) -> Tensor:
        plain = inner(output, batch)
        return plain if listener.term is None else plain + beta * listener.term(teacher, batch)

    hooks = (*setup.training.make_hooks, listener.hook)
    return replace(setup, training=replace(setup.training, loss=loss, make_hooks=hooks))


def visible(inputs: Tree) -> Tensor | None:
    """[batch, positions] bool of the tokens that are no padding, where a model is called with `attention_mask`."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
