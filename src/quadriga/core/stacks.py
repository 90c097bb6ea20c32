"""Blocks that stand one after the other in a ModuleList or Sequential."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


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
