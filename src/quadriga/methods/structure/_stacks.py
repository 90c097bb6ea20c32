"""Blocks that stand one after the other in a ModuleList or Sequential."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from quadriga.core.errors import NotApplicable


@dataclass(frozen=True, eq=False)
class Block:
    """A module in a stack.

    Args:
        name: its path in the model.
        stack: the ModuleList or Sequential that holds it; None for a layer that stands elsewhere.
        module: itself.
    """

    name: str
    stack: nn.ModuleList | nn.Sequential | None
    module: nn.Module


def blocks_of(model: nn.Module) -> list[Block]:
    """Modules with parts of their own, in a ModuleList or Sequential of at least two of them, in order."""
    found: list[Block] = []
    for path, stack in model.named_modules():
        if isinstance(stack, nn.ModuleList | nn.Sequential):
            parts = {f"{path}.{name}".lstrip("."): m for name, m in stack._modules.items() if m is not None}
            made = [Block(name, stack, m) for name, m in parts.items() if any(True for _ in m.children())]
            found += made if len(made) > 1 else []
    return found


def take_out(block: Block, check: Callable[[], None]) -> None:
    """Take a block out of its stack, and put it back if `check` refuses.

    Raises:
        NotApplicable: it is the last of its stack, or the model does not stand it.
    """
    stack = block.stack
    assert stack is not None, "only what stands in a stack can be taken out of it"
    was = dict(stack._modules)
    rest = {name: m for name, m in was.items() if m is not block.module}
    if not rest:
        raise NotApplicable("it is the last of its stack")
    numbered = all(name.isdecimal() for name in was)
    fill(stack, {str(i): m for i, m in enumerate(rest.values())} if numbered else rest)
    try:
        check()
    except NotApplicable:
        fill(stack, was)
        raise


def fill(stack: nn.Module, modules: dict[str, nn.Module | None]) -> None:
    """Give a stack these modules; attentions of `transformers`, which know their place for their caches, learn it anew."""
    stack._modules = modules
    for place, block in enumerate(modules.values()):
        for module in block.modules() if block is not None else ():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
