"""Forms of sequence models: recurrent layers over packed batches, masks, and models of `transformers` as they come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from user_forms import CLASSES, Plain, form, padded, seeded, splits, tokens

LENGTH = 8


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.gru, self.out = nn.Embedding(40, 12), nn.GRU(12, 16, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.table(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.out(self.gru(packed)[1][-1])


class Gathered(Packed):
    """The same network over the padded batch."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        steps = self.gru(self.table(tokens))[0]
        place = (lengths - 1)[:, None, None].expand(-1, 1, steps.size(2))
        return self.out(steps.gather(1, place)[:, 0])


@form("a GRU over packed sequences", out="gathered")
def packed() -> Plain:
    return {"model": seeded(Packed), **padded()}


@form("the same GRU over the padded batch")
def gathered() -> Plain:
    return {"model": seeded(Gathered), **padded()}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.table, self.place = nn.Embedding(40, 16), nn.Parameter(torch.randn(LENGTH, 16) * 0.1)
        self.body, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(tokens.size(1), device=tokens.device) >= lengths[:, None]
        x = self.body(self.table(tokens) + self.place, src_key_padding_mask=mask)
        return self.out((x * ~mask[..., None]).sum(1) / lengths[:, None])


@form("`nn.TransformerEncoder` with a padding mask")
def transformer_encoder() -> Plain:
    return {"model": seeded(Encoder), **padded(LENGTH)}


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(40, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x, mask = self.table(tokens), torch.arange(tokens.size(1), device=tokens.device) >= lengths[:, None]
        return self.out(self.norm(x + self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0])[:, 0])


@form("`nn.MultiheadAttention` with a padding mask")
def multihead_attention() -> Plain:
    return {"model": seeded(Attending), **padded(LENGTH)}


@form("a two-way LSTM, its state passed on in a tuple")
def lstm_states() -> Plain:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(40, 12), nn.Linear(20, CLASSES)
            self.body = nn.LSTM(12, 10, bidirectional=True, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            steps, states = self.body(self.table(x))
            return self.out(steps[:, 0]), states

    return {"model": seeded(States), **tokens()}


def counting(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences that count upwards by one to four, to be continued."""
    steps = torch.randint(1, 5, (count, LENGTH + 1), generator=generator)
    line = (torch.randint(40, (count, 1), generator=generator) + steps.cumsum(1)) % 40
    return line[:, :-1].contiguous(), line[:, 1:].contiguous()


def bits(outputs: Any, target: Tensor) -> float:
    """Bits per token, as the metric bits_per_byte."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else outputs
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()) / torch.log(torch.tensor(2.0)))


def _language(build: Any) -> Plain:
    data = {name: ({"input_ids": x}, y) for name, (x, y) in splits(counting).items()}
    return {"model": seeded(build), **data, "metric": "bits_per_byte", "score": bits, "lr": 0.1}


@form("GPT-2 of `transformers`, its output with a cache")
def gpt2() -> Plain:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    return _language(lambda: GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)))


@form("Llama of `transformers`, its output with a cache")
def llama() -> Plain:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return _language(lambda: LlamaForCausalLM(LlamaConfig(**size, intermediate_size=32, vocab_size=40)))


def _t5() -> Plain:
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    data = {n: {"input_ids": x, "labels": y} for n, (x, y) in splits(counting).items()}
    model = seeded(lambda: T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0)))
    return {"model": model, **data, "metric": "bits_per_byte", "score": bits}


@form("T5 of `transformers` with its labels", out="t5_inputs")
def t5() -> Plain:
    return _t5()


@form("T5 with its decoder's inputs written out")
def t5_inputs() -> Plain:
    data = _t5()
    for name in ("train", "val", "test"):
        x, y = data[name]["input_ids"], data[name]["labels"]
        data[name] = ({"input_ids": x, "decoder_input_ids": torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)}, y)
    return data


@form("BERT for classification, a dict with labels")
def bert_labels() -> Plain:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
    data = {}
    for name, (inputs, y) in padded(LENGTH).items():
        mask = (torch.arange(LENGTH) < inputs["lengths"][:, None]).long()
        data[name] = {"input_ids": inputs["tokens"], "attention_mask": mask, "labels": y}
    config = BertConfig(**size, num_labels=CLASSES, max_position_embeddings=16)
    return {"model": seeded(lambda: BertForSequenceClassification(config)), **data}
