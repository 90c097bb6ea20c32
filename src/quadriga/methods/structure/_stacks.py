"""Blocks taken out of the ModuleList or Sequential that they stand in."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.stacks import Block


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
