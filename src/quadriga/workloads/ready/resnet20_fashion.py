"""ResNet-20 in its CIFAR form on Fashion-MNIST."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.workloads.fashion import fashion_mnist
from quadriga.workloads.few import few


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # [batch, inputs, h, w] → [batch, outputs, h / stride, w / stride]
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """ResNet-20 for 32×32 images: widths 16, 32, 64, three blocks each, projection shortcuts (option B).

    Source: He et al. 2016, arXiv:1512.03385, section 4.2.

    Example:
        >>> sum(p.numel() for p in ResNet20().parameters())
        272186
    """

    def __init__(self, width: int = 16, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            for number in range(3):
                blocks.append(Block(inputs, outputs, stride if number == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # x[batch, channels, 32, 32]
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.blocks(x).mean((2, 3)))


def workload(
    source: str | None = None, download: bool = False, examples: int | None = None, held_out: int | None = None
) -> Workload:
    """Fashion-MNIST padded to 1×32×32, trained by SGD with momentum.

    Args:
        source, download: of the data, as in `fashion_mnist`.
        examples: keep that many training images; all by default.
        held_out: keep that many images of val and of test; all by default.
    """
    data = few(fashion_mnist(pad=2, source=source, download=download), examples, held_out)
    return Workload(
        model=ResNet20,
        train=data.train,
        val=data.val,
        test=data.test,
        name="resnet20_fashion",
        batch_size=128,
        baseline=Recipe((step("optimizer", kind="sgd", lr=0.1, momentum=0.9), step("train", epochs=10)), "baseline"),
        invariances=frozenset({"horizontal_flip", "translation", "rotation", "color"}),
        data_note=data.note,
    )
