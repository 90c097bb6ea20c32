"""Transforms of images against kornia with the same parameters; what is drawn, against its distribution."""

import math
from dataclasses import replace

import kornia.augmentation as K
import pytest
import torch
from kornia import enhance
from kornia.color import rgb_to_yuv, yuv_to_rgb
from kornia.enhance.adjust import adjust_brightness_accumulative, adjust_saturation_with_gray_subtraction
from kornia.geometry.transform import warp_affine

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training import _operations
from quadriga.methods.training._images import boxes
from quadriga.methods.training._operations import identities
from quadriga.methods.training.color import Color, recolor
from quadriga.methods.training.crop import crop
from quadriga.methods.training.erase import Erase
from quadriga.methods.training.erase import draw as draw_boxes
from quadriga.methods.training.flip import Flip, coin, flip
from quadriga.methods.training.randaugment import Randaugment, draw, matrices, operations, randaugment
from quadriga.methods.training.rotate import rotate
from quadriga.testing import tiny_cnn, tiny_lstm

torch.set_num_threads(1)
CPU = torch.device("cpu")
EVERYTHING = frozenset({"color", "rotation", "translation"})
NAMES = operations(EVERYTHING, 3)
UNIT = torch.rand(6, 3, 40, 30, generator=torch.Generator().manual_seed(0))
SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])


def at(seed=0, batch=32, epoch=0):
    return Moment(torch.Generator().manual_seed(seed), 0.0, torch.full((batch,), epoch))


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def given(x, seed=0):
    return Batch(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x))), at(seed, len(x))


def test_crop_equals_kornia():
    x, padding = UNIT[:, :, :16, :12], 3
    module = K.RandomCrop((16, 12), padding=padding, padding_mode="replicate", p=1.0, cropping_mode="slice")
    module(x)
    down, right = torch.randint(2 * padding + 1, (2, 6), generator=torch.Generator().manual_seed(0))
    corner = torch.stack((right, down), -1)[:, None].float()
    params = {**module._params, "src": module._params["src"] - module._params["src"][:, :1] + corner}
    assert torch.equal(crop(x, padding, "edge", torch.Generator().manual_seed(0)), module(x, params=params))


def test_flip_and_rotate_equal_kornia():
    chosen = SIGNS > 0
    module = K.RandomHorizontalFlip(p=0.5)
    module(UNIT)
    assert torch.equal(flip(UNIT, chosen), module(UNIT, params={**module._params, "batch_prob": chosen.float()}))
    module = K.RandomRotation(30.0, p=1.0, align_corners=True)
    expected = module(UNIT)
    found = rotate(UNIT, module._params["degrees"].deg2rad())
    torch.testing.assert_close(found[:, :, 8:-8, 8:-8], expected[:, :, 8:-8, 8:-8], atol=1e-4, rtol=0)


def test_alternating_flip_shows_both_ways_in_two_epochs():
    """Of each image, epochs 0 and 2 agree and 1 is the mirror; a fair half begins mirrored; other seeds choose another half."""
    x, flips = images(400, 1, 2, 3), Flip(kind="alternating")
    batch = Batch(x, None, torch.arange(400) * 7)
    seen = [flips.transform(batch, at(seed=e, batch=400, epoch=e), seed=3).inputs for e in range(3)]
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[0].flip(-1))
    for seed in (0, 3):
        bits = coin(torch.arange(10_000), seed).double()
        assert abs(float(bits.mean()) - 0.5) < 4.5 * 0.5 / 100
        assert abs(float((bits[1:] == bits[:-1]).double().mean()) - 0.5) < 4.5 * 0.5 / 100
    assert 0.4 < float((coin(torch.arange(1000), 0) == coin(torch.arange(1000), 12345)).double().mean()) < 0.6


def test_erase_equals_kornia():
    """RandomErasing with the rectangles that it drew itself."""
    module = K.RandomErasing(scale=(0.02, 0.33), ratio=(0.3, 3.3), value=0.25, p=1.0)
    expected, p = module(UNIT), module._params
    inside = boxes(p["ys"], p["xs"], p["heights"], p["widths"], (40, 30))
    assert torch.equal(torch.where(inside, 0.25, UNIT), expected)


def test_erased_rectangles_are_as_asked():
    """Inside of the image; areas uniform, aspects log-uniform and symmetric, where rounding and the border are far."""
    size, limits = (1000, 1000), {"smallest": 0.02, "largest": 0.06, "aspect": 3.0}
    top, left, tall, wide = draw_boxes(20_000, size, at(), **limits)
    assert int(top.min()) >= 0 and int((top + tall).max()) <= 1000 and int((left + wide).max()) <= 1000
    area, aspect = tall * wide / 1e6, (tall / wide).log() / math.log(3)
    assert float(area.min()) > 0.0195 and float(area.max()) < 0.0605
    assert abs(float(area.mean()) - 0.04) < 4.5 * 0.04 / math.sqrt(12 * 20_000) + 1e-4
    assert abs(float(aspect.mean())) < 4.5 / math.sqrt(3 * 20_000) and 0.98 < float(aspect.abs().max()) < 1.02
    assert abs(float((top / (1000 - tall)).mean()) - 0.5) < 4.5 / math.sqrt(12 * 20_000) + 1e-3


@pytest.mark.parametrize("fill", ["zero", "mean", "noise"])
def test_erase_paints_what_it_says(fill):
    """Pixels outside stay; inside are zeros, the channel's mean, or noise of the channel's mean and deviation."""
    x = images(64, 2, 24, 24) * torch.tensor([1.0, 5.0]).view(2, 1, 1) + torch.tensor([10.0, -20.0]).view(2, 1, 1)
    out = Erase(fill=fill, probability=0.7, largest=0.5).transform(*given(x)).inputs
    painted = (out != x).all(1)
    assert torch.equal(torch.where(painted[:, None], x, out), x)
    assert 0.4 < float(painted.flatten(1).any(1).double().mean()) < 0.95
    for channel in range(2):
        values, own = out[:, channel][painted], x[:, channel]
        if fill == "noise":
            assert abs(float(values.mean() - own.mean())) < 5 * float(own.std()) / math.sqrt(len(values))
            assert float(values.std() / own.std()) == pytest.approx(1, abs=0.05)
        else:
            torch.testing.assert_close(values, torch.full_like(values, 0.0 if fill == "zero" else float(own.mean())))


def test_color_equals_kornia():
    """Brightness, contrast and saturation one after the other, where kornia's clipping to [0, 1] does not act."""
    x = 0.4 + 0.2 * UNIT
    shift, contrast, saturation = (0.5 * SIGNS, 1 + 0.2 * SIGNS, 1 - 0.3 * SIGNS)
    expected = enhance.adjust_brightness(x, shift * x.std(correction=0))
    expected = enhance.adjust_contrast_with_mean_subtraction(expected, contrast)
    expected = adjust_saturation_with_gray_subtraction(expected, saturation)
    torch.testing.assert_close(recolor(x, shift, contrast, saturation, torch.zeros(6)), expected, atol=1e-5, rtol=0)
    plain = x[:, :1]
    expected = enhance.adjust_brightness(plain, shift * plain.std(correction=0))
    expected = enhance.adjust_contrast_with_mean_subtraction(expected, contrast)
    torch.testing.assert_close(recolor(plain, shift, contrast, saturation, shift), expected, atol=1e-5, rtol=0)


def test_hue_turns_the_plane_of_kornias_yuv():
    angle = torch.linspace(-3, 3, 6)
    y, u, v = rgb_to_yuv(UNIT.double()).unbind(1)
    cosine, sine = angle.double().cos().view(-1, 1, 1), angle.double().sin().view(-1, 1, 1)
    expected = yuv_to_rgb(torch.stack((y, cosine * u - sine * v, sine * u + cosine * v), 1))
    found = recolor(UNIT.double(), torch.zeros(6), torch.ones(6), torch.ones(6), angle)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)  # kornia's two matrices are rounded, not inverses


def test_color_does_not_mind_normalisation():
    """Recolouring normalised images is recolouring them and normalising then."""
    x, method = UNIT, Color(brightness=0.3, contrast=0.4, saturation=0.5, hue=0.1)
    ours = method.transform(*given((x - 0.4) / 0.2)).inputs
    torch.testing.assert_close(ours, (method.transform(*given(x)).inputs - 0.4) / 0.2, atol=1e-4, rtol=1e-4)


KORNIA = {
    "brightness": lambda x, m: adjust_brightness_accumulative(x, 1 + 0.9 * m * SIGNS),
    "contrast": lambda x, m: enhance.adjust_contrast_with_mean_subtraction(x, 1 + 0.9 * m * SIGNS),
    "saturation": lambda x, m: adjust_saturation_with_gray_subtraction(x, 1 + 0.9 * m * SIGNS),
    "sharpness": lambda x, m: enhance.sharpness(x, 1 + 0.9 * m * SIGNS),
    "posterize": lambda x, m: enhance.posterize(x, 8 - round(4 * m)),
    "solarize": lambda x, m: enhance.solarize(x, 1 - m),
    "equalize": lambda x, m: enhance.equalize(x),
    "autocontrast": lambda x, m: enhance.normalize_min_max(x, eps=0.0),
}


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("name", _operations.COLOURS)
def test_colour_operations_equal_kornia(name, strength):
    x = UNIT * 0.8 + 0.1
    found = _operations.COLOURS[name](x.clone(), strength, SIGNS)
    torch.testing.assert_close(found, KORNIA[name](x, strength), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", [*_operations.TURNS, *_operations.SHIFTS])
def test_geometry_equals_kornia(name):
    """One operation through `warp_affine`, about the centre."""
    inverse = _operations.geometry(identities(6, CPU), name, 0.4, SIGNS, (40, 30))
    centre = torch.eye(3, dtype=torch.float64)
    centre[0, 2], centre[1, 2] = 29 / 2, 39 / 2
    forward = torch.linalg.inv(centre @ inverse @ torch.linalg.inv(centre))[:, :2].float()
    expected = warp_affine(UNIT, forward, (40, 30), padding_mode="zeros", align_corners=True)
    inside = warp_affine(torch.ones_like(UNIT), forward, (40, 30), padding_mode="zeros", align_corners=True) > 0.9999
    found = _operations.sample(UNIT, inverse)
    assert 0.6 < float(inside.double().mean())
    torch.testing.assert_close(found[inside], expected[inside], atol=2e-4, rtol=0)
    angle = math.radians(12)
    if name == "rotate":
        torch.testing.assert_close(found, rotate(UNIT, angle * SIGNS), atol=1e-4, rtol=0)


def test_randaugment_is_its_operations_one_image_at_a_time():
    """What each image was dealt, in order, by itself; the geometry as one sample of the product of its matrices."""
    x, strength = images(45, 3, 17, 13), 0.5
    drawn = draw(NAMES, 45, 3, at())
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    expected, total = [], matrices(drawn, strength, (17, 13))
    for i in range(45):
        one, matrix = ((x - low) / (high - low))[i : i + 1], torch.eye(3, dtype=torch.float64)
        for shares, order, signs in drawn:
            (name,) = (n for n, share in shares if i in order[share])
            if name in _operations.COLOURS:
                one = _operations.COLOURS[name](one.clone(), strength, signs[i : i + 1])
            elif name != "identity":
                matrix = matrix @ _operations.geometry(identities(1, CPU), name, strength, signs[i : i + 1], (17, 13))[0]
        torch.testing.assert_close(total[i], matrix)
        expected.append(_operations.sample(one * (high - low) + low, matrix[None]))
    torch.testing.assert_close(randaugment(x, drawn, strength), torch.cat(expected), atol=2e-5, rtol=0)


def test_each_image_gets_each_operation_as_often():
    """Over 3,000 batches of 4 each of 14 operations comes to the first image with probability 1/14, and both signs alike."""
    counts, plus = dict.fromkeys(NAMES, 0), 0
    for seed in range(3000):
        ((shares, order, signs),) = draw(NAMES, 4, 1, at(seed))
        (name,) = (n for n, share in shares if 0 in order[share])
        counts[name] += 1
        plus += int(signs[0] > 0)
    assert len(counts) == 14 and max(abs(c - 3000 / 14) for c in counts.values()) < 4.5 * math.sqrt(3000 * 13) / 14
    assert abs(plus - 1500) < 4.5 * math.sqrt(750)


def test_randaugment_keeps_to_what_is_declared():
    assert operations(frozenset(), 3) == operations(frozenset({"horizontal_flip"}), 3) == ()
    assert operations(frozenset({"translation"}), 1) == ("identity", "translate_x", "translate_y")
    assert operations(frozenset({"rotation"}), 1) == ("identity", "rotate", "shear_x", "shear_y")
    assert "saturation" not in operations(EVERYTHING, 1) and len(operations(EVERYTHING, 1)) == 13
    setup = Randaugment()(Setup.of(replace(tiny_cnn(), invariances=frozenset({"translation"}))))
    assert setup.training.transforms[0].keywords["names"] == operations(frozenset({"translation"}), 1)


METHODS = (Flip(kind="alternating"), Erase(), Color(hue=0.1), Randaugment())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_generator_decides(method):
    """Equal seeds give equal batches, other seeds others; targets and the input stay; channels-last as well."""
    transform = method(Setup.of(tiny_cnn())).training.transforms[0]
    batch = tiny_cnn().train.batch(torch.arange(32))
    kept = batch.inputs.clone()
    first, again, other = (transform(batch, at(s)) for s in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, kept)
    assert torch.equal(first.inputs, other.inputs) == (method.name == "flip")
    assert first.target is batch.target and first.index is batch.index and torch.equal(batch.inputs, kept)
    last = replace(batch, inputs=kept.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(transform(last, at()).inputs, first.inputs)


def test_refusals():
    bare = Setup.of(replace(tiny_cnn(), invariances=frozenset()))
    for method in (Flip(kind="alternating"), Color(), Randaugment()):
        with pytest.raises(NotApplicable, match="keeps its label") as caught:
            method(bare)
        assert "invariances=" in caught.value.remedy
    with pytest.raises(NotApplicable, match="grey images"):
        Color(brightness=0, contrast=0, hue=0.2)(Setup.of(tiny_cnn()))
    for method in METHODS:
        with pytest.raises(NotApplicable, match="IMAGES"):
            method(Setup.of(tiny_lstm()))


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (Flip, {"probability": 0.3, "kind": "alternating"}),
        (Erase, {"probability": 0.0}),
        (Erase, {"smallest": 0.5}),
        (Erase, {"aspect": 0.5}),
        (Color, {"hue": 0.6}),
        (Color, {"brightness": -1.0}),
        (Randaugment, {"operations": 0}),
        (Randaugment, {"magnitude": 31.0}),
    ],
)
def test_bad_values(method, fields):
    with pytest.raises(BadInput, match=next(iter(fields))):
        method.parse(fields)
