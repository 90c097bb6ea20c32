"""Layers whose weights cannot be cut as they lie, in a form that computes the same and can.

`nn.MultiheadAttention` packs queries, keys and values into one parameter and takes its width for heads · head width, so it can
lose no head: the open form has four Linear layers, and as many heads as its projections are wide. A layer under `weight_norm`
computes its weight from a direction and a length, and the length goes by all inputs: the open form is the plain layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import _WeightNorm

from quadriga.core.axes.patch import Patch
from quadriga.core.copies import copy_model


class OpenAttention(nn.Module):
    """Attention with the call of `nn.MultiheadAttention`.

    Args:
        like: the module whose weights to take over, without `bias_k`, `bias_v` and `add_zero_attn`.

    Example:
        >>> closed = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> x = torch.randn(3, 5, 8)
        >>> torch.allclose(OpenAttention(closed).eval()(x, x, x)[0], closed(x, x, x)[0], atol=1e-6)
        True
    """

    in_proj_bias = None  # what nn.TransformerEncoder looks at before it takes its fused path, which reads packed weights
    _qkv_same_embed_dim = False

    def __init__(self, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.batch_first, self.dropout, self.head_dim = like.batch_first, like.dropout, like.head_dim
        packed = like.in_proj_weight is not None
        weights = like.in_proj_weight.chunk(3) if packed else (like.q_proj_weight, like.k_proj_weight, like.v_proj_weight)
        biases = [None] * 3 if like.in_proj_bias is None else like.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(like.out_proj.weight, like.out_proj.bias)

    @property
    def num_heads(self) -> int:
        """As many as the projections are wide."""
        return self.q_proj.out_features // self.head_dim

    @property
    def embed_dim(self) -> int:
        """Width of the queries and of the output."""
        return self.q_proj.in_features

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `nn.MultiheadAttention.forward`: boolean masks are True where a position is not attended to."""
        if query.dim() == 2:
            padding = None if key_padding_mask is None else key_padding_mask[None]
            q, k, v = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
            output, weights = self.forward(q, k, v, padding, need_weights, attn_mask, average_attn_weights, is_causal)
            return output.squeeze(0 if self.batch_first else 1), None if weights is None else weights.squeeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else _joined(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed, told = weights @ v, weights.mean(1) if average_attn_weights else weights
        else:
            mixed, told = functional.scaled_dot_product_attention(q, k, v, mask, dropout, hint), None
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return output if self.batch_first else output.transpose(0, 1), told

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, positions, heads · head_dim] → [batch, heads, positions, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def merge_masks(self, *args: object) -> None:
        """Only the fused path of nn.TransformerEncoderLayer calls this."""
        raise AssertionError("the fused path reads packed weights")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _joined(attn_mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """One mask that is added to scores [batch, heads, queries, keys]."""
    if attn_mask is not None:
        attn_mask = _added(attn_mask, query)
        attn_mask = attn_mask.view(query.shape[0], -1, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask
    if padding is None:
        return attn_mask
    padding = _added(padding, query)[:, None, None]
    return padding if attn_mask is None else attn_mask + padding


def _added(mask: Tensor, query: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


@contextmanager
def opened(model: nn.Module) -> Iterator[nn.Module]:
    """Put attention and weight-normalized layers into their open form; back again if what is done inside raises.

    Attention of a subclass, with tied weights, hooks, `bias_k` or `add_zero_attn`, and other parametrizations stay as they are.
    """
    patch, names = Patch(), _names(model)
    for path, module in list(model.named_modules()):
        if path and type(module) is nn.MultiheadAttention and _plain(module, names):
            patch.module(model, path, OpenAttention(module))
        elif path and _weight_normed(module):
            patch.module(model, path, _without_norm(module))
    try:
        yield model
    except BaseException:
        patch.undo()
        raise


def _weight_normed(module: nn.Module) -> bool:
    held = module._modules.get("parametrizations")
    listed = held.items() if isinstance(held, nn.ModuleDict) else ()
    return [(name, [type(p) for p in one]) for name, one in listed] == [("weight", [_WeightNorm])]  # type: ignore[attr-defined]


def _without_norm(module: nn.Module) -> nn.Module:
    """The plain layer. The class of a parametrized one is its own, and a copy shares it: torch's removal would break both."""
    plain = copy_model(module)
    learned = any(p.requires_grad for p in module.parametrizations.parameters())  # type: ignore[union-attr]
    weight = nn.Parameter(module.weight.detach().clone(), learned)  # type: ignore[operator]
    del plain._modules["parametrizations"]
    plain.__class__ = type(module).__mro__[1]
    plain.register_parameter("weight", weight)
    return plain


def _plain(module: nn.MultiheadAttention, names: dict[int, int]) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    own = all(names[id(p)] == 1 for p in module.parameters())
    return module.bias_k is None and not module.add_zero_attn and not any(hooks) and own


def _names(model: nn.Module) -> dict[int, int]:
    """id of a parameter → how many modules hold it."""
    found: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found
