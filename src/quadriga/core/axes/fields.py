"""Numbers that modules keep about their weights (`out_channels`, `in_features`, `groups`, …), made to agree again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from quadriga.core.axes.patch import Patch

Shape = tuple[int, ...]


def refresh(model: nn.Module, before: Mapping[int, Shape], patch: Patch) -> None:
    """Update the fields of every module that owns a changed tensor.

    Args:
        before: id of each changed tensor → the shape it had.
        patch: records the changes.
    """
    for module in model.modules():
        own = {**module._parameters, **module._buffers}
        if not any(id(t) in before for t in own.values() if t is not None):
            continue
        for name, value in fields(module, lambda t: before.get(id(t), tuple(t.shape))).items():
            patch.attr(module, name, value)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def fields(module: nn.Module, old: Callable[[Any], Shape]) -> dict[str, Any]:
    """What a module's fields should be, from the shapes of its tensors; `old` gives a tensor's former shape."""
    if isinstance(module, nn.RNNBase):
        sizes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        projected = {"proj_size": sizes["weight_hr_l0"][0]} if module.proj_size else {}
        hidden = sizes["weight_hr_l0"][1] if projected else sizes["weight_hh_l0"][1]
        return {"hidden_size": hidden, "input_size": sizes["weight_ih_l0"][1], **projected}
    if isinstance(module, nn.RNNCellBase):
        return {"hidden_size": module.weight_hh.shape[1], "input_size": module.weight_ih.shape[1]}
    if isinstance(module, _NormBase):
        state = module.weight if module.weight is not None else module.running_mean
        return {"num_features": state.shape[0]} if isinstance(state, Tensor) else {}
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return {}
    shape = tuple(weight.shape)
    if isinstance(module, _ConvNd):
        return _conv(module, shape, old(weight))
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": shape}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": shape[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    if type(module).__name__ == "Conv1D" and len(shape) == 2:  # transformers' linear layer, weight[in, out]
        return {k: v for k, v in {"nx": shape[0], "nf": shape[1]}.items() if hasattr(module, k)}
    return {}


def _conv(module: _ConvNd, shape: Shape, old: Shape) -> dict[str, Any]:
    kernel = {"kernel_size": shape[2:]}
    if isinstance(module, _ConvTransposeNd):
        return {**kernel, "in_channels": shape[0], "out_channels": shape[1] * module.groups}
    groups = module.groups
    if groups > 1 and old[1] == 1:  # depthwise: whole groups were cut
        groups = shape[0] // (old[0] // groups)
    return {**kernel, "out_channels": shape[0], "in_channels": shape[1] * groups, "groups": groups}
