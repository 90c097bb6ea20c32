"""A small decoder-only transformer over the bytes of Shakespeare's plays."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.workloads.few import few
from quadriga.workloads.plays import shakespeare

SIZES = {"0.8M": (4, 128, 4), "2M": (4, 192, 6), "10M": (6, 384, 6)}  # layers, width, heads
CONTEXT = 128


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # x[batch, time, width]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # [batch, heads, time, width / heads]
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder-only transformer over bytes, vocabulary 256, learned positions, untied head.

    Args:
        layers, width, heads: its size.
        context: the longest input.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """

    def __init__(self, layers: int, width: int, heads: int, context: int = CONTEXT) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # residual branches start smaller, so that the sum over layers keeps its scale
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # tokens[batch, time] int64 → logits[batch, time, 256]
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


def workload(size: str = "0.8M", examples: int | None = None, held_out: int | None = None) -> Workload:
    """Next-byte prediction in windows of 128 bytes, measured in bits per byte on plays that were held out.

    Args:
        size: "0.8M", "2M" or "10M" parameters in the blocks; 875,264, 1,902,720 or 10,893,312 with the embeddings.
        examples: keep that many training windows; all by default, about 30,000.
        held_out: keep that many windows of val and of test; all by default.

    Raises:
        BadInput: an unknown size.
    """
    if size not in SIZES:
        raise BadInput(f'gpt_shakespeare has no size "{size}"', did_you_mean(size, SIZES))
    data = few(shakespeare(context=CONTEXT), examples, held_out)
    return Workload(
        classes_dim=-1,
        model=partial(GPT, *SIZES[size]),
        train=data.train,
        val=data.val,
        test=data.test,
        metric="bits_per_byte",
        name="gpt_shakespeare",
        batch_size=32,
        baseline=Recipe((step("optimizer", kind="adamw", lr=0.001), step("train", epochs=1)), "baseline"),
        data_note={**data.note, "size": size},
    )
