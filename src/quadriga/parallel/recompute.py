"""Activation checkpointing: what a block computes is not kept for the backward pass but computed again there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from quadriga.core.stacks import blocks_of

A = torch.ops.aten
# what costs much more to compute again than to keep; all else is cheap
DEAR = {
    op for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
                    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
                    "_scaled_dot_product_flash_attention_for_cpu") if (op := getattr(getattr(A, name, None), "default", None))
}  # fmt: skip


def keep_dear(_context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Products and attention are kept."""
    return CheckpointPolicy.MUST_SAVE if op in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def wrap(module: nn.Module, how: str) -> None:
    """Let a module's forward be computed again, all of it ("blocks") or what is cheap ("cheap")."""
    plain: Callable[..., Any] = module.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "cheap":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_dear)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, **options, **kwargs)

    module.forward = forward


def outermost(model: nn.Module) -> list[nn.Module]:
    """The blocks of the model's stacks that lie in no other block."""
    found: list[tuple[str, nn.Module]] = []
    for block in blocks_of(model):
        if not any(block.name.startswith(f"{name}.") for name, _ in found):
            found.append((block.name, block.module))
    return [module for _, module in found]


@contextmanager
def recomputing(modules: Iterable[nn.Module], how: str) -> Iterator[None]:
    """These modules' activations are computed again meanwhile."""
    wrapped = list(modules) if how else []
    for module in wrapped:
        wrap(module, how)
    try:
        yield
    finally:
        for module in wrapped:
            del module.forward
