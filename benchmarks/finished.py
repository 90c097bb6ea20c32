"""Finished models as workloads, each trained once: what is left is to run them where they are fastest.

Of the GPT two: a prefill of 128 bytes, and one byte of decoding with a key-value cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.data import TensorData
from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.engine.walk import walk
from quadriga.workloads import load
from quadriga.workloads.plays import shakespeare
from quadriga.workloads.ready.gpt_shakespeare import CONTEXT, GPT

PAST = CONTEXT - 1  # bytes that are known already
ROWS = 256  # examples of a split: each holds the keys and values of all layers


class Decode(nn.Module):
    """A GPT that reads one byte, and the keys and values of those before it.

    Args:
        gpt: its weights are shared.
    """

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, token: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step.

        Args:
            token: [batch, 1] int64.
            keys, values: [batch, layers, heads, past, width / heads].

        Returns:
            logits [batch, 1, 256], and keys and values with one position more.
        """
        past = keys.shape[3]
        x = self.gpt.token(token) + self.gpt.position(torch.arange(past, past + 1, device=token.device))
        grown: list[tuple[Tensor, Tensor]] = []
        for number, block in enumerate(self.gpt.blocks):
            q, k, v = (t.unflatten(-1, (block.heads, -1)).transpose(1, 2) for t in block.qkv(block.norm1(x)).chunk(3, -1))
            k, v = torch.cat([keys[:, number], k], 2), torch.cat([values[:, number], v], 2)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + block.out(y.transpose(1, 2).flatten(2))
            x = x + block.down(functional.gelu(block.up(block.norm2(x))))
            grown.append((k, v))
        return self.gpt.head(self.gpt.norm(x)), *(torch.stack(list(part), 1) for part in zip(*grown, strict=True))


def prefill(gpt: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all layers, [batch, layers, heads, time, width / heads] each, after reading tokens [batch, time]."""
    found: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.qkv.register_forward_hook(lambda m, args, out, b=block: found.append(_split(out, b.heads)))
        for block in gpt.blocks
    ]
    with torch.no_grad():
        gpt(tokens)
    for handle in handles:
        handle.remove()
    keys, values = (torch.stack(list(part), 1) for part in zip(*found, strict=True))
    return keys, values


def _split(projected: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    _, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in projected.chunk(3, -1))
    return k, v


def decoding(gpt: GPT, rows: int = ROWS) -> Workload:
    """The last byte of windows of 128, the cache of the first 127 given; its bits per byte are those of the whole model there.

    Args:
        gpt: trained.
        rows: examples of each split.
    """
    gpt = gpt.eval()
    splits = shakespeare()
    parts = {name: _cached(gpt, getattr(splits, name), rows) for name in ("train", "val", "test")}
    return Workload(model=Decode(gpt), **parts, metric="bits_per_byte", batch_size=32, trained=True, name="gpt_decode")


GPT_RECIPE = Recipe((step("optimizer", kind="adamw", lr=0.002), step("schedule", kind="one_cycle"), step("train", epochs=0.15)))
KEPT = Path(__file__).resolve().parents[1] / "out/hardware"


def trained(source: Workload, recipe: Recipe | None = None) -> nn.Module:
    """Its model after the workload's own training, or a recipe; trained once, its checkpoint kept below `KEPT`."""
    folder = KEPT / f"{source.name}-trained"
    return walk(source, recipe or source.baseline or Recipe(), seed=0, store=folder).setup.model.eval()


def finished(source: Workload, model: nn.Module, name: str) -> Workload:
    """The workload as one who has only to run the model sees it."""
    return replace(source, model=model, trained=True, baseline=None, batch_size=64, name=name)


def gpt() -> tuple[Workload, GPT]:
    """gpt_shakespeare with 2 M parameters, after the AdamW run that `train_cost.py` tuned."""
    source = load("gpt_shakespeare?size=2M")
    model = trained(source, GPT_RECIPE)
    assert isinstance(model, GPT)
    return source, model


def decode() -> Workload:
    """One byte with a cache of 127."""
    return decoding(gpt()[1])


def prefill_128() -> Workload:
    """128 bytes at once."""
    source, model = gpt()
    return finished(source, model, "gpt_prefill")


def resnet20_fashion() -> Workload:
    """After its own training of ten epochs."""
    source = load("resnet20_fashion")
    return finished(source, trained(source), "resnet20_fashion")


def lstm_wordnet() -> Workload:
    """After its own training of three epochs."""
    source = load("lstm_wordnet")
    return finished(source, trained(source), "lstm_wordnet")


def _cached(gpt: GPT, data: TensorData, rows: int) -> TensorData:
    batch = data.batch(torch.linspace(0, len(data) - 1, min(rows, len(data))).long())
    keys, values = prefill(gpt, batch.inputs[:, :PAST])
    return TensorData((batch.inputs[:, PAST:].contiguous(), keys, values), batch.target[:, PAST:].contiguous())
