"""Whether a module computes what its class in `torch.nn` does, so that its fields tell all of it."""

from __future__ import annotations

from torch import nn

from quadriga.core.computed import computes_weight

FORWARD = ("__call__", "forward", "_conv_forward", "weight", "bias")  # what a subclass may have of its own


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module computes exactly what one of these classes computes from its parameters and fields.

    A subclass with a forward of its own does not (an activation behind the normalization, a weight that is standardized or
    scaled, another padding), nor does a module with hooks, with a parametrization, or with a forward that was set on it.

    Args:
        kinds: classes of `torch.nn`.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> is_plain(nn.Linear(2, 2), nn.Linear, nn.Conv2d), is_plain(Scaled(2, 2), nn.Linear)
        (True, False)
    """
    return plain_kind(module, *kinds) is not None


def plain_kind(module: nn.Module, *kinds: type[nn.Module]) -> type[nn.Module] | None:
    """The one of these classes whose forward is all that a module computes; None where there is none, see `is_plain`."""
    if hooked(module) or computes_weight(module) or any(name in vars(module) for name in FORWARD):
        return None
    return next((kind for kind in kinds if isinstance(module, kind) and _inherits(type(module), kind)), None)


def hooked(module: nn.Module) -> bool:
    """Whether a forward hook may change what a module reads or returns.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.register_forward_hook(lambda module, args, output: -output)
        >>> hooked(layer)
        True
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _inherits(own: type[nn.Module], kind: type[nn.Module]) -> bool:
    return all(getattr(own, name, None) is getattr(kind, name, None) for name in FORWARD)
