"""Granules of width: in what steps the cost of a layer goes, by the kind of layer and by the side whose width changes.

Below one granule there may be another rule: ONNX Runtime computes convolutions of float32 in blocks of 16 channels, and those
of fewer channels without blocks. So a kind of layer has a least width too, down to which halves of a granule pay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import median

from torch import Tensor, nn

from quadriga.core.slots import RuntimeSpec

SIDES = (
    "dense_out", "dense_in", "pointwise_out", "pointwise_in", "depthwise", "grouped_out", "grouped_in",
    "linear_out", "linear_in", "recurrent_out", "recurrent_in",
)  # fmt: skip
LEASTS = ("dense_least", "pointwise_least", "depthwise_least", "grouped_least")
LADDER = (1, 4, 8, 16, 32)  # the granules that a measurement can find
WIDTHS = (32, 33, 36, 40, 48, 49, 52, 56, 64, 65, 68, 72, 80, 96)  # at which a layer is timed
EXCESS = {1: 0.07, 4: 0.05, 8: 0.07, 16: 0.13}  # about half of what a staircase with the next step but one would cost there
HALVES = (4, 8, 16, 32)  # widths at which a kind of layer is timed for its least one
WORTH = 0.9  # of its time is the most that half of a width may take

Counts = Mapping[str, int]  # side → granule


def found(times: Mapping[int, float]) -> int:
    """The granule that a staircase has: the least one whose multiples all cost what their width is worth.

    What a width is worth is read off the line through the multiples of 32 that were timed. Widths are told apart by the
    largest granule that divides them. The multiples of a granule are good if no such class costs more than that, in the median.

    Args:
        times: width → seconds; the multiples of 32 at both ends and between.

    Example:
        >>> found({w: 1.0 + -(-w // 8) * 8 for w in WIDTHS}), found({w: 1.0 + w for w in WIDTHS})
        (8, 1)
    """
    classes: dict[int, list[float]] = {}
    for width, seconds in times.items():
        classes.setdefault(_class(width), []).append(seconds / _line(times, width) - 1)
    bad = [c for c in LADDER[:-1] if c in classes and median(classes[c]) > EXCESS[c]]
    return next(g for g in LADDER if g > max(bad, default=0))


def _class(width: int) -> int:
    return max(g for g in LADDER if width % g == 0)


def _line(times: Mapping[int, float], width: int) -> float:
    """Seconds at a width, interpolated between multiples of 32."""
    last = LADDER[-1]
    below, above = width // last * last, -(-width // last) * last
    if below == above:
        return times[width]
    share = (width - below) / last
    return (1 - share) * times[below] + share * times[above]


def least(times: Mapping[int, float]) -> int:
    """The least width that is worth cutting to: from 32 down, halves as long as each takes clearly less time.

    Args:
        times: width → seconds, at `HALVES`.

    Example:
        >>> least({4: 1.0, 8: 1.0, 16: 1.3, 32: 2.0}), least({4: 1.0, 8: 1.4, 16: 1.0, 32: 2.0})
        (8, 16)
    """
    width = max(HALVES)
    while width > min(HALVES) and times[width // 2] <= WORTH * times[width]:
        width //= 2
    return width


def default(side: str, spec: RuntimeSpec) -> int:
    """The granule where nothing can be measured.

    On a GPU it is what tensor cores ask for. On a CPU convolutions have blocks of channels, and matrices hardly any.

    Example:
        >>> default("dense_out", RuntimeSpec()), default("linear_in", RuntimeSpec())
        (8, 1)
        >>> default("linear_in", RuntimeSpec("inductor", device="cuda", weights="bf16"))
        8
    """
    int8 = spec.quant is not None and spec.quant.activations != "none"
    if spec.device != "cpu":
        half = spec.weights != "fp32" or spec.autocast != "none"
        return 16 if int8 else 8 if half else 4 if spec.tf32 else 1
    if int8:
        return 16
    return 1 if side.startswith(("linear", "recurrent")) else 8


def defaults(sides: Collection[str], spec: RuntimeSpec) -> dict[str, int]:
    """`default` of several sides."""
    return {side: default(side, spec) for side in sides}


def kind(layer: nn.Module | None, weight: Tensor) -> str:
    """The kind of layer that a weight is multiplied in, as the names of `SIDES` begin; "" for what is looked up or scaled.

    Args:
        layer: that has the weight; None or a stranger's class is judged by the weight's shape.
        weight: of at least one dimension.
    """
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) or weight.dim() < 2:
        return ""
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    if weight.dim() == 2:
        return "linear"
    groups = getattr(layer, "groups", 1)
    if isinstance(groups, int) and groups > 1:
        return "depthwise" if 1 in (weight.shape[1], weight.shape[0] // groups) else "grouped"
    return "pointwise" if all(k == 1 for k in weight.shape[2:]) else "dense"
