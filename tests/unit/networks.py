"""Small networks for the axis graph: each couples its axes in another way."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class LeNet(nn.Module):
    """The mission's network, with its literal in `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.conv1(x), 2)
        x = functional.max_pool2d(self.conv2(x), 2)
        x = functional.dropout(x.view(-1, 400), training=self.training)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Identity() if inside == out else nn.Sequential(nn.Conv2d(inside, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.short(x))


def resnet() -> nn.Module:
    """Residual sums with batch normalization."""
    stem = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    blocks = [Block(8, 8, 1), Block(8, 12, 2), Block(12, 12, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


class Recurrent(nn.Module):
    """Two layers, both directions."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 6), nn.Linear(16, 3)
        self.rnn = kind(6, 8, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.rnn(self.embed(tokens))
        return self.fc(out[:, -1])


class Last(nn.Module):
    """Reads the final states instead of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(4, 7, num_layers=2), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.rnn(x.transpose(0, 1))
        return self.fc(h[-1])


class Concat(nn.Module):
    """Two branches side by side, and a third that is added to both at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 1)
        self.d, self.e, self.fc = nn.Conv2d(10, 5, 3), nn.Conv2d(3, 7, 3), nn.Linear(12 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.a(x), self.b(x)], 1) + self.c(x)
        return self.fc(torch.cat([self.d(joined).relu(), self.e(x)], 1).flatten(1))


class Apart(nn.Module):
    """Two branches side by side that nothing joins: two groups in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(5, 4), nn.Linear(5, 6), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat([self.a(x), self.b(x)], -1).relu())


def grouped() -> nn.Module:
    """Groups, depthwise (with a multiplier too), transposed, per-channel slopes."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.PReLU(8), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=1, groups=12), nn.Conv2d(24, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(5, 3, 1), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(12, 2),
    )  # fmt: skip


class Squeeze(nn.Module):
    """Channels gate each other (squeeze and excitation), then a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.wide, self.fc = nn.Linear(8, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        left, right = self.wide(x.amax((2, 3))).chunk(2, -1)
        return self.fc(left * torch.tanh(right))


class Bare(nn.Module):
    """Parameters without a layer: x · W, einsum, a scale and a tied transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 9)), nn.Parameter(torch.randn(9, 6))
        self.scale, self.inner = nn.Parameter(torch.randn(9)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,ij->bj", torch.relu(x @ self.w) * self.scale, self.v)
        return self.inner(hidden).tanh() @ self.inner.weight


def transposed():
    """A transposed convolution in groups."""
    up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), up, nn.ReLU(), nn.Conv2d(12, 2, 1))


class Projected(nn.Module):
    """An LSTM whose cells are wider than what it hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(4, 9, num_layers=2, proj_size=5, bidirectional=True, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0].mean(1))


class Cells(nn.Module):
    """Recurrent cells, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.fc = nn.LSTMCell(4, 6), nn.GRUCell(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = hidden = None
        for part in x.unbind(1):
            states = self.lstm(part, states)
            hidden = self.gru(states[0], hidden)
        return self.fc(hidden)


class Turned(nn.Module):
    """Two layers whose weights are used transposed, `x @ weight.T`, as Falcon's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 7, bias=False), nn.Linear(7, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up.weight.T) @ self.down.weight.t()


class Windows(nn.Module):
    """Attention with a table of relative positions, one bias a head, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("places", (torch.arange(5)[:, None] - torch.arange(5) + 4).flatten())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.table[self.places].view(5, 5, -1).permute(2, 0, 1)
        mixed = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class TwoInputs(nn.Module):
    """Takes two tensors, returns a nested dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(3, 4)

    def forward(self, a, b):
        total = self.left(a) + self.right(b)
        return {"logits": total, "parts": (total.relu(), None, total.argmax(-1))}
