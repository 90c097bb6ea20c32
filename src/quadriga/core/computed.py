"""Layers that compute their weight at each call: from `weight_norm`, `spectral_norm` or `prune`, old and new."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

MAKE_LASTING = "make it permanent first: torch.nn.utils.prune.remove(layer, 'weight')"
TAKE_OFF = "take it off first: torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or remove_spectral_norm"


def computes_weight(module: nn.Module) -> bool:
    """Whether a tensor of the module that its forward reads is a result, no parameter.

    Example:
        >>> computes_weight(nn.utils.prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5))
        True
    """
    if is_parametrized(module):
        return True
    hooked = bool(module._forward_pre_hooks)
    return hooked and any(isinstance(v, Tensor) for v in vars(module).values())


def computed(model: nn.Module) -> str:
    """The end of a refusal: ", and conv1 computes its weight; ..." with what would help; "" where no layer does."""
    found = [(name, module) for name, module in model.named_modules() if computes_weight(module)]
    if not found:
        return ""
    name, module = found[0]
    masked = any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
    return f", and {name or 'the model'} computes its weight at each call; {MAKE_LASTING if masked else TAKE_OFF}"
