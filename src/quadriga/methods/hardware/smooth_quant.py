"""SmoothQuant: outliers move from activations, which share one scale, into weights, which have one per output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, call, evaluating, primary
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.plain import is_plain
from quadriga.core.setup import Setup

NORMS = (nn.LayerNorm, nn.RMSNorm)
BATCHES = 4  # of calibration data, over which the largest values are taken
SAME = 1e-4  # ‖after − before‖ / ‖before‖ of the outputs


def balance(largest: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """The factor of each input that leaves activations by: max|x|ᵅ / max|w|¹⁻ᵅ, 1 where either is zero.

    Args:
        largest: [inputs] largest absolute activations.
        weights: [outputs, inputs] each, of the layers that read them.
        alpha: in [0, 1].

    Example:
        >>> balance(torch.tensor([100.0, 1.0]), [torch.ones(3, 2)], 0.5)
        tensor([10.,  1.])

    Source: Xiao et al. 2023, arXiv:2211.10438, equation 4.
    """
    heavy = torch.stack([w.detach().abs().amax(0) for w in weights]).amax(0)
    factor = largest.clamp_min(1e-5) ** alpha / heavy.clamp_min(1e-5) ** (1 - alpha)
    return torch.where((largest > 0) & (heavy > 0), factor, 1.0)


@dataclass
class Reader:
    """A normalization, the linear layers that read its output, and the largest value of each channel."""

    norm: nn.Module
    layers: list[nn.Linear]
    largest: Tensor


def readers(model: nn.Module, batches: Sequence[Batch]) -> list[Reader]:
    """Normalizations with gains whose very output linear layers read, as forward passes over batches show."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    found: dict[int, Reader] = {}

    def put_out(module: nn.Module, args: Any, output: Tensor) -> None:
        made[id(output)] = (module, output)  # held, so that no other tensor gets its identity

    def read(module: nn.Linear, args: tuple[Any, ...]) -> None:
        norm, output = made.get(id(args[0]), (None, None))
        if norm is None or output is None:
            return
        largest = output.detach().abs().flatten(0, -2).amax(0)
        one = found.setdefault(id(norm), Reader(norm, [], largest))
        one.largest = torch.maximum(one.largest, largest)
        if module not in one.layers:
            one.layers.append(module)

    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for module in model.modules():
            if is_plain(module, *NORMS) and isinstance(module.weight, nn.Parameter) and module.weight.dim() == 1:
                stack.callback(module.register_forward_hook(put_out).remove)
            elif is_plain(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(read).remove)
        for batch in batches:
            made.clear()
            call(model, batch.inputs)
    return list(found.values())


def smooth(one: Reader, factor: Tensor) -> Callable[[], None]:
    """Divide a normalization's output by a factor per channel and multiply the readers' weights; returns what undoes it."""
    touched = [p for p in (one.norm.weight, getattr(one.norm, "bias", None)) if isinstance(p, Tensor)]
    weights = [layer.weight for layer in one.layers]
    kept = [(p, p.detach().clone()) for p in (*touched, *weights)]
    with torch.no_grad():
        for p in touched:
            p.div_(factor)
        for w in weights:
            w.mul_(factor)

    def undo() -> None:
        with torch.no_grad():
            for p, values in kept:
                p.copy_(values)

    return undo


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Method):
    """Before int8 activations: scale channels of normalizations down where they have outliers, the weights that read them up.

    The network computes what it did.

    It acts where the very output of a LayerNorm or RMSNorm is read by linear layers alone, as in blocks that normalize first; a
    place where the model's outputs would change is left as it is. It has to earn its place: on some transformers int8 is worse
    with it.

    Args:
        alpha: how much of the difficulty moves into the weights: 0 none of the activations' outliers, 1 all of them.

    Source: Xiao et al. 2023, arXiv:2211.10438.
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "arXiv:2211.10438"
    search: ClassVar = {"alpha": (0.5, 0.7, 0.85)}
    requires = frozenset({"TRAINED", "FLOAT_WEIGHTS"})
    writes = frozenset({"model"})

    alpha: float = 0.5

    def __post_init__(self) -> None:
        self.insist(("alpha", 0 <= self.alpha <= 1, "it is a share, from 0 to 1"))

    def apply(self, setup: Setup) -> Setup:
        """Smooth in place, one normalization at a time. NotApplicable where there is none, or no data to see it on."""
        batches = setup.context.calibration[:BATCHES]
        if not batches:
            raise NotApplicable("the largest activations are seen on calibration batches, and there are none", "give data")
        done = 0
        for one in readers(setup.model, batches):
            factor = balance(one.largest, [layer.weight for layer in one.layers], self.alpha)
            before = _outputs(setup.model, batches[0])
            undo = smooth(one, factor)
            if float((_outputs(setup.model, batches[0]) - before).norm()) <= SAME * float(before.norm()):
                done += 1
            else:  # something else reads it too, or a weight is tied
                undo()
        if not done:
            raise NotApplicable("no normalization is read by linear layers alone")
        return setup


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad(), evaluating(model):
        return primary(call(model, batch.inputs)).double()
