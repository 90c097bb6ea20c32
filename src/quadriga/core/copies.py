"""Copies of a user's model, whatever its modules hold, and the module inside of a wrapper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from quadriga.core.errors import BadInput

Module = TypeVar("Module", bound=nn.Module)


def copy_model(model: Module) -> Module:
    """A copy that computes the same, shares nothing, and trains.

    `weight_norm`, `spectral_norm` and `prune` of `torch.nn.utils` keep a computed weight as a plain attribute, which autograd
    knows as a result and `deepcopy` refuses. The copy has its values; the next forward pass computes it again.

    Example:
        >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> torch.equal(copy_model(layer).weight, layer.weight)
        True
    """
    memo: dict[int, Any] = {}
    for tensor in _results(model):
        with torch.no_grad():
            memo[id(tensor)] = tensor.detach().clone()
    return deepcopy(model, memo)


def _results(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that autograd computed and a module keeps, in plain containers too."""
    seen: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters"):
                yield from _results_in(value, seen)


def _results_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        seen.add(id(value))
        if not value.is_leaf:
            yield value
    elif isinstance(value, Mapping | list | tuple | set):
        seen.add(id(value))
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _results_in(part, seen)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without wrappers: what `torch.compile` and `DataParallel` were given, for it and for its parts.

    The wrapper's own part is dropped, not the model's: both call the module inside, on other processors or compiled.

    Raises:
        BadInput: it is, or holds, a TorchScript module.

    Example:
        >>> type(unwrapped(nn.DataParallel(nn.Linear(2, 2)))).__name__
        'Linear'
    """
    model = inside(model)
    refuse_script(model)
    for module in list(model.modules()):
        module._compiled_call_impl = None  # of module.compile()
        for key, child in list(module._modules.items()):
            if child is not None and (inner := inside(child)) is not child:
                module._modules[key] = inner
    return model


def wrappers(model: nn.Module) -> list[str]:
    """What `unwrapped` would take away, for a note: "torch.compile", "DataParallel"."""
    found = [_wrapper(m) for m in model.modules()]
    return sorted({name for name in found if name})


def _wrapper(module: nn.Module) -> str:
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
        return "torch.compile"
    return type(module).__name__ if isinstance(module, DataParallel | DistributedDataParallel) else ""


def inside(module: nn.Module) -> nn.Module:
    """The module in `torch.compile(module)` or `DataParallel(module)`; another one as it is."""
    while True:
        if "_orig_mod" in module._modules:  # asking for the class would import the compiler
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        else:
            return module


def refuse_script(model: nn.Module) -> None:
    """A compiled graph of TorchScript has no forward that could be traced, and no layers that could be changed.

    Raises:
        BadInput: the model is one, or holds one.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            kind = getattr(module, "original_name", type(module).__name__)
            what = f"the layer {name} ({kind})" if name else f"the model ({kind})"
            remedy = "give the module that it was made of, before torch.jit.script or torch.jit.trace"
            raise BadInput(f"{what} is TorchScript, which can be run but neither changed nor exported", remedy)
