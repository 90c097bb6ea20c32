"""The interface of a model: shapes of its outputs at batch 1, 2 and 25, and that it trains; no structure method changes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quadriga.core.batch import Tree, call, device_of, evaluating, keeping_mode, resize, tensors, to_device
from quadriga.core.errors import NotApplicable

BATCHES = (1, 2, 25)


def outputs(model: nn.Module, example: Tree, batch: int) -> list[Tensor]:
    """All output tensors at a batch size, in evaluation mode, without gradients."""
    with evaluating(model), torch.no_grad():
        return tensors(call(model, to_device(resize(example, batch), device_of(model))))


@dataclass(frozen=True)
class Reference:
    """What the interface was.

    Args:
        shapes: batch size → shapes of all output tensors.
        rowwise: an example's output does not depend on the others in its batch.
        trains: it runs in training mode, where some networks take another path.
    """

    shapes: dict[int, list[torch.Size]]
    rowwise: bool
    trains: bool = False

    @classmethod
    def of(cls, model: nn.Module, example: Tree) -> Reference:
        """Run the model at each batch size.

        Raises:
            NotApplicable: it does not run at one of them.
        """
        found = dict(_runs(model, example, "the model"))
        return cls({b: [t.shape for t in out] for b, out in found.items()}, _rowwise(found), not _untrainable(model, example))


def check_interface(model: nn.Module, example: Tree, reference: Reference) -> None:
    """Compare the model's interface with what it was, at batch 1, 2 and 25.

    A `view(-1, 400)` that turns 25 rows of 576 numbers into 36 rows is found here, whichever way it comes out:
    by a raised error, by the number of rows, or because rows began to depend on each other.

    Raises:
        NotApplicable: it fails, returns other shapes, or mixes examples that it did not mix before.
    """
    found = {}
    for batch, out in _runs(model, example, "the changed model"):
        found[batch], shapes = out, [t.shape for t in out]
        if shapes != reference.shapes[batch]:
            was, now = _shapes(reference.shapes[batch]), _shapes(shapes)
            raise NotApplicable(f"at batch {batch} the changed model returns {now} where it returned {was}")
    if reference.rowwise and not _rowwise(found):
        raise NotApplicable("the changed model mixes the examples of a batch, which it did not before")
    if reference.trains and (problem := _untrainable(model, example)):
        raise NotApplicable(f"the changed model does not run in training mode: {problem}")


def _untrainable(model: nn.Module, example: Tree) -> str:
    """Why a forward pass in training mode fails, or "". Buffers and random numbers are given back."""
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with keeping_mode(model), torch.random.fork_rng(devices=[]), torch.no_grad():
            call(model.train(), to_device(resize(example, BATCHES[1]), device_of(model)))
        return ""
    except Exception as error:  # whatever the user's forward raises
        return _first(error)
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


def _runs(model: nn.Module, example: Tree, who: str) -> Iterator[tuple[int, list[Tensor]]]:
    """The outputs at each batch size in turn."""
    for batch in BATCHES:
        try:
            out = outputs(model, example, batch)
        except Exception as error:  # whatever the user's forward raises
            raise NotApplicable(f"{who} does not run at batch {batch}: {_first(error)}") from error
        yield batch, out


def _rowwise(found: dict[int, list[Tensor]]) -> bool:
    for one, two, many in zip(*(found[b] for b in BATCHES), strict=True):
        if one.dim() == 0 or (len(one), len(two), len(many)) != BATCHES or not many.is_floating_point():
            continue
        for few in (one, two):
            if not torch.allclose(few, many[: len(few)], rtol=1e-3, atol=1e-3 * float(many.abs().max()), equal_nan=True):
                return False
    return True


def _shapes(shapes: list[torch.Size]) -> str:
    return ", ".join(str(tuple(s)) for s in shapes)


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
