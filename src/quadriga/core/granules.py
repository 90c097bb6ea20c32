"""Granules of width: in what steps the cost of a layer goes, by the kind of layer and by the side whose width changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import median

from torch import Tensor, nn

from quadriga.core.slots import RuntimeSpec

SIDES = (
    "dense_out", "dense_in", "pointwise_out", "pointwise_in", "depthwise", "grouped_out", "grouped_in",
    "linear_out", "linear_in", "recurrent_out", "recurrent_in",
)  # fmt: skip
LADDER = (1, 2, 4, 8, 16, 32)  # the granules that a measurement can find
BASES = (32, 48, 64, 80)
WIDTHS = tuple(sorted({*(b + step for b in BASES for step in (0, 1, 2, 4, 8)), 96, 112, 128}))  # at which a layer is timed
EXCESS = {1: 0.04, 2: 0.04, 4: 0.04, 8: 0.06, 16: 0.10}  # half of what a staircase of the next step would cost there, or 4 %
FAR = 0.15  # what two widths of a class may not both cost in excess

Counts = Mapping[str, int]  # side → granule


def found(times: Mapping[int, float]) -> int:
    """The granule that a staircase has: the least one whose multiples all cost what their width is worth.

    What a width is worth is read off the line through the multiples of 32 that were timed. Widths are told apart by the
    largest granule that divides them. The multiples of a granule are good if no class of them costs more than its share.

    Args:
        times: width → seconds; the multiples of 32 at both ends and between.

    Example:
        >>> found({w: 1.0 + -(-w // 8) * 8 for w in WIDTHS}), found({w: 1.0 + w for w in WIDTHS})
        (8, 1)
    """
    classes: dict[int, list[float]] = {}
    for width, seconds in times.items():
        classes.setdefault(_class(width), []).append(seconds / _line(times, width) - 1)
    bad = [c for c, excess in classes.items() if c < LADDER[-1] and _dear(sorted(excess), EXCESS[c])]
    return 2 * max(bad, default=0) or 1


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


def _dear(excess: list[float], most: float) -> bool:
    """Whether a class costs too much: in the median, or twice by far."""
    return median(excess) > most or (len(excess) > 1 and excess[-2] > FAR)


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
