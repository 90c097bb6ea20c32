"""Networks for text, speech and series: recurrent layers and cells, attention of torch.nn, causal convolutions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, cat, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from networks._make import Draw, numbers, tokens, workload


class Reader(nn.Module):
    """Embedding, a recurrent layer, its mean."""

    def __init__(self, kind: type[nn.RNNBase], width: int, **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.body, self.fc = kind(12, 16, batch_first=True, **options), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.embed(x))[0].mean(1))


class Last(nn.Module):
    """Positions first; the last state and the last output, normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.norm, self.fc = nn.Embedding(40, 12), nn.LSTM(12, 16, 2), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.body(self.embed(x).transpose(0, 1))
        return self.fc(self.norm(h[-1] + y[-1]))


class Cells(nn.Module):
    """A cell in a loop, its first state drawn from a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.fc = nn.Embedding(40, 12), nn.LSTMCell(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        state = (x.new_zeros(x.size(0), 10), x.new_zeros(x.size(0), 10))
        for part in x.unbind(1):
            state = self.cell(part, state)
        return self.fc(state[0])


class Attentive(nn.Module):
    """Both directions, weighed by an attention of one score."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score, self.fc = nn.Embedding(40, 12), nn.Linear(20, 1), nn.Linear(20, 3)
        self.body = nn.LSTM(12, 10, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.body(self.embed(x))
        return self.fc((self.score(torch.tanh(y)).softmax(1) * y).sum(1))


class TiedHead(nn.Module):
    """A language model's tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.fc = nn.Embedding(40, 12), nn.LSTM(12, 12, 2, batch_first=True), nn.Linear(40, 3)
        self.head = nn.Linear(12, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.body(self.embed(x))[0][:, -1]))


class Encoder(nn.Module):
    """torch.nn's own encoder, norms before or behind."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed, self.place, self.fc = nn.Embedding(40, 16), nn.Parameter(torch.randn(1, 9, 16) * 0.02), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first, activation="gelu")
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.embed(x) + self.place).mean(1))


class Translator(nn.Module):
    """torch.nn's encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(40, 16), nn.Linear(16, 3)
        self.body = nn.Transformer(16, 4, 2, 2, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.fc(self.body(y, y[:, :4]).mean(1))


class Attention(nn.Module):
    """torch.nn's attention alone, positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend, self.fc = nn.Embedding(40, 16), nn.MultiheadAttention(16, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).transpose(0, 1)
        return self.fc((y + self.attend(y, y, y, need_weights=False)[0]).mean(0))


class GroupedQueries(nn.Module):
    """Two query heads for each key head, repeated by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.fc = nn.Embedding(40, 16), nn.RMSNorm(16), nn.Linear(16, 3)
        self.q, self.k, self.v, self.out = (nn.Linear(16, n, bias=False) for n in (16, 8, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        b, t, _ = y.shape
        q = self.q(y).view(b, t, 4, 4).transpose(1, 2)
        k, v = (f(y).view(b, t, 2, 4).transpose(1, 2).repeat_interleave(2, dim=1) for f in (self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.fc((x + self.out(mixed.transpose(1, 2).reshape(b, t, -1))).mean(1))


class Strokes(nn.Module):
    """Convolutions, then an LSTM over the columns, as for handwriting."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.body, self.fc = nn.LSTM(64, 12, bidirectional=True, batch_first=True), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.a(x)), 2)
        x = functional.max_pool2d(torch.relu(self.b(x)), (2, 1))
        b, c, h, w = x.shape
        return self.fc(self.body(x.permute(0, 3, 1, 2).reshape(b, w, c * h))[0][:, -1])


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.fc = nn.Conv1d(1, 8, 1), nn.Linear(8, 3)
        self.wide = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**i) for i in range(3))
        self.residual, self.skip = (nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), torch.zeros(())
        for wide, residual, skip in zip(self.wide, self.residual, self.skip, strict=True):
            a, b = wide(functional.pad(x, (wide.dilation[0], 0))).chunk(2, 1)
            gated = torch.tanh(a) * torch.sigmoid(b)
            total, x = total + skip(gated), x + residual(gated)
        return self.fc(torch.relu(total).mean(-1))


class WeightNorm(nn.Module):
    """Convolutions whose weights are computed."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Conv1d(n, 8, 3, padding=2**i, dilation=2**i) for i, n in enumerate((4, 8, 8)))
        self.layers, self.fc = nn.ModuleList(parametrizations.weight_norm(one) for one in layers), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.fc(x[:, :, -1])


class Gated(nn.Module):
    """Gated linear units over convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv1d(4, 16, 3, padding=1), nn.Conv1d(8, 12, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.glu(self.b(functional.glu(self.a(x), 1)), 1).mean(-1))


class Both(nn.Module):
    """An LSTM and a convolution side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(40, 12), nn.Conv1d(12, 8, 3, padding=1)
        self.body, self.fc = nn.GRU(12, 6, batch_first=True), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.fc(cat([self.conv(y.transpose(1, 2)).amax(-1), self.body(y)[0][:, -1]], 1))


NETWORKS: dict[str, tuple[object, Draw]] = {
    "gru_both_ways": (partial(Reader, nn.GRU, 32, num_layers=2, bidirectional=True, dropout=0.1), tokens(9)),
    "lstm_projected": (partial(Reader, nn.LSTM, 6, proj_size=6), tokens(9)),
    "rnn_relu": (partial(Reader, nn.RNN, 16, nonlinearity="relu"), tokens(9)),
    "lstm_last": (Last, tokens(9)),
    "lstm_cells": (Cells, tokens(5)),
    "lstm_attentive": (Attentive, tokens(9)),
    "lstm_tied": (TiedHead, tokens(9)),
    "gru_and_conv": (Both, tokens(9)),
    "torch_encoder": (partial(Encoder, False), tokens(9)),
    "torch_encoder_prenorm": (partial(Encoder, True), tokens(9)),
    "torch_transformer": (Translator, tokens(9)),
    "torch_attention": (Attention, tokens(9)),
    "grouped_queries": (GroupedQueries, tokens(9)),
    "crnn": (Strokes, numbers(1, 16, 16)),
    "wavenet": (WaveNet, numbers(1, 32)),
    "tcn_weight_norm": (WeightNorm, numbers(4, 20)),
    "gated_conv": (Gated, numbers(4, 20)),
}
WORKLOADS = {name: partial(workload, name, build, draw) for name, (build, draw) in NETWORKS.items()}
