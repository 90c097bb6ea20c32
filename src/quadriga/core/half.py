"""Half precision: a model whose weights and products take two bytes, between float32 inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadriga.core.batch import Tree, tensors, tree_map
from quadriga.core.copies import copy_model
from quadriga.core.norms import NORMS

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def in_float(output: Tree) -> Tree:
    """The tree with half-precision tensors as float32, in which losses are taken and outputs are handed out."""
    half = tuple(HALF.values())
    if isinstance(output, Tensor):
        return output.float() if output.dtype in half else output
    if any(t.dtype in half for t in tensors(output)):
        return tree_map(lambda t: t.float() if t.dtype in half else t, output)
    return output


def in_half(inputs: Tree, dtype: torch.dtype) -> Tree:
    """The tree with floating-point tensors in a half-precision type."""
    return tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def halved(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose floating-point weights and buffers are of a half-precision type, but for those of norms. Ties stay.

    Example:
        >>> net = halved(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.bfloat16)
        >>> net[0].weight.dtype, net[1].weight.dtype
        (torch.bfloat16, torch.float32)
    """
    model = copy_model(model)
    for module in model.modules():
        if isinstance(module, NORMS):  # their kernels take float32 statistics
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model
