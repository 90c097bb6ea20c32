"""Attentions as they are called in a forward pass, and how far two networks' attentions are from each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import log_softmax
from torch.overrides import TorchFunctionMode

LOW = -1e30  # the score of what may not be attended to: finite, so that a row of nothing else is uniform, not NaN


@dataclass(frozen=True)
class Attention:
    """The arguments of one call of `scaled_dot_product_attention`.

    Args:
        query: [batch, heads, queries, width]; key, value: [batch, heads or fewer, keys, width].
        mask: bool (True takes part) or float (added to scores), broadcastable to [batch, heads, queries, keys]; or None.
        causal: each query sees the keys up to its own place.
        scale: of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.query.shape[-2], self.key.shape[-2]

    def log_weights(self) -> Tensor:
        """Logarithms of the attention weights [batch, heads, queries, keys], without dropout."""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        scores = self.query.float() @ key.float().transpose(-2, -1) * self.scale
        if self.mask is not None and self.mask.dtype != torch.bool:
            scores = scores + self.mask
        return log_softmax(self._limited(scores).clamp_min(LOW), -1)

    def log_relation(self, heads: int) -> Tensor:
        """Logarithms of softmax(V Vᵀ / √width) [batch, heads, keys, keys], whole heads joined to so many."""
        joined = self.value.float().unflatten(1, (heads, -1)).transpose(2, 3).flatten(3)
        scores = joined @ joined.transpose(-2, -1) / math.sqrt(joined.shape[-1])
        return log_softmax(self._limited(scores) if self.lengths[0] == self.lengths[1] else scores, -1)

    def _limited(self, scores: Tensor) -> Tensor:
        """Scores without what may not be attended to by any head."""
        allowed = torch.ones(self.lengths, dtype=torch.bool, device=scores.device)
        allowed = allowed.tril() if self.causal else allowed
        if self.mask is not None:
            mask = self.mask if self.mask.dtype == torch.bool else self.mask > -1e4
            mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
            allowed = allowed & (mask if mask.shape[1] in (1, scores.shape[1]) else mask.any(1, keepdim=True))
        return scores.masked_fill(~allowed, LOW)


def attention_of(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Attention:  # fmt: skip
    """The call with these arguments, which are those of `scaled_dot_product_attention`."""
    return Attention(query, key, value, attn_mask, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)


def attention_distance(student: Attention, teacher: Attention) -> Tensor:
    """KL(teacher ‖ student) of the attention weights plus that of the value relations, for each query.

    Weights are compared head by head, or averaged over heads where their numbers differ; value relations have the heads
    that both numbers can be joined to.

    Returns:
        [batch, queries], in nats; the value part is averaged over keys where these are other positions than the queries.

    Example:
        >>> one = attention_of(*torch.randn(3, 2, 4, 5, 8))
        >>> attention_distance(one, one).abs().max().item(), attention_distance(one, one).shape
        (0.0, torch.Size([2, 5]))
    """
    mine, theirs = student.log_weights(), teacher.log_weights()
    if mine.shape[1] != theirs.shape[1]:
        mine, theirs = (t.logsumexp(1, keepdim=True) - math.log(t.shape[1]) for t in (mine, theirs))
    heads = math.gcd(student.value.shape[1], teacher.value.shape[1])
    related = _divergence(student.log_relation(heads), teacher.log_relation(heads))
    same = student.lengths[0] == student.lengths[1]
    return _divergence(mine, theirs) + (related if same else related.mean(1, keepdim=True))


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) [batch, rows] of log probabilities [batch, heads, rows, columns], averaged over heads."""
    return (teacher.exp() * (teacher - student)).sum(-1).mean(1)


@contextmanager
def _replaced(noted: Callable[..., Any]) -> Iterator[None]:
    """`multi_head_attention_forward` calls its attention through `noted`, since within it no mode is asked."""
    plain = functional.scaled_dot_product_attention
    setattr(functional, "scaled_dot_product_attention", partial(noted, plain))  # noqa: B010
    try:
        yield
    finally:
        setattr(functional, "scaled_dot_product_attention", plain)  # noqa: B010


class Calls(TorchFunctionMode):
    """Notes the attentions that are called while it is entered; calls by hand (products and a softmax) are not seen.

    Args:
        made: where they are noted, in order.
    """

    def __init__(self, made: list[Attention]) -> None:
        super().__init__()
        self.made = made

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._noted(func, *args, **(kwargs or {}))
        with _replaced(self._noted) if func is functional.multi_head_attention_forward else nullcontext():
            return func(*args, **(kwargs or {}))

    def _noted(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        one = attention_of(*args, **kwargs)
        if one.query.dim() == 4:
            self.made.append(one)
        return func(*args, **kwargs)


@contextmanager
def overheard(model: nn.Module) -> Iterator[list[Attention]]:
    """The attentions of a model's last forward pass, while this is entered."""
    made: list[Attention] = []
    entered: list[ExitStack] = []

    def begin(module: nn.Module, inputs: Any) -> None:
        made.clear()
        entered.append(ExitStack())
        entered[-1].enter_context(Calls(made))

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        entered.pop().close()

    handles = (model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True))
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()
