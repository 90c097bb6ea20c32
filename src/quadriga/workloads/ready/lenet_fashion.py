"""The mission's convolutional network on Fashion-MNIST."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.workloads.fashion import fashion_mnist
from quadriga.workloads.few import few


class LeNet(nn.Module):
    """The mission's LeNet, to the letter: 61,706 parameters for images [batch, 1, 32, 32].

    It names ReLU after the fully connected layers only, so there is none after the convolutions: max-pooling is their
    nonlinearity.

    Example:
        >>> sum(p.numel() for p in LeNet().parameters())
        61706
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:  # x[batch, 1, 32, 32]
        x = functional.max_pool2d(self.conv1(x), 2)  # [batch, 6, 14, 14]
        x = functional.max_pool2d(self.conv2(x), 2)  # [batch, 16, 5, 5]
        x = torch.flatten(x, 1)  # [batch, 400]
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        return self.fc3(x)


def workload(
    source: str | None = None, download: bool = False, examples: int | None = None, held_out: int | None = None
) -> Workload:
    """Fashion-MNIST padded to 1×32×32; the baseline is the mission's training, SGD at a constant, tuned rate.

    Args:
        source, download: of the data, as in `fashion_mnist`.
        examples: keep that many training images; all by default.
        held_out: keep that many images of val and of test; all by default.
    """
    data = few(fashion_mnist(pad=2, source=source, download=download), examples, held_out)
    return Workload(
        model=LeNet,
        train=data.train,
        val=data.val,
        test=data.test,
        name="lenet_fashion",
        batch_size=64,
        baseline=Recipe((step("optimizer", kind="sgd", lr=0.1), step("train", epochs=25)), "baseline"),
        invariances=frozenset({"horizontal_flip", "translation", "rotation", "color"}),  # small ones: clothes, mostly upright
        data_note=data.note,
    )
