"""MobileNetV2 with ImageNet weights, fine-tuned on Fashion-MNIST at 64×64."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from safetensors.torch import load_file
from torch import Tensor, nn

from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.workloads import fetch
from quadriga.workloads.fashion import enlarged, fashion_mnist
from quadriga.workloads.few import few

STAGES = (  # expansion, output channels, blocks, stride of the first: table 2 of the paper
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
SIDE = 64
STEM, HEAD = "features.0.0.weight", "classifier.1."


class ConvNorm(nn.Sequential):
    """Convolution, batch normalization and ReLU6; depthwise with as many groups as channels."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand by 1×1, filter each channel by 3×3, project by 1×1 without activation; a residual where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = [ConvNorm(inputs, hidden, 1)] if expansion != 1 else []
        filtered = ConvNorm(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*expand, filtered, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # [batch, inputs, h, w] → [batch, outputs, h / stride, w / stride]
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1, its parameters named as in torchvision.

    Args:
        channels: of the images.
        classes: of the last layer.

    Source: Sandler et al. 2018, arXiv:1801.04381.

    Example:
        >>> sum(p.numel() for p in MobileNetV2(channels=3, classes=1000).parameters())
        3504872
    """

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        parts: list[nn.Module] = [ConvNorm(channels, 32, 3, 2)]
        inputs = 32
        for expansion, outputs, blocks, stride in STAGES:
            for number in range(blocks):
                parts.append(InvertedResidual(inputs, outputs, stride if number == 0 else 1, expansion))
                inputs = outputs
        self.features = nn.Sequential(*parts, ConvNorm(inputs, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        nn.init.normal_(self.get_parameter("classifier.1.weight"), std=0.01)
        nn.init.zeros_(self.get_parameter("classifier.1.bias"))

    def forward(self, x: Tensor) -> Tensor:  # x[batch, channels, h, w] → [batch, classes]
        return self.classifier(self.features(x).mean((2, 3)))


def gray(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for images of three channels, as weights for one channel, without the classifier.

    The kernels of red, green and blue are added up. For an image that is given to all three channels alike this is exact,
    padding included, since a convolution is linear in its input.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
    return {**kept, STEM: kept[STEM].sum(1, keepdim=True)}


def pretrained(state: Mapping[str, Tensor]) -> MobileNetV2:
    """A network for gray images and ten classes: all but the new last layer has the given weights.

    Raises:
        RuntimeError: a weight is missing, unknown or of another shape.
    """
    model = MobileNetV2()
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(HEAD)}
    model.load_state_dict({**gray(state), **head}, strict=True)
    return model


def workload(
    source: str | None = None, download: bool = False, examples: int | None = None, held_out: int | None = None
) -> Workload:
    """Fashion-MNIST enlarged to 1×64×64; the baseline fine-tunes all weights by AdamW, with a rate that falls to zero.

    The images keep the normalisation of Fashion-MNIST, mean 0 and deviation 1, which is what the ImageNet weights were
    trained on; `quadriga fetch mobilenetv2_fashion` brings them.

    Args:
        source, download: of the data, as in `fashion_mnist`.
        examples: keep that many training images; all by default.
        held_out: keep that many images of val and of test; all by default.

    Raises:
        BadInput: the weights are not in the cache.
    """
    state = load_file(fetch.fetched("mobilenetv2")["model.safetensors"])
    data = enlarged(few(fashion_mnist(pad=0, source=source, download=download), examples, held_out), SIDE)
    steps = (step("optimizer", kind="adamw", lr=0.001), step("schedule", kind="linear"), step("train", epochs=3))
    return Workload(
        model=partial(pretrained, state),
        train=data.train,
        val=data.val,
        test=data.test,
        name="mobilenetv2_fashion",
        batch_size=64,
        baseline=Recipe(steps, "baseline"),
        invariances=frozenset({"horizontal_flip", "translation", "rotation", "color"}),
        data_note={**data.note, "weights": fetch.note("mobilenetv2")},
    )
