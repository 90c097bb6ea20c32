"""The state of models and optimizers under parameter names, taken out and put back in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput
from quadriga.core.spread import local
from quadriga.train.pack import like

# group entries that the loop sets at each step
DRIVEN = frozenset(("lr", "momentum", "betas", "weight_decay", "l1", "l2", "group_l1"))
HOW = frozenset(("fused", "foreach"))  # entries that say how a step is carried out, which this process decides
REBUILD = "apply the same steps before loading"


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All parameters and buffers, each once under its first name, and the other names of tied ones → first name."""
    own: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for group in (model.named_parameters, model.named_buffers):
        for name, tensor in group(remove_duplicate=False):
            if first.setdefault(id(tensor), name) == name:
                own[name] = tensor
            else:
                aliases[name] = first[id(tensor)]
    return own, aliases


def module_states(model: nn.Module) -> dict[str, Any]:
    """What modules keep beside tensors, through `get_extra_state`."""
    default = nn.Module.get_extra_state
    return {name: m.get_extra_state() for name, m in model.named_modules() if type(m).get_extra_state is not default}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Copy values into a model's own tensors: ties, devices and memory formats stay.

    Raises:
        BadInput: the model has other tensors, shapes, types or ties.
    """
    own, ties = model_tensors(model)
    if set(own) != set(tensors) or ties != aliases:
        odd = sorted(set(own) ^ set(tensors)) or sorted(dict(set(ties.items()) ^ set(aliases.items())))
        raise BadInput(f"the checkpoint is of another model: {odd[0]} differs", REBUILD)
    for name, tensor in own.items():
        value = tensors[name]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise BadInput(f"{name} is {_spell(tensor)} in the model and {_spell(value)} in the checkpoint", REBUILD)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def kept_tensors(model: nn.Module) -> Callable[[], None]:
    """Keep a copy of a model's tensors in main memory; what is returned puts them back."""
    tensors = model_tensors(model)[0]
    kept = {name: local(tensor.detach()).cpu().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def put_back() -> None:
        for name, tensor in tensors.items():
            local(tensor.detach()).copy_(kept[name])

    return put_back


def _spell(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """For each group of an optimizer, the names of its parameters in the model."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        [names.get(id(p), f"extra.{g}.{i}") for i, p in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """An optimizer's class, groups and state, keyed by parameter name."""
    if optimizer is None:
        return {"class": "", "groups": [], "state": {}}
    groups: list[dict[str, Any]] = []
    state: dict[str, dict[str, Any]] = {}
    for names, group in zip(parameter_names(model, optimizer), optimizer.param_groups, strict=True):
        groups.append({**group, "params": names})
        state |= {n: dict(optimizer.state[p]) for n, p in zip(names, group["params"], strict=True) if optimizer.state.get(p)}
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Give an optimizer back its state; the group entries that schedules drive stay its own.

    Raises:
        BadInput: it is of another class or has other parameters.
    """
    names = parameter_names(model, optimizer)
    if saved["class"] != type(optimizer).__name__ or [g["params"] for g in saved["groups"]] != names:
        problem = f"the checkpoint holds the state of {saved['class'] or 'no optimizer'}, or of other parameters"
        raise BadInput(problem, f"continue with the optimizer that it was made with, not {type(optimizer).__name__}")
    for group, kept, group_names in zip(optimizer.param_groups, saved["groups"], names, strict=True):
        group.update({k: v for k, v in kept.items() if k != "params" and k not in DRIVEN | HOW})
        on_cpu = not (group.get("capturable") or group.get("fused"))  # where torch keeps its step counts
        for name, p in zip(group_names, group["params"], strict=True):
            if name in saved["state"]:
                entries = saved["state"][name].items()
                optimizer.state[p] = {k: v if k == "step" and on_cpu else _placed(v, p) for k, v in entries}


def _placed(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, list):  # such as SOAP's bases
        return [_placed(v, parameter) for v in value]
    return like(value, parameter) if isinstance(value, Tensor) else value
