"""RandAugment: a few random operations of equal strength on each training image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from quadriga.core.batch import Batch, tree_map
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._images import with_transform
from quadriga.methods.training._operations import COLOURS, SHIFTS, TURNS, geometry, identities, sample

MAGNITUDES = 30  # magnitude of full strength
Round = tuple[list[tuple[str, slice]], Tensor, Tensor]  # shares of an order, the order [batch], signs [batch]


def operations(invariances: frozenset[str], channels: int) -> tuple[str, ...]:
    """The operations that keep labels; "identity" is one of them when there is another."""
    colours = tuple(name for name in COLOURS if channels == 3 or name != "saturation")
    found = {"rotation": tuple(TURNS), "translation": tuple(SHIFTS), "color": colours}
    names = tuple(name for invariance, group in found.items() if invariance in invariances for name in group)
    return ("identity", *names) if names else ()


def draw(names: Sequence[str], count: int, rounds: int, moment: Moment) -> list[Round]:
    """Which operation each image gets in each round.

    A round deals the operations to a random order of the images, as evenly as their numbers allow. So each image gets each
    operation with the same probability, and how many images an operation has is known without asking the device.
    """
    dealer = random.Random(moment.generator.initial_seed())
    drawn = []
    for _ in range(rounds):
        shuffled = dealer.sample(list(names), len(names))
        ends = [count * k // len(names) for k in range(len(names) + 1)]
        shares = [(name, slice(a, b)) for name, a, b in zip(shuffled, ends, ends[1:], strict=False) if a < b]
        key, sign = moment.uniform(2, count)
        drawn.append((shares, key.argsort(), torch.where(sign < 0.5, -1.0, 1.0)))
    return drawn


def randaugment(images: Tensor, drawn: Sequence[Round], strength: float) -> Tensor:
    """Colours first, round by round; then all of the geometry at once, so that pixels are interpolated once.

    Args:
        images: [batch, channels, height, width] float.
        drawn: as of `draw`.
        strength: in [0, 1].
    """
    used = {name for shares, _, _ in drawn for name, _ in shares}
    if used & COLOURS.keys():
        images = recoloured(images, drawn, strength)
    if used & (TURNS.keys() | SHIFTS.keys()):
        images = sample(images, matrices(drawn, strength, (images.shape[2], images.shape[3])))
    return images


def recoloured(images: Tensor, drawn: Sequence[Round], strength: float) -> Tensor:
    """The images after the operations on colours, with the batch's least and greatest value of a channel for 0 and 1."""
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    span = (high - low).clamp_min(torch.finfo(images.dtype).tiny)
    unit, place = ((images - low) / span).clamp_(0, 1), None
    for shares, order, signs in drawn:
        unit, place = unit[order if place is None else place[order]], order.argsort()  # so that a share is a slice, and no copy
        signs = signs[order]
        for name, share in shares:
            if name in COLOURS:
                unit[share] = COLOURS[name](unit[share], strength, signs[share])
    return torch.addcmul(low, unit if place is None else unit[place], span)


def matrices(drawn: Sequence[Round], strength: float, size: tuple[int, int]) -> Tensor:
    """The composed geometry of each image: [batch, 3, 3] float64, from places in the new image to those in the old one."""
    total = None
    for shares, order, signs in drawn:
        dealt, signs = identities(len(order), order.device), signs[order].double()
        for name, share in shares:
            if name in TURNS or name in SHIFTS:
                geometry(dealt[share], name, strength, signs[share], size)
        own = dealt[order.argsort()]
        total = own if total is None else total @ own
    assert total is not None, "there is at least one round"
    return total


@dataclass(frozen=True, kw_only=True)
class Randaugment(Method):
    """A few random operations of equal strength on each training image.

    Operations are those whose invariance the workload declares: rotation (rotate, shear), translation (translate), color
    (autocontrast, equalize, posterize, solarize, brightness, contrast, sharpness, and of three channels saturation), and to
    leave an image as it is. Inputs may be normalised: the batch's least and greatest value of each channel stand for black
    and white. An image's colours change before its geometry, whichever was drawn first.

    Args:
        operations: on each image, at least 1; an operation may come twice.
        magnitude: strength of them all, in (0, 30]; at 30 a rotation of 30 degrees, a shear of 0.3, a shift by 45 % of the
            side, factors of 0.1 or 1.9, 4 bits, and all of the image inverted.

    Source: Cubuk et al. 2019, arXiv:1909.13719; strengths as of its code for TensorFlow and of torchvision.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1909.13719"
    search: ClassVar = {"operations": (2, 1, 3), "magnitude": (5.0, 9.0, 14.0)}
    requires = frozenset({"IMAGES", "TRAIN_DATA"})

    operations: int = 2
    magnitude: float = 9.0

    def __post_init__(self) -> None:
        if self.operations < 1:
            raise BadInput(f"randaugment.operations is {self.operations}", "give at least 1")
        if not 0 < self.magnitude <= MAGNITUDES:
            raise BadInput(f"randaugment.magnitude is {self.magnitude}", f"give a number in (0, {MAGNITUDES}]")

    def apply(self, setup: Setup) -> Setup:
        channels: list[int] = []
        tree_map(lambda t: channels.append(t.shape[1]), setup.context.example)
        names = operations(setup.context.invariances, channels[0])
        if not names:
            raise NotApplicable(
                "the workload does not say that a turned, shifted or recoloured image keeps its label",
                'declare those of invariances={"rotation", "translation", "color"} that it has',
            )
        return with_transform(setup, partial(self.transform, names=names))

    def transform(self, batch: Batch, moment: Moment, names: Sequence[str]) -> Batch:
        """The batch with some of the named operations on every image."""
        drawn, strength = draw(names, len(batch), self.operations, moment), self.magnitude / MAGNITUDES
        return replace(batch, inputs=tree_map(lambda t: randaugment(t, drawn, strength), batch.inputs))
