"""What of a train step processes can have in common: facts that are looked at before others join, and after a first step."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.slots import Hook, RuntimeSpec
from quadriga.parallel.block import Block
from quadriga.train.starting import unguarded
from quadriga.train.state import DRIVEN, model_tensors, module_states, parameter_names

if TYPE_CHECKING:
    from quadriga.train.run import Run

OUT = "leave one of the two out"
CHOOSES, ACTS = ("select", "seen"), ("train", "after_backward", "after_step")


def check_runtime(spec: RuntimeSpec) -> None:
    """Raises NotApplicable for a runtime slot under which workers would gain nothing."""
    if spec.device != "cpu":
        reason = f"processes on one {spec.device} device take turns, so that workers gain nothing"
        raise NotApplicable(reason, f"train on the CPU, or leave out one of hogwild and {spec.device}")
    if spec.compile:
        raise NotApplicable("every worker would compile the training step for itself", OUT)
    if spec.autocast == "fp16":
        raise NotApplicable("the scale of fp16's losses would be another one in every worker", "take bf16, which needs none")


def check_run(run: Run) -> None:
    """Raises NotApplicable for what is not in tensors, so that every worker would have it for itself."""
    check_runtime(run.setup.runtime)
    for hook in run.hooks:
        name = type(hook).__qualname__
        if overrides(hook, *CHOOSES):
            raise NotApplicable(f"{name} goes by the losses of all examples, of which a worker sees its own only", OUT)
        if has_state(hook) and overrides(hook, *ACTS):
            raise NotApplicable(f"{name} keeps a state from step to step, and every worker would have its own", OUT)
    if states := module_states(run.model):
        reason = f"the layer {next(iter(states))} keeps something beside tensors, and every worker would have its own"
        raise NotApplicable(reason, "leave out hogwild")
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that runs its parent's script again
        raise BadInput("the script trains while it is imported", "put it under `if __name__ == '__main__':`")
    if reason := unguarded():
        raise BadInput(reason, "put the training under `if __name__ == '__main__':`")


def overrides(hook: Hook, *names: str) -> bool:
    """Whether a hook has one of these methods of its own."""
    return any(getattr(type(hook), name) is not getattr(Hook, name) for name in names)


def has_state(hook: Hook) -> bool:
    """Whether a hook keeps something in checkpoints."""
    return overrides(hook, "state_dict")


def numbers_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The entries of an optimizer's groups that nobody but itself changes."""
    return [{k: v for k, v in g.items() if k != "params" and k not in DRIVEN} for g in optimizer.param_groups]


def check_optimizer(optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]) -> None:
    """Look at an optimizer after its first step.

    Args:
        optimizer: has made a step.
        before: its `numbers_of` before that.

    Raises:
        NotApplicable: it keeps something beside tensors of its parameters' state, which alone can be shared.
    """
    name, remedy = type(optimizer).__name__, "take sgd, adam or adamw"
    for was, now in zip(before, numbers_of(optimizer), strict=True):
        if changed := [k for k in now if k not in was or (was[k] is not now[k] and was[k] != now[k])]:
            raise NotApplicable(f"{name} counts {changed[0]} in its groups, and every worker would count its own", remedy)
    for p, state in optimizer.state.items():
        if odd := [k for k, v in state.items() if not isinstance(v, Tensor)] or ["no tensor"] * (not isinstance(p, Tensor)):
            raise NotApplicable(f"{name} keeps {odd[0]}, which is no tensor and cannot be shared", remedy)


def states_of(run: Run) -> list[tuple[str, str, Tensor]]:
    """(parameter, entry, tensor) of the optimizer's state."""
    found = []
    for names, group in zip(parameter_names(run.model, run.optimizer), run.optimizer.param_groups, strict=True):
        for name, p in zip(names, group["params"], strict=True):
            found += [(name, key, t) for key, t in run.optimizer.state.get(p, {}).items()]
    return found


def common(run: Run) -> dict[str, Tensor]:
    """All tensors that workers have in common: of the model, batch statistics too, and of the optimizer's state."""
    own = {f"model/{name}": t for name, t in model_tensors(run.model)[0].items()}
    return own | {f"state/{name}/{key}": t for name, key, t in states_of(run)}


def check_common(run: Run, block: Block) -> None:
    """Look whether a step has left everything where the others see it.

    Raises:
        NotApplicable: a tensor was put in the place of one that is shared.
    """
    for name, t in common(run).items():
        if not block.holds(t):
            whose = "the optimizer" if name.startswith("state/") else "the model"
            raise NotApplicable(f"{whose} replaces {name} in each step instead of changing it in place", "leave out hogwild")
