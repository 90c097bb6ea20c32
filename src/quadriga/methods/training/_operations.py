"""The operations of RandAugment on batches: colours in [0, 1] by a common strength, and geometry as matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from quadriga.methods.training._images import along

BLEND = 0.9  # at full strength brightness, contrast, saturation and sharpness are multiplied by 1 ± this
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
Colour = Callable[[Tensor, float, Tensor], Tensor]  # (images in [0, 1], strength in [0, 1], signs [batch]) → images in [0, 1]


def grey(images: Tensor) -> Tensor:
    """Luma [batch, 1, height, width] of three channels, else the mean of the channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]


def blend(kind: str, images: Tensor, strength: float, signs: Tensor) -> Tensor:
    """other + factor · (images - other) with factor 1 ± 0.9 strength, clipped.

    Args:
        kind: whose other image is black ("brightness"), the mean luma ("contrast"), the luma ("saturation") or blurred
            ("sharpness").
        images: [batch, channels, height, width] in [0, 1].
        strength: in [0, 1].
        signs: [batch], ±1.
    """
    factor = along(1 + BLEND * strength * signs, images)
    if kind == "brightness":
        return (images * factor).clamp_(0, 1)
    other = blurred(images) if kind == "sharpness" else grey(images)
    if kind == "contrast":
        other = other.mean((2, 3), keepdim=True)
    return torch.lerp(other.expand_as(images), images, factor).clamp_(0, 1)


def blurred(images: Tensor) -> Tensor:
    """Inside of the border each pixel is the mean of its 3×3 neighbourhood, in which it counts five times."""
    out = images.clone()
    if min(images.shape[2:]) > 2:
        out[:, :, 1:-1, 1:-1] = (9 * functional.avg_pool2d(images, 3, 1) + 4 * images[:, :, 1:-1, 1:-1]) / 13
    return out


def autocontrast(images: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Each channel of each image stretched to [0, 1]; a constant one as it is."""
    flat = images.flatten(2)
    low, high = flat.amin(2)[:, :, None, None], flat.amax(2)[:, :, None, None]
    return torch.where(high > low, (images - low) / (high - low), images)


def equalize(images: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Each channel of each image with an even histogram of 256 bins, as PIL does it."""
    level = (images * 255).long().flatten(2)
    counts = level.new_zeros(*level.shape[:2], 256).scatter_add_(2, level, torch.ones_like(level))
    last = torch.where(counts > 0, torch.arange(256, device=level.device), 0).amax(2, keepdim=True)
    step = (level.shape[2] - counts.gather(2, last)) // 255
    below = functional.pad(counts.cumsum(2), (1, 0))[:, :, :-1]
    table = ((below + step // 2) // step.clamp_min(1)).clamp_max(255)
    even = table.gather(2, level).to(images.dtype).div_(255)
    return torch.where(step > 0, even, images.flatten(2)).view_as(images)


def posterize(images: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Of 8 bits, the highest 8 to 4."""
    step = 2 ** round(4 * strength)
    return (images * (255 / step)).floor_().mul_(step / 255)


def solarize(images: Tensor, strength: float, signs: Tensor) -> Tensor:
    """What is at least 1 - strength is inverted."""
    return torch.where(images < 1 - strength, images, 1 - images)


COLOURS: dict[str, Colour] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "posterize": posterize,
    "solarize": solarize,
    **{kind: partial(blend, kind) for kind in ("brightness", "contrast", "saturation", "sharpness")},
}

TURNS = {"rotate": math.radians(30), "shear_x": 0.3, "shear_y": 0.3}  # at full strength
SHIFTS = {"translate_x": 150 / 331, "translate_y": 150 / 331}  # of the image's side


def identities(count: int, device: torch.device) -> Tensor:
    """So many matrices [count, 3, 3] float64 that change nothing."""
    return torch.eye(3, dtype=torch.float64, device=device).repeat(count, 1, 1)


def geometry(out: Tensor, name: str, strength: float, signs: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn identities, in place, into maps from places in the new image to places in the old one, in pixels from the centre.

    Args:
        out: [batch, 3, 3] float64, as of `identities`; also what is returned.
        name: "rotate", "shear_x", "shear_y", "translate_x" or "translate_y".
        strength: in [0, 1].
        signs: [batch], ±1.
        size: height and width.
    """
    if name == "rotate":
        angle = TURNS[name] * strength
        out[:, 0, 0] = out[:, 1, 1] = math.cos(angle)
        out[:, 0, 1], out[:, 1, 0] = signs * -math.sin(angle), signs * math.sin(angle)
        return out
    row, column, amount = {
        "shear_x": (0, 1, TURNS["shear_x"]),
        "shear_y": (1, 0, TURNS["shear_y"]),
        "translate_x": (0, 2, SHIFTS["translate_x"] * size[1]),
        "translate_y": (1, 2, SHIFTS["translate_y"] * size[0]),
    }[name]
    out[:, row, column] = signs * (amount * strength)
    return out


def sample(images: Tensor, matrices: Tensor) -> Tensor:
    """Images seen through matrices as of `geometry`, bilinear; what comes in from outside is the nearest pixel.

    Args:
        images: [batch, channels, height, width].
        matrices: [batch, 3, 3].
    """
    height, width = images.shape[2:]
    m = matrices.to(images.dtype)[:, :2]
    y = torch.arange(height, device=images.device, dtype=images.dtype) + (1 - height) / 2
    x = torch.arange(width, device=images.device, dtype=images.dtype) + (1 - width) / 2
    grid = images.new_empty(len(images), 2, height, width)
    for part, side in ((0, width), (1, height)):  # a sum of a row and a column: no product of matrices
        row, column = m[:, part, :1] * x, m[:, part, 1:2] * y + m[:, part, 2:]
        torch.add(row[:, None, :] * (2 / side), column[:, :, None] * (2 / side), out=grid[:, part])
    return functional.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
