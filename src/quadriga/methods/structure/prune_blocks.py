"""Block pruning: take out whole blocks that hardly change what passes through them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.axes import Reference, check_interface
from quadriga.core.batch import Batch, Tree, call, device_of, evaluating, tensors
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.stacks import Block, blocks_of
from quadriga.methods.structure._gradual import BlockFade, check_gradual
from quadriga.methods.structure._stacks import fill, take_out

log = logging.getLogger(__name__)
BATCHES = 4  # of calibration data: the order of blocks settles soon


def influence(before: Tensor, after: Tensor) -> Tensor:
    """How much a block turns what passes through: 1 − cosine, for each example → [batch].

    Args:
        before, after: [batch, ...], the block's input and output.

    Example:
        >>> influence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([1.])
    """
    return 1 - functional.cosine_similarity(before.flatten(1), after.flatten(1), dim=1)


def influences(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[Block, float]:
    """Mean influence of each block that returns what it takes in shape; the others are left out."""
    seen: dict[Block, list[float | None]] = defaultdict(list)

    def watch(block: Block) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = (next(iter(tensors(part)), None) for part in ((*args, *kwargs.values()), output))
            same = before is not None and after is not None and before.shape == after.shape and before.is_floating_point()
            seen[block].append(float(influence(before, after).double().mean()) if same else None)  # type: ignore[arg-type]

        return hook

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for block in blocks:
            stack.callback(block.module.register_forward_hook(watch(block), with_kwargs=True).remove)
        for batch in batches:
            call(model, batch.to(device_of(model)).inputs)
    whole = {b: [v for v in values if v is not None] for b, values in seen.items() if None not in values}
    return {b: sum(values) / len(values) for b, values in whole.items()}


@dataclass(frozen=True, kw_only=True)
class PruneBlocks(Method):
    """Remove the blocks of a stack that change least what passes through them: encoder layers, residual blocks.

    A block is taken out if its output has the shape of its input, and if the model stands it: a forward that asks for it by
    number is refused. One block of each stack stays.

    Args:
        ratio: share of such blocks that go, in (0, 1); at least one.
        gradual: part of the train step that follows in which the blocks fade, from 0 (they are taken out at once) to 1. A block
            then gives x + gate · (block(x) − x) with a gate that falls from 1 to 0; at the end it is taken out.
        only: blocks to act on: globs of names, comma-separated.

    Example:
        >>> from quadriga.testing import tiny_transformer
        >>> len(PruneBlocks(ratio=0.5)(Setup.of(tiny_transformer())).model.blocks)
        1

    Source: Men et al. 2024, ShortGPT, arXiv:2403.03853; here the cosine is that of an example's whole state.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:2403.03853"
    requires = frozenset({"FLOAT_WEIGHTS"})
    writes = frozenset({"training"})
    search: ClassVar = {"ratio": (0.25, 0.5), "gradual": (0.0, 0.7)}

    ratio: float = 0.25
    gradual: float = 0.0
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_blocks.ratio is {self.ratio!r}", "it is the share that goes, between 0 and 1")
        check_gradual(self.name, self.gradual)

    def needs(self) -> frozenset[str]:
        """Gradual pruning takes place in training."""
        return self.requires | ({"TRAIN_DATA"} if self.gradual else set())

    def apply(self, setup: Setup) -> Setup:
        blocks = [b for b in blocks_of(setup.model) if any(fnmatchcase(b.name, g.strip()) for g in self.only.split(","))]
        if not blocks:
            raise NotApplicable("no stack (ModuleList or Sequential) holds two blocks that match")
        found = influences(setup.model, blocks, setup.context.calibration[:BATCHES])
        if not found:
            raise NotApplicable(f"no block returns the shape that it takes ({blocks[0].name} does not)")
        order = sorted(found, key=found.__getitem__)
        if not self.gradual:
            self._remove(setup.model, setup.context.example, order)
            return replace(setup, model=setup.model)
        before = {b.stack: dict(b.stack._modules) for b in order}
        names = [b.name for b in self._remove(setup.model, setup.context.example, order)]
        for stack, modules in before.items():
            fill(stack, modules)
        training = replace(
            setup.training,
            make_hooks=(*setup.training.make_hooks, lambda model: BlockFade(model, names, self.gradual)),
            finish=(*setup.training.finish, partial(without, names)),
        )
        return replace(setup, training=training)

    def _remove(self, model: nn.Module, example: Tree, order: Sequence[Block]) -> list[Block]:
        wanted, gone, reasons = max(1, round(len(order) * self.ratio)), list[Block](), list[str]()
        reference = Reference.of(model, example)
        for block in order:
            if len(gone) == wanted:
                break
            try:
                take_out(block, lambda: check_interface(model, example, reference))
                gone.append(block)
            except NotApplicable as error:
                reasons.append(f"{block.name}: {error.reason}")
                log.info("prune_blocks leaves %s", reasons[-1])
        if not gone:
            raise NotApplicable(f"no block can be taken out ({'; '.join(reasons[:3])})")
        return gone


def without(names: Sequence[str], model: nn.Module) -> nn.Module:
    """The model with these blocks taken out, which an earlier trial has shown it to stand."""
    for block in [b for b in blocks_of(model) if b.name in names]:
        take_out(block, lambda: None)
    return model
