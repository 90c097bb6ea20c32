"""What int8 does to a model before any runtime does it: layers that round their weights and inputs, in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, call, evaluating, primary
from quadriga.core.rounding import SAMPLE, round_activation, round_weight, thinned, value_range

PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)
Range = tuple[float, float]


def products(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolution layers by name whose weight is a plain parameter."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, PRODUCTS)}
    return {name: m for name, m in found.items() if "weight" in m._parameters}


@dataclass
class Rounding:
    """How one layer rounds.

    Args:
        activations: "static" (in `low` to `high`), "dynamic" (in each batch's own range) or "none".
        bits: of the weights.
        low, high: of the layer's inputs.
        momentum: in training a range follows the batches' own by this share a step; 0 keeps it.
        acts: False only watches.
    """

    activations: str = "static"
    bits: int = 8
    low: Tensor | float | None = None
    high: Tensor | float | None = None
    momentum: float = 0.0
    acts: bool = True

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook: hide the weight behind its rounded self, and round the input."""
        if module.training and self.momentum and self.activations == "static":
            self._follow(*args[0].detach().aminmax())
        if not self.acts:
            return None
        axis = 1 if getattr(module, "transposed", False) else 0
        weight = module._parameters["weight"]
        assert weight is not None
        module.__dict__["weight"] = round_weight(weight, axis, self.bits)  # found before the parameter
        if self.activations == "none":
            return None
        return (self._rounded(args[0]), *args[1:])

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: the parameter is seen again."""
        module.__dict__.pop("weight", None)

    def _rounded(self, values: Tensor) -> Tensor:
        if self.activations == "dynamic" or self.low is None or self.high is None:
            return round_activation(values, *values.detach().aminmax())
        return round_activation(values, self.low, self.high)

    def _follow(self, low: Tensor, high: Tensor) -> None:
        if self.low is None or self.high is None:
            self.low, self.high = low, high
            return
        ends = (
            (torch.as_tensor(old, dtype=new.dtype, device=new.device), new) for old, new in ((self.low, low), (self.high, high))
        )
        self.low, self.high = (torch.lerp(old, new, self.momentum) for old, new in ends)


@contextmanager
def simulated(model: nn.Module, layers: Mapping[str, Rounding]) -> Iterator[nn.Module]:
    """Let layers round meanwhile; the model's parameters stay as they are.

    Args:
        model: of which `layers` names layers.
    """
    with ExitStack() as stack:
        for name, rounding in layers.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(rounding.before).remove)
            stack.callback(module.register_forward_hook(rounding.after, always_call=True).remove)
        yield model


@dataclass
class Seen:
    """What a layer's inputs and work were over some batches: some values of each, and the least and the largest."""

    values: list[Tensor] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)
    products: int = 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """A forward hook."""
        values = args[0].detach().flatten()
        self.ends.append(torch.stack(values.aminmax()).float())
        self.values.append(thinned(values, SAMPLE // 8).clone().float())
        weight = module._parameters["weight"]
        assert weight is not None
        rows = weight.shape[1] if getattr(module, "transposed", False) else weight.shape[0]
        self.products += output.numel() * weight.numel() // rows


def watch(model: nn.Module, names: Iterable[str], batches: Sequence[Batch]) -> dict[str, Seen]:
    """Inputs and multiplications of layers over batches; a layer that never ran is left out."""
    seen = {name: Seen() for name in names}
    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for name, one in seen.items():
            stack.callback(model.get_submodule(name).register_forward_hook(one).remove)
        for batch in batches:
            call(model, batch.inputs)
    return {name: one for name, one in seen.items() if one.values}


def roundings(seen: Mapping[str, Seen], activations: str, kind: str = "minmax", bits: int = 8) -> dict[str, Rounding]:
    """How each layer rounds, its range found on what was seen.

    Args:
        kind: of the range: "minmax", "percentile" or "mse".
    """
    ranges = {n: value_range(torch.cat(one.ends if kind == "minmax" else one.values), kind) for n, one in seen.items()}
    return {name: Rounding(activations, bits, low, high) for name, (low, high) in ranges.items()}


def output_errors(model: nn.Module, layers: Mapping[str, Rounding], batches: Sequence[Batch]) -> dict[str, float]:
    """‖rounded − float‖² / ‖float‖² of the model's first output, over batches, with each layer alone rounded.

    Source: Wu et al. 2020, arXiv:2004.09602, section 6.1 (sensitivity layer by layer).
    """
    expected = _outputs(model, batches)
    return {name: squared_error(model, {name: one}, batches, expected) for name, one in layers.items()}


def squared_error(
    model: nn.Module, layers: Mapping[str, Rounding], batches: Sequence[Batch], expected: Sequence[Tensor] | None = None
) -> float:
    """‖rounded − float‖² / ‖float‖² of the model's first output, over batches, with all these layers rounded."""
    expected = _outputs(model, batches) if expected is None else expected
    with simulated(model, layers):
        found = _outputs(model, batches)
    apart = sum(float((f - e).square().sum()) for f, e in zip(found, expected, strict=True))
    return apart / max(sum(float(e.square().sum()) for e in expected), 1e-30)


def _outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return [primary(call(model, batch.inputs)).double() for batch in batches]


def fewest_floats(
    errors: Mapping[str, float], products: Mapping[str, int], holds: Callable[[Sequence[str]], bool]
) -> list[str] | None:
    """The layers to be left in float, so that a condition holds: those with most error per multiplication first, as few as do.

    Args:
        errors: squared error that each layer causes alone.
        products: multiplications of each, which are dearer in float.
        holds: (names left in float) → whether it is enough; asked 1 + ⌈log₂ layers⌉ times at most.

    Returns:
        Names, [] where nothing has to stay; None where only all of them could be enough, or not even they.

    Example:
        >>> errors, work = {"a": 1.0, "b": 8.0, "c": 3.0}, {"a": 1, "b": 4, "c": 1}
        >>> fewest_floats(errors, work, lambda left: "b" in left)
        ['c', 'b']
    """
    order = sorted(errors, key=lambda name: -errors[name] / max(products[name], 1))
    if holds([]):
        return []
    few, many = 0, len(order)  # `few` are not enough
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if holds(order[:middle]) else (middle, many)
    return order[:many] if many < len(order) else None
