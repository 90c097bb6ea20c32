"""Low rank: a matrix as the product of two thin ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.axes import opened
from quadriga.core.batch import Tree, call, evaluating, resize
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Arm, Setup
from quadriga.methods.structure._granules import Grain, RoundTo, check_round_to, granules, layer_sides
from quadriga.methods.structure._moments import moments
from quadriga.methods.structure._replace import Layer, kind_of, plain_layers, replace_layers

BATCHES = 8  # of calibration data for covariances


def factorize(layer: Layer, rank: int, root: Tensor | None = None) -> tuple[Layer, Layer]:
    """The best approximation of a layer by two of that rank: `up(down(x)) ≈ layer(x)` (Eckart–Young).

    Args:
        layer: a Linear with weight[m, n], or a convolution with weight[m, channels, k…] and one group, read as
            a matrix [m, n] with n = channels·k…; then `down` has the kernel, stride and padding, and `up` is 1×1.
        rank: from 1 to min(m, n).
        root: lower triangular S with S Sᵀ = E[x xᵀ] of what the layer reads, [n, n]: then the mean squared error of the
            outputs on these data is least, instead of that of the weights.

    Returns:
        down (n → rank, without bias) and up (rank → m, with the layer's bias); singular values are shared evenly.

    Raises:
        ValueError: the rank is out of range, or the convolution has groups.

    Example:
        >>> down, up = factorize(nn.Linear(32, 24), 6)
        >>> down.weight.shape, up.weight.shape
        (torch.Size([6, 32]), torch.Size([24, 6]))
    """
    matrix = layer.weight.data.flatten(1)
    if not 1 <= rank <= min(matrix.shape) or getattr(layer, "groups", 1) != 1:
        raise ValueError(f"rank {rank} for {layer}; give 1 to {min(matrix.shape)}, and a convolution with one group")
    u, s, v = torch.linalg.svd(weighed(matrix, root), full_matrices=False)
    half, v = s[:rank].sqrt(), v[:rank]
    if root is not None:
        v = torch.linalg.solve_triangular(root, v, upper=False, left=False)
    down, up = _pair(layer, rank)
    down.weight.data.copy_((half[:, None] * v).reshape(down.weight.shape))
    up.weight.data.copy_((u[:, :rank] * half).reshape(up.weight.shape))
    if layer.bias is not None and up.bias is not None:
        up.bias.data.copy_(layer.bias.data)
    return down, up


def weighed(weight: Tensor, root: Tensor | None = None) -> Tensor:
    """The matrix whose singular values count: the weight itself, or W S, whose squares add up to the outputs' mean square."""
    matrix = weight.data.flatten(1).double()
    return matrix if root is None else matrix @ root


def _pair(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False, **like), nn.Linear(rank, layer.out_features, bias=bias, **like)
    geometry: dict[str, Any] = {k: getattr(layer, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    kind = kind_of(layer)
    down = kind(layer.in_channels, rank, bias=False, **geometry, **like)
    return down, kind(rank, layer.out_channels, 1, bias=bias, **like)


def break_even(weight: Tensor) -> float:
    """The rank m·n / (m + n) from which on two factors hold as many numbers, and cost as many products, as one matrix.

    Example:
        >>> break_even(torch.ones(100, 100))
        50.0
    """
    m, n = weight.flatten(1).shape
    return m * n / (m + n)


def rank_by_energy(weight: Tensor, energy: float, root: Tensor | None = None) -> int:
    """The least rank that keeps this share of the squared singular values; with `root`, of the outputs' mean square."""
    squares = torch.linalg.svdvals(weighed(weight, root)).square()
    share = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
    return min(len(squares), int((share < energy).sum()) + 1)


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Replace Linear and convolution layers by two thin ones where that pays.

    A layer is left alone when it is tied, when its rank reaches break-even, or when the model reads its weight directly.

    Args:
        energy: share of the squared singular values that each layer keeps, in (0, 1).
        ratio: instead of energy, the share of its weights that each layer keeps, in (0, 1).
        latency: instead of energy, the share of its latency that each layer may keep, in (0, 1): the largest rank is taken
            whose two layers are that fast, timed at batch 1 in the runtime that the recipe ends in.
        whiten: weigh errors by the covariance of what the layer reads, over calibration data, so that its outputs change
            least, and energy is theirs.
        round_to: ranks are multiples, rounded up for energy and down for ratio and latency. "auto": the steps of width that the
            recipe's runtime takes at full speed in its precision, measured once on a machine. A table gives them by kind of
            layer.
        only: layers to act on: globs of names, comma-separated.

    Source: Denton et al. 2014, arXiv:1404.0736; Eckart and Young 1936; Wang et al. 2024, SVD-LLM, arXiv:2403.07378 (whiten).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1404.0736"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"energy": (0.9, 0.8, 0.95), "whiten": (False, True)}

    energy: float = 0.9
    ratio: float | None = None
    latency: float | None = None
    whiten: bool = False
    round_to: RoundTo = "auto"
    only: str = "*"

    def __post_init__(self) -> None:
        for name in ("energy", "ratio", "latency"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise BadInput(f"low_rank.{name} is {value!r}", "it is a share between 0 and 1")
        check_round_to(self.name, self.round_to)
        if self.ratio is not None and self.latency is not None:
            raise BadInput("low_rank has both ratio and latency", "give one of them")

    def apply(self, setup: Setup) -> Setup:
        with opened(setup.model):
            return self._factorize(setup)

    def _factorize(self, setup: Setup) -> Setup:
        layers = dict(plain_layers(setup.model, self.only))
        roots = self._roots(setup, layers)
        grain = self._grain(setup, layers)
        ranks = self._timed(setup, layers, grain) if self.latency is not None else {}

        def make(name: str, layer: Layer) -> nn.Module:
            rank = ranks[name] if name in ranks else self._rank(layer, roots.get(name), grain[name])
            limit = break_even(layer.weight)
            if not rank:
                raise NotApplicable(f"{name}: two thin layers do not take {self.latency} of its time at any rank")
            if rank >= limit:
                steps = f" in steps of {grain[name].step}" if grain[name].step > 1 else ""
                raise NotApplicable(f"{name} needs rank {rank}{steps}, break-even is {limit:.1f}")
            return nn.Sequential(*factorize(layer, rank, roots.get(name)))

        return replace_layers(setup, layers, make, "low rank pays in no layer", "untied Linear or convolution")

    def _roots(self, setup: Setup, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
        if not self.whiten:
            return {}
        found = moments(setup.model, layers, setup.context.calibration[:BATCHES])
        return {name: torch.linalg.cholesky(m.second()) for name, m in found.items()}

    def _grain(self, setup: Setup, layers: Mapping[str, Layer]) -> dict[str, Grain]:
        """For each layer the step of its rank, which one thin layer writes and the other reads."""
        ends = {name: [*layer_sides(layer, "out"), *_second(layer)] for name, layer in layers.items()}
        known = granules(self.round_to, {side for sides in ends.values() for side in sides}, setup)
        return {name: Grain.joined(known[side] for side in sides) for name, sides in ends.items()}

    def _rank(self, layer: Layer, root: Tensor | None, grain: Grain) -> int:
        if self.ratio is not None:
            return down_to(int(self.ratio * break_even(layer.weight)), grain)
        return grain.up(rank_by_energy(layer.weight, self.energy, root))

    def _timed(self, setup: Setup, layers: Mapping[str, Layer], grain: Mapping[str, Grain]) -> dict[str, int]:
        """The largest rank of each layer that is fast enough, 0 if none; measured once, and another process is told."""
        time, spec = setup.context.time, setup.context.runtime
        if time is None:
            raise NotApplicable("low_rank.latency needs measuring, and there is no clock here", "give ratio or energy")

        def measured() -> dict[str, int]:
            inputs = inputs_of(setup.model, layers, resize(setup.context.example, 1))
            share = self.latency or 1
            return {n: fast_rank(layers[n], x, share, lambda arms: time(arms, spec), grain[n]) for n, x in inputs.items()}

        return setup.context.decide(f"low_rank {self.latency} {self.only}", measured)  # type: ignore[no-any-return]


def inputs_of(model: nn.Module, layers: Mapping[str, Layer], example: Tree) -> dict[str, Tensor]:
    """What each layer reads when the model is called with the example; the last call, of a layer that is called often."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for name, layer in layers.items():
            hook = lambda _, args, name=name: found.update({name: args[0].detach().clone()})  # noqa: E731
            stack.callback(layer.register_forward_pre_hook(hook).remove)
        call(model, example)
    return found


def down_to(rank: int, grain: Grain) -> int:
    """The largest rank of a grain that is not above, or its least.

    Example:
        >>> down_to(27, Grain(8, 8)), down_to(3, Grain(8, 8)), down_to(0, Grain())
        (24, 8, 1)
    """
    return max((w for w in grain.widths(rank + 1) if w <= rank), default=grain.up(1))


def _second(layer: Layer) -> list[str]:
    """What the second thin layer reads by: a convolution's is 1×1."""
    return ["linear_in" if isinstance(layer, nn.Linear) else "pointwise_in"]


def fast_rank(
    layer: Layer, x: Tensor, share: float, time: Callable[[Sequence[Arm]], list[float]], grain: Grain | None = None
) -> int:
    """The largest of eight ranks up to break-even whose two layers take at most this share of the layer's time; 0 if none."""
    ranks = sorted({down_to(int(break_even(layer.weight) * k / 8), grain or Grain()) for k in range(1, 9)})
    ranks = [rank for rank in ranks if rank <= min(layer.weight.flatten(1).shape)]
    if not ranks:
        return 0
    whole, *thin = time([(layer, x), *((nn.Sequential(*factorize(layer, rank)), x) for rank in ranks)])
    return max((rank for rank, seconds in zip(ranks, thin, strict=True) if seconds <= share * whole), default=0)
