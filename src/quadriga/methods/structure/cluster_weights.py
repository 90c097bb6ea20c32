"""Weight clustering: every tensor gets a small codebook."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._held import Hold, Keep, weights


def kmeans(values: Tensor, count: int, iterations: int = 100) -> Tensor:
    """Centroids of one-dimensional k-means (Lloyd), from an even grid between the extremes.

    On sorted values a cluster is an interval, so that an iteration costs count · log n. Clusters that lose all members go.

    Args:
        values: [n] float.
        count: of centroids, at least 1.

    Returns:
        float64 [at most count], ascending: each the mean of the values nearest to it, if it converged.

    Example:
        >>> kmeans(torch.tensor([0.0, 0.5, 5.0, 9.0, 9.5]), 3).tolist()
        [0.25, 5.0, 9.25]
    """
    x = values.detach().double().flatten().sort().values
    sums = torch.cat([x.new_zeros(1), x.cumsum(0)])
    centres = torch.linspace(float(x[0]), float(x[-1]), count, dtype=x.dtype, device=x.device).unique()
    for _ in range(iterations):
        ends = torch.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(x))])
        sizes = ends.diff()
        new = ((sums[ends[1:]] - sums[ends[:-1]]) / sizes.clamp_min(1))[sizes > 0]
        if len(new) == len(centres) and torch.equal(new, centres):
            break
        centres = new
    return centres


def nearest(values: Tensor, centres: Tensor) -> Tensor:
    """The place of the nearest centroid of each value, int64 of the values' shape; centres ascend."""
    return torch.searchsorted((centres[1:] + centres[:-1]) / 2, values.detach().double())


def clustered(weight: Tensor, count: int) -> Tensor:
    """The weight with at most `count` values; zeros, where there are any, stay a value of their own.

    Example:
        >>> clustered(torch.tensor([0.0, 0.0, 1.0, 1.2, 8.0]), 3).unique()
        tensor([0.0000, 1.1000, 8.0000])
    """
    zero = weight == 0
    rest = weight[~zero]
    if not len(rest):
        return weight.clone()
    centres = kmeans(rest, max(1, count - int(zero.any())))
    found = centres.to(weight.dtype)[nearest(weight, centres)]
    return torch.where(zero, torch.zeros_like(weight), found)


def hold_clusters(model: nn.Module, limit: int = 256) -> Hold:
    """A hook that keeps weights equal that are equal now: after a step a cluster becomes its members' mean; zeros stay zero."""
    forms: dict[str, Keep] = {}
    for name, p in weights(model):
        values, place = p.detach().unique(return_inverse=True)
        if len(values) <= limit and 2 * len(values) < p.numel():
            forms[name] = _means(values, place)
    return Hold(model, forms)


def _means(values: Tensor, place: Tensor) -> Keep:
    sizes = torch.bincount(place.flatten(), minlength=len(values)).double()

    def keep(weight: Tensor) -> Tensor:
        sums = torch.zeros_like(sizes).index_add_(0, place.flatten(), weight.detach().double().cpu().flatten())
        mean = torch.where(values == 0, 0.0, sums / sizes)
        return mean.to(weight.dtype)[place].to(weight.device)

    return keep


@dataclass(frozen=True, kw_only=True)
class ClusterWeights(Method):
    """Let the weights of each layer share a few values, found by k-means, and keep them shared in the next `train` step.

    Together with `entropy_storage` the files hold a codebook and entropy-coded places in it: much smaller, at the same speed.
    Zeros from `prune_weights` stay zeros. Structure methods belong before it.

    Args:
        bits: each tensor has at most 2**bits values.
        least: elements of a tensor that is worth a codebook.
        only: layers to act on: globs of names, comma-separated.

    Source: Han et al. 2016, Deep Compression, arXiv:1510.00149.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1510.00149"
    requires = frozenset({"FLOAT_WEIGHTS"})
    removes = frozenset({"FLOAT_WEIGHTS"})
    writes = frozenset({"training"})
    search: ClassVar = {"bits": (4, 5, 3)}

    bits: int = 4
    least: int = 128
    only: str = "*"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise BadInput(f"cluster_weights.bits is {self.bits!r}", "give 1 to 8")

    def apply(self, setup: Setup) -> Setup:
        found = [(n, p) for n, p in weights(setup.model, self.only) if p.numel() >= max(self.least, 2 * 2**self.bits)]
        if not found:
            raise NotApplicable(f"no matrix or kernel that matches has {max(self.least, 2 * 2**self.bits)} weights")
        with torch.no_grad():
            for _, p in found:
                p.copy_(clustered(p, 2**self.bits))
        training = setup.training
        return replace(setup, training=replace(training, make_hooks=(*training.make_hooks, hold_clusters)))
