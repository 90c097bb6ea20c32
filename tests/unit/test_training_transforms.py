"""Crop, flip and rotate against naive references; seeded, on the batch, refused where the label would change."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training.crop import Crop, crop
from quadriga.methods.training.flip import Flip, flip
from quadriga.methods.training.rotate import Rotate, rotate
from quadriga.testing import tiny_cnn, tiny_lstm

torch.set_num_threads(1)
MODES = {"zero": "constant", "edge": "edge", "reflect": "reflect"}  # ours → numpy's


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def at(seed=0, batch=32):
    return Moment(seeded(seed), 0.0, torch.zeros(batch, dtype=torch.int64))


@pytest.mark.parametrize("border", MODES)
def test_crop_equals_the_naive_one(border):
    """Pad with numpy, cut out in a loop, at the same random places."""
    x, p = images(9, 2, 7, 5), 2
    down, right = torch.randint(2 * p + 1, (2, 9), generator=seeded())
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (p, p), (p, p)), mode=MODES[border])
    naive = np.stack([padded[i, :, d : d + 7, r : r + 5] for i, (d, r) in enumerate(zip(down, right, strict=True))])
    assert np.array_equal(crop(x, p, border, seeded()).numpy(), naive)


def test_crop_shifts_are_uniform():
    """Over 20,000 images each of the 25 shifts of ±2 comes with probability 1/25, within 4.5 standard deviations."""
    x = torch.arange(81.0).view(1, 1, 9, 9).expand(20_000, 1, 9, 9)
    corner = crop(x, 2, "edge", seeded())[:, 0, 4, 4]
    counts = torch.stack([(corner == v).sum() for v in corner.unique()]).double()
    assert len(counts) == 25 and float((counts - 800).abs().max()) < 4.5 * math.sqrt(20_000 * 0.04 * 0.96)


def test_flip_twice_is_the_identity():
    x, chosen = images(6, 3, 4, 5), torch.tensor([True, False, True, False, True, True])
    once = flip(x, chosen)
    assert torch.equal(flip(once, chosen), x)
    assert torch.equal(once[1], x[1]) and torch.equal(once[0], x[0].flip(-1))


def test_flip_happens_with_its_probability():
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(10_000, 1, 1, 2)
    out = Flip(probability=0.3).transform(Batch(x, None, torch.arange(10_000)), at()).inputs
    assert abs(float(out[:, 0, 0, 0].mean()) - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 10_000)


def test_rotate_by_nothing_is_the_identity():
    x = images(4, 2, 9, 6)
    torch.testing.assert_close(rotate(x, torch.zeros(4)), x)


@pytest.mark.parametrize("shape", [(9, 9), (12, 7)])
@pytest.mark.parametrize("degrees", [5.0, -30.0, 77.0])
def test_rotate_equals_scipy(shape, degrees):
    """Bilinear, about the centre of the image, whatever its proportions; positive angles turn counter-clockwise."""
    x = images(3, 2, *shape).double()
    expected = ndimage.rotate(x.numpy(), degrees, axes=(3, 2), reshape=False, order=1, mode="nearest")
    found = rotate(x, torch.full((3,), math.radians(degrees), dtype=torch.float64))
    inside = slice(2, -2)  # at the border scipy clamps coordinates in another order
    np.testing.assert_allclose(found[:, :, inside, inside], expected[:, :, inside, inside], atol=1e-6)


def test_rotate_by_a_quarter_is_a_transposition():
    x = images(2, 1, 8, 8)
    torch.testing.assert_close(rotate(x, torch.full((2,), math.pi / 2)), x.rot90(1, (2, 3)), rtol=1e-4, atol=1e-5)


def test_rotate_equals_affine_grid():
    """The fast grid is the one that torch makes of the same matrices."""
    x, a = images(5, 1, 10, 10), torch.linspace(-0.5, 0.5, 5)
    theta = torch.zeros(5, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 1, 0], theta[:, 1, 1] = a.cos(), -a.sin(), a.sin(), a.cos()
    grid = torch.nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    expected = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(rotate(x, a), expected, rtol=1e-4, atol=1e-5)


METHODS = (Crop(), Flip(), Rotate(degrees=15))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_generator_decides(method):
    """Equal seeds give equal batches, other seeds others; targets and indices stay, the input too; channels-last as well."""
    batch = tiny_cnn().train.batch(torch.arange(32))
    kept = batch.inputs.clone()
    first, again, other = (method.transform(batch, at(s)) for s in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    assert first.target is batch.target and first.index is batch.index and torch.equal(batch.inputs, kept)
    assert first.inputs.shape == kept.shape
    assert not torch.equal(first.inputs, kept)
    last = replace(batch, inputs=kept.expand(32, 3, 20, 20).contiguous(memory_format=torch.channels_last))
    assert torch.equal(method.transform(last, at()).inputs[:, :1].contiguous(), first.inputs)
    named = method.transform(replace(batch, inputs={"pixels": kept}), at())
    assert torch.equal(named.inputs["pixels"], first.inputs)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_refused_where_labels_may_change(method):
    """Without the declared invariance, or without images, the reason and the remedy say so."""
    setup = Setup.of(replace(tiny_cnn(), invariances=frozenset()))
    with pytest.raises(NotApplicable, match="keeps its label") as caught:
        method(setup)
    assert "invariances=" in caught.value.remedy
    with pytest.raises(NotApplicable, match="IMAGES"):
        method(Setup.of(tiny_lstm()))


def test_too_small_to_crop():
    with pytest.raises(NotApplicable, match="20×20"):
        Crop(padding=20)(Setup.of(tiny_cnn()))


@pytest.mark.parametrize(
    ("method", "fields"), [(Crop, {"padding": 0}), (Flip, {"probability": 0.0}), (Rotate, {"degrees": 200})]
)
def test_bad_values(method, fields):
    with pytest.raises(BadInput, match=next(iter(fields))):
        method.parse(fields)
