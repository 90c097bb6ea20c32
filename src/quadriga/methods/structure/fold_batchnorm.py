"""Fold batch normalizations into the layers before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from quadriga.core.axes import Patch, Reference, check_interface
from quadriga.core.axes.trace import Traced, trace
from quadriga.core.axes.walk import bind, op_name
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._normalizing import Statistics, rests
from quadriga.verify.promise import Witness

PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True)
class Fold:
    """A layer and the batch normalization that alone reads it.

    Args:
        layer, norm: paths of the modules that run them.
        axis: of the layer's weight: that of its outputs.
        statistics: of the norm.
    """

    layer: str
    norm: str
    axis: int
    statistics: Statistics


def fold(layer: nn.Module, statistics: Statistics, patch: Patch, axis: int = 0) -> None:
    """Let the layer compute what the norm made of it with its running statistics: w' = w·γ/σ, b' = (b − µ)·γ/σ + β.

    Args:
        layer: with parameters "weight" and "bias"; without a bias it gets one.
        patch: records the changes.
        axis: of the outputs in the weight: 0, or 1 in a transposed convolution.

    Example:
        >>> import torch
        >>> layer, norm, x = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4).eval(), torch.randn(5, 3)
        >>> before = norm(layer(x))
        >>> fold(layer, Statistics(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps), Patch())
        >>> torch.allclose(layer(x), before, atol=1e-4)
        True
    """
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    scale, shift = statistics.affine()
    along = [-1 if k == axis else 1 for k in range(weight.dim())]
    patch.data(weight, (weight.data.double() * scale.reshape(along)).to(weight.dtype))
    if bias is not None:
        patch.data(bias, (bias.data.double() * scale + shift).to(bias.dtype))
    else:
        learned = (weight if statistics.bias is None else statistics.bias).requires_grad
        patch.parameter(layer, "bias", nn.Parameter(shift.to(weight.dtype), learned))


def foldable(traced: Traced) -> Iterator[Fold | str]:
    """For each batch normalization with running statistics its fold, or why there is none; told by the traced operators."""
    for node in traced.graph.nodes:
        if node.op != "call_function" or op_name(node) != "batch_norm":
            continue
        given = bind(node)
        if given["training"] or not isinstance(given["running_mean"], fx.Node):
            continue
        try:
            yield _fold(traced, node, given)
        except NotApplicable as error:
            yield f"{traced.layer(node) or type(traced.model).__name__} {error.reason}"


def _fold(traced: Traced, node: fx.Node, given: dict[str, Any]) -> Fold:
    source, norm = given["input"], traced.layer(node)
    if op_name(source) not in PRODUCTS or len(source.users) != 1:
        raise NotApplicable("does not follow a layer of its own directly")
    product, layer = bind(source), traced.layer(source)
    transposed = "transpose" in op_name(source)
    weight = _own(traced, product["weight"], layer, "weight")
    if product["bias"] is not None:
        _own(traced, product["bias"], layer, "bias")
    elif "bias" not in traced.model.get_submodule(layer)._parameters:
        raise NotApplicable(f"follows {layer}, which has no place for a bias")
    if source.meta["val"].dim() != max(2, weight.dim()) or (transposed and product["groups"] > 1):
        raise NotApplicable(f"does not normalize the outputs of {layer} one by one")
    if not norm:
        raise NotApplicable("computes it in its own forward")
    states = [_state(traced, given[name]) for name in ("running_mean", "running_var", "weight", "bias")]
    if states[0] is None or states[1] is None:
        raise NotApplicable("computes its statistics")
    return Fold(layer, norm, int(transposed), Statistics(states[0], states[1], states[2], states[3], given["eps"]))


def _own(traced: Traced, node: Any, layer: str, name: str) -> Tensor:
    """The parameter that an operator is given directly, if it is the layer's and nothing else reads it."""
    state = traced.states.get(node.name) if isinstance(node, fx.Node) else None
    if state is None or not isinstance(state, nn.Parameter):
        raise NotApplicable(f"follows {layer}, which computes its {name}")
    if traced.names[id(state)] != (f"{layer}.{name}".lstrip("."),) or len(node.users) != 1:
        raise NotApplicable(f"follows {layer}, whose {name} is computed, or used elsewhere too")
    return state


def _state(traced: Traced, node: Any) -> Tensor | None:
    """A norm's vector; None where it has none."""
    if node is None:
        return None
    state = traced.states.get(node.name) if isinstance(node, fx.Node) else None
    if state is None or len(node.users) != 1:
        raise NotApplicable("shares its statistics, or computes them")
    return state


@dataclass(frozen=True, kw_only=True)
class FoldBatchnorm(Method):
    """Fold each batch normalization into the convolution or Linear layer that it alone reads.

    What a norm's module computes behind the normalization, such as an activation, stays in its place; else `nn.Identity`. A
    layer that computes its weight at each call is left. ONNX Runtime and OpenVINO fold by themselves; eager PyTorch does not.
    Training after it goes on without normalization, so it belongs behind the last `train` step.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CLOSE
    source = "arXiv:1712.05877"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {}

    def apply(self, setup: Setup) -> Setup:
        model, example = setup.model, setup.context.example
        if not any(_normalizes(m) for m in model.modules()):
            raise NotApplicable("the model has no batch normalization")
        found = list(foldable(trace(model, example)))
        folds, reasons = [f for f in found if isinstance(f, Fold)], [f for f in found if isinstance(f, str)]
        pairs = list[tuple[Fold, nn.Module]]()
        for one, rest in zip(folds, rests(model, example, [(f.norm, f.statistics) for f in folds]), strict=True):
            try:
                pairs.append((one, rest.made()))
            except NotApplicable as error:
                reasons.append(f"{one.norm} {error.reason}")
        reference, witness = Reference.of(model, example), Witness(model, example)

        def holds() -> None:
            check_interface(model, example, reference)
            if problem := witness.broken(model):
                raise NotApplicable(f"cannot be folded: {problem}")

        left = _fold_all(model, pairs, holds)
        if len(left) == len(pairs):
            told = "; ".join([*left, *reasons][:3]) or "none has running statistics"
            raise NotApplicable(f"no batch normalization can be folded ({told})")
        return replace(setup, model=model)


def _fold_all(model: nn.Module, pairs: Sequence[tuple[Fold, nn.Module]], holds: Callable[[], None]) -> list[str]:
    """Fold all, and check once; where that fails, each half by itself. Returns why some are left."""
    if not pairs:
        return []
    patch = Patch()
    try:
        for one, rest in pairs:
            fold(model.get_submodule(one.layer), one.statistics, patch, one.axis)
            patch.module(model, one.norm, rest)
        holds()
        return []
    except NotApplicable as error:
        patch.undo()
        if len(pairs) == 1:
            return [f"{pairs[0][0].norm} {error.reason}"]
    half = len(pairs) // 2
    return [*_fold_all(model, pairs[:half], holds), *_fold_all(model, pairs[half:], holds)]


def _normalizes(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "running_mean" in module._buffers
