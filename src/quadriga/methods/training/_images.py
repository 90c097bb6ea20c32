"""What transforms of images share: rectangles as masks, pairs to be mixed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quadriga.core.batch import Tree, tensors, tree_map
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment, Transform


def with_transform(setup: Setup, transform: Transform) -> Setup:
    """The setup with one more transform behind those that stand there."""
    return replace(setup, training=replace(setup.training, transforms=(*setup.training.transforms, transform)))


def boxes(top: Tensor, left: Tensor, tall: Tensor, wide: Tensor, size: tuple[int, int]) -> Tensor:
    """Rectangles as masks [batch, 1, height, width], True inside.

    Args:
        top, left: [batch], the first row and column.
        tall, wide: [batch], sides; 0 for none. What lies outside of the image is cut off.
        size: height and width of the images.

    Example:
        >>> one, two = torch.tensor([1]), torch.tensor([2])
        >>> boxes(one, one, one, two, (2, 4)).int().tolist()
        [[[[0, 0, 0, 0], [0, 1, 1, 0]]]]
    """
    rows, columns = (torch.arange(n, device=top.device) for n in size)
    high = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    broad = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    return (high[:, :, None] & broad[:, None, :])[:, None]


def beta(alpha: float, count: int, moment: Moment) -> Tensor:
    """Draws [count] float64 from Beta(alpha, alpha) by the moment's generator.

    A quotient of Gamma draws; for an alpha so small that both of a pair vanish, 1, which is one of its two likely values.
    """
    if alpha == 1:
        return moment.uniform(count).double()
    device = moment.generator.device
    shape = torch.full((2, count), alpha, dtype=torch.float64, device=device)
    one, other = torch._standard_gamma(shape, generator=moment.generator)  # Beta of torch.distributions takes no generator
    return (one / (one + other)).nan_to_num_(nan=1.0)


def partners(count: int, moment: Moment) -> Tensor:
    """Whom each example of a batch is mixed with: a permutation [count]."""
    return torch.randperm(count, generator=moment.generator, device=moment.generator.device)


def along(values: Tensor, other: Tensor) -> Tensor:
    """Values [batch], in the type of another tensor [batch, ...] and to be multiplied with it."""
    return values.to(other.dtype).view(-1, *(1,) * (other.dim() - 1))


def mix(tree: Tree, partner: Tensor, share: Tensor) -> Tree:
    """share · own + (1 - share) · the partner's, of every tensor [batch, ...] of a tree.

    Example:
        >>> mix(torch.tensor([0.0, 8.0]), torch.tensor([1, 0]), torch.tensor([0.75, 1.0])).tolist()
        [2.0, 8.0]
    """
    return tree_map(lambda t: torch.lerp(t[partner], t, along(share, t)), tree)


def all_floating(tree: Tree) -> bool:
    """Whether a tree's tensors are numbers that can be averaged."""
    return all(t.is_floating_point() for t in tensors(tree))
