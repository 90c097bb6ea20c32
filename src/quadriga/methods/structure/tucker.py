"""Tucker-2: a convolution as 1×1, a small core with the kernel, and 1×1 again."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._granules import Grain, RoundTo, check_round_to, granules
from quadriga.methods.structure._replace import Layer, kind_of, plain_layers, replace_layers

Conv = nn.Conv1d | nn.Conv2d
LEFT, RIGHT = ("dense_out", "pointwise_in"), ("pointwise_out", "dense_in")  # what writes and reads the core's two ranks
RANKS = frozenset((*LEFT, *RIGHT))


def tucker2(conv: Conv, ranks: tuple[int, int]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Three convolutions near a dense one: in → r₁ (1×1), r₁ → r₀ (kernel, stride, padding), r₀ → out (1×1, with the bias).

    Args:
        conv: weight[out, in, k…], one group.
        ranks: r₀ of the output channels, r₁ of the input channels. The full ranks give the layer itself.

    Source: Kim et al. 2016, arXiv:1511.06530. The factors are tensorly's higher-order orthogonal iteration.

    Example:
        >>> [tuple(m.weight.shape) for m in tucker2(nn.Conv2d(8, 16, 3), (6, 4))]
        [(4, 8, 1, 1), (6, 4, 3, 3), (16, 6, 1, 1)]
    """
    from tensorly.decomposition import partial_tucker

    weight = conv.weight.data
    (core, (left, right)), _ = partial_tucker(weight.double().cpu().numpy(), rank=list(ranks), modes=[0, 1], init="svd")
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    geometry: dict[str, Any] = {k: getattr(conv, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    first = kind_of(conv)(weight.shape[1], ranks[1], 1, bias=False, **like)
    middle = kind_of(conv)(ranks[1], ranks[0], bias=False, **geometry, **like)
    last = kind_of(conv)(ranks[0], weight.shape[0], 1, bias=conv.bias is not None, **like)
    for layer, value in ((first, right.T), (middle, core), (last, left)):
        layer.weight.data.copy_(torch.as_tensor(value.copy()).reshape(layer.weight.shape))
    if conv.bias is not None and last.bias is not None:
        last.bias.data.copy_(conv.bias.data)
    return first, middle, last


def ranks_by_energy(weight: Tensor, energy: float) -> tuple[int, int]:
    """The least ranks of the output and input channels that keep this share of the squared singular values of each unfolding.

    Example:
        >>> weight = torch.zeros(8, 6, 3, 3)
        >>> weight[0, 0], weight[1, 1] = 1.0, 1.0
        >>> ranks_by_energy(weight, 0.99)
        (2, 2)
    """
    found = []
    for mode in (0, 1):
        squares = torch.linalg.svdvals(weight.double().movedim(mode, 0).flatten(1)).square()
        share = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
        found.append(min(len(squares), int((share < energy).sum()) + 1))
    return found[0], found[1]


def weights_share(weight: Tensor, ranks: tuple[int, int]) -> float:
    """Weights of the three layers as a share of the dense one's.

    Example:
        >>> weights_share(torch.ones(16, 8, 3, 3), (6, 4))
        0.2986111111111111
    """
    out, inside = weight.shape[:2]
    left, right = ranks
    return (inside * right + left * right * weight[0, 0].numel() + left * out) / weight.numel()


@dataclass(frozen=True, kw_only=True)
class Tucker(Method):
    """Replace dense convolutions by three small ones, by Tucker decomposition over the channels, where that pays.

    Needs tensorly (the extra "structure"). 1×1 kernels are what `low_rank` is for; they are left, as are tied layers,
    groups, and layers that would not become smaller.

    Args:
        energy: share of the squared singular values of each unfolding that is kept, in (0, 1).
        ratio: instead of energy, the share of both channel counts that is kept, in (0, 1).
        round_to: ranks are multiples, rounded up for energy and to the nearest for ratio. "auto": the steps of width that the
            recipe's runtime takes at full speed in its precision, measured once on a machine. A table gives them by kind of
            layer.
        only: layers to act on: globs of names, comma-separated.

    Source: Kim et al. 2016, arXiv:1511.06530.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1511.06530"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"ratio": (0.5, 0.35, 0.7)}

    energy: float = 0.9
    ratio: float | None = None
    round_to: RoundTo = "auto"
    only: str = "*"

    def __post_init__(self) -> None:
        for name in ("energy", "ratio"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise BadInput(f"tucker.{name} is {value!r}", "it is a share between 0 and 1")
        check_round_to(self.name, self.round_to)

    def apply(self, setup: Setup) -> Setup:
        if find_spec("tensorly") is None:
            raise NotApplicable("tucker needs tensorly, which is not installed", 'pip install "quadriga[structure]"')
        layers = {n: m for n, m in plain_layers(setup.model, self.only) if not isinstance(m, nn.Linear)}
        known = granules(self.round_to, RANKS if layers else (), setup)
        grain = (Grain.joined(known[s] for s in LEFT), Grain.joined(known[s] for s in RIGHT)) if layers else (Grain(), Grain())

        def make(name: str, layer: Layer) -> nn.Module:
            return self._make(name, layer, grain)

        return replace_layers(setup, layers, make, "tucker pays in no layer", "dense convolution")

    def _make(self, name: str, layer: Layer, grain: tuple[Grain, Grain]) -> nn.Module:
        assert not isinstance(layer, nn.Linear)
        if layer.weight[0, 0].numel() == 1:
            raise NotApplicable(f"{name} has a kernel of one position")
        ranks = self._ranks(layer.weight.data, grain)
        share = weights_share(layer.weight, ranks)
        if share >= 1:
            raise NotApplicable(f"{name} would have {share:.2f} of its weights at ranks {ranks}")
        return nn.Sequential(*tucker2(layer, ranks))

    def _ranks(self, weight: Tensor, grain: tuple[Grain, Grain]) -> tuple[int, int]:
        if self.ratio is None:
            least = ranks_by_energy(weight, self.energy)
            left, right = (min(n, g.up(rank)) for n, rank, g in zip(weight.shape[:2], least, grain, strict=True))
        else:
            left, right = (g.near(n * self.ratio, n) for n, g in zip(weight.shape[:2], grain, strict=True))
        return left, right
