"""Token dropout: replace some input tokens, by others of the batch or by a blank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, Tree
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import REMEDIES, Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._images import with_transform


def tokens_of(inputs: Tree) -> Tensor | None:
    """The token numbers in a model's inputs: `input_ids`, or the first tensor [batch, length] of int64."""
    if isinstance(inputs, Mapping) and isinstance(inputs.get("input_ids"), Tensor):
        return inputs["input_ids"]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else (inputs,)
    return next((t for t in parts if isinstance(t, Tensor) and t.dtype is torch.int64 and t.dim() == 2), None)


def exchanged(inputs: Tree, old: Tensor, new: Tensor) -> Tree:
    """The inputs with one tensor in another's place."""
    if isinstance(inputs, Mapping):
        return {name: new if t is old else t for name, t in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(new if t is old else t for t in inputs)
    return new


@dataclass(frozen=True, kw_only=True)
class TokenDropout(Method):
    """Replace each input token with some probability; targets stay.

    Only token numbers change: the input `input_ids`, or else the first one of int64 [batch, length]. Where there is an
    `attention_mask`, what it hides neither changes nor is drawn. A token that draws one to be kept stays as it is.

    Args:
        probability: in (0, 1).
        kind: "unigram" (by a token from anywhere in the batch, so that frequent ones come often) or "blank" (by `token`).
        token: the number of the blank.
        keep: tokens that are neither replaced nor drawn, such as those of padding, of beginning and end.

    Source: Xie et al. 2017, arXiv:1703.02573, section 3.1 (unigram and blank noising).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1703.02573"
    search: ClassVar = {"probability": (0.1, 0.05, 0.2), "kind": ("unigram",)}
    requires = frozenset({"TOKENS", "TRAIN_DATA"})

    probability: float = 0.1
    kind: Literal["unigram", "blank"] = "unigram"
    token: int = 0
    keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise BadInput(f"token_dropout.probability is {self.probability}", "give a number in (0, 1)")
        if self.token < 0:
            raise BadInput(f"token_dropout.token is {self.token}", "give the number of a token, 0 or more")

    def apply(self, setup: Setup) -> Setup:
        if tokens_of(setup.context.example) is None:
            raise NotApplicable("no input is one of token numbers", REMEDIES["TOKENS"])
        words = [m.num_embeddings for m in setup.model.modules() if isinstance(m, nn.Embedding)]
        if self.kind == "blank" and words and self.token >= max(words):
            raise NotApplicable(f"the network knows {max(words)} tokens and not {self.token}", "lower token")
        return with_transform(setup, self.transform)

    def transform(self, batch: Batch, moment: Moment) -> Batch:
        """The batch with some tokens replaced."""
        tokens = tokens_of(batch.inputs)
        assert tokens is not None, "apply has seen to it"
        others, barred = torch.full_like(tokens, self.token), self.fixed(tokens, batch.inputs)
        if self.kind == "unigram":
            generator = moment.generator
            place = torch.randint(tokens.numel(), tokens.shape, generator=generator, device=generator.device)
            others, barred = tokens.flatten()[place], barred | barred.flatten()[place]
        chosen = moment.uniform(*tokens.shape) < self.probability
        swapped = torch.where(chosen & ~barred, others, tokens)
        return replace(batch, inputs=exchanged(batch.inputs, tokens, swapped))

    def fixed(self, tokens: Tensor, inputs: Tree) -> Tensor:
        """Which tokens neither change nor are drawn: [batch, length] bool."""
        found = torch.zeros_like(tokens, dtype=torch.bool)
        for token in self.keep:
            found = found | (tokens == token)
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        return found | (mask == 0) if isinstance(mask, Tensor) and mask.shape == tokens.shape else found
