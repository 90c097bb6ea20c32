"""Fold batch normalizations into the layers before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from quadriga.core.axes import Patch, Reference, check_interface
from quadriga.core.axes.trace import Traced, trace
from quadriga.core.axes.walk import op_name
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup


def fold(layer: nn.Linear | _ConvNd, norm: _BatchNorm, patch: Patch) -> None:
    """Let the layer compute what the norm made of it with its running statistics: w' = w·γ/σ, b' = (b − µ)·γ/σ + β.

    Args:
        layer: its weight's output axis is 0, or 1 if it is transposed (one group).
        norm: with running statistics.
        patch: records the changes. A layer without a bias gets one.

    Example:
        >>> layer, norm, x = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4).eval(), torch.randn(5, 3)
        >>> before = norm(layer(x))
        >>> fold(layer, norm, Patch())
        >>> torch.allclose(layer(x), before, atol=1e-4)
        True
    """
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        gain = norm.weight.data.double()
        scale, shift = scale * gain, shift * gain + norm.bias.data.double()
    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    along = [-1 if k == axis else 1 for k in range(layer.weight.dim())]
    patch.data(layer.weight, (layer.weight.data.double() * scale.reshape(along)).to(layer.weight.dtype))
    if layer.bias is not None:
        patch.data(layer.bias, (layer.bias.data.double() * scale + shift).to(layer.bias.dtype))
    else:
        learned = (norm.bias if norm.affine else layer.weight).requires_grad
        patch.parameter(layer, "bias", nn.Parameter(shift.to(layer.weight.dtype), learned))


def foldable(traced: Traced) -> Iterator[tuple[str, str]]:
    """(path of a layer, path of the norm that alone reads it); both are called once and their tensors are not tied."""
    modules = dict(traced.model.named_modules())
    calls = Counter(traced.layer(n) for n in traced.graph.nodes if n.op == "call_function" and _weighs(n))
    for node in traced.graph.nodes:
        if node.op != "call_function" or not _weighs(node) or len(node.users) != 1:
            continue
        reader = next(iter(node.users))
        path, other = traced.layer(node), traced.layer(reader)
        layer, norm = modules.get(path), modules.get(other)
        if "batch_norm" not in op_name(reader) or reader.args[0] is not node:
            continue
        if not isinstance(layer, nn.Linear | _ConvNd) or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if calls[path] == calls[other] == 1 and _untied(traced, layer, norm) and not _odd(layer):
            yield path, other


def _weighs(node: fx.Node) -> bool:
    name = op_name(node)
    return name == "linear" or name.startswith("conv") or "batch_norm" in name


def _untied(traced: Traced, *modules: nn.Module) -> bool:
    return all(len(traced.names.get(id(p), ())) == 1 for m in modules for p in m.parameters(recurse=False))


def _odd(layer: nn.Module) -> bool:
    """A transposed convolution in groups holds outputs of several groups on one axis."""
    return isinstance(layer, _ConvTransposeNd) and layer.groups > 1


@dataclass(frozen=True, kw_only=True)
class FoldBatchnorm(Method):
    """Fold each batch normalization into the convolution or Linear layer that it alone reads; nn.Identity takes its place.

    ONNX Runtime and OpenVINO do so by themselves; eager PyTorch does not. Training after it goes on without normalization, so
    it belongs behind the last `train` step.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CLOSE
    source = "arXiv:1712.05877"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {}

    def apply(self, setup: Setup) -> Setup:
        model, example = setup.model, setup.context.example
        norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
        if not norms:
            raise NotApplicable("the model has no batch normalization")
        reference, done, reasons = Reference.of(model, example), 0, list[str]()
        for path, norm in list(foldable(trace(model, example))):
            patch = Patch()
            try:
                fold(model.get_submodule(path), model.get_submodule(norm), patch)  # type: ignore[arg-type]
                patch.module(model, norm, nn.Identity())
                check_interface(model, example, reference)
                done += 1
            except NotApplicable as error:
                patch.undo()
                reasons.append(f"{norm}: {error.reason}")
        if not done:
            why = "; ".join(reasons[:3]) or f"{norms[0]} does not follow a layer of its own directly"
            raise NotApplicable(f"no batch normalization can be folded ({why})")
        return replace(setup, model=model)
