"""Progressive size: exact means of areas, sides over progress, which networks take them, resume."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, Moment
from quadriga.methods.training._sizes import obstacle, shrunk
from quadriga.methods.training.progressive_size import ProgressiveSize, side_at
from quadriga.testing import fingerprint, tiny_cnn, tiny_lstm
from quadriga.testing.workloads import TinyCnn, TinyPooled, tiny_pooled
from quadriga.train.loop import fit
from quadriga.workloads.ready.lenet_fashion import LeNet

torch.set_num_threads(1)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def at(progress):
    return Moment(torch.Generator(), progress, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (20, 8), (16, 20), (24, 24)])
def test_shrinking_takes_the_mean_of_the_area(size):
    """Repeat each pixel so often that a new one covers whole copies, and average them."""
    x = images(3, 2, 24, 24).double()
    fine = x.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
    expected = nn.functional.avg_pool2d(fine, (24, 24))
    torch.testing.assert_close(shrunk(x, size), expected, rtol=1e-9, atol=1e-12)


def test_shrinking_by_a_whole_factor_is_average_pooling():
    x = images(3, 1, 32, 64)
    torch.testing.assert_close(shrunk(x, (16, 16)), nn.functional.avg_pool2d(x, (2, 4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [20, 28, 32, 224])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_sides_rise_in_plateaus_to_the_full_one(side, stages):
    """Multiples of 4, never falling, the first about start · side, at most `stages` of them, full from `until` on."""
    sides = [side_at(side, k / 500, 0.5, 0.7, stages) for k in range(501)]
    assert sides == sorted(sides) and abs(sides[0] - side / 2) <= 2
    assert all(s % 4 == 0 for s in sides if s != side)
    assert set(sides[350:]) == {side} and 1 < len(set(sides)) <= stages + 1


def test_only_images_among_the_inputs_change():
    method, x = ProgressiveSize(start=0.5, until=0.5, stages=1), images(4, 3, 16, 16)
    mask, scale = torch.ones(4, 16, 16), torch.ones(4, 1, 16, 16, dtype=torch.int64)
    batch = Batch({"pixels": x, "mask": mask, "scale": scale}, torch.arange(4), torch.arange(4))
    small = method.transform(batch, at(0.0))
    torch.testing.assert_close(small.inputs["pixels"], nn.functional.avg_pool2d(x, 2), rtol=1e-5, atol=1e-6)
    assert small.inputs["mask"] is mask and small.inputs["scale"] is scale and small.target is batch.target
    assert method.transform(batch, at(0.5)) is batch
    pair = method.transform(replace(batch, inputs=(x, mask)), at(0.2)).inputs
    assert pair[0].shape == (4, 3, 8, 8) and pair[1] is mask


class Stop(Exception):
    """Ends a run in the middle."""


class Watching(Hook):
    """Notes the side of each batch and stops before a step."""

    def __init__(self, log, stop):
        self.log, self.left = log, stop[0]

    def seen(self, batch, losses):
        self.log.append(batch.inputs.shape[2])

    def after_backward(self, model, progress):
        self.left -= 1
        if self.left == 0:
            raise Stop


def watched(log, stop=0):
    setup = ProgressiveSize(start=0.5, until=0.6, stages=2)(Setup.of(tiny_pooled()))
    later = [stop]  # in a list it is no part of what the run is
    hooks = (lambda model: Watching(log, later),)
    return replace(setup, training=replace(setup.training, make_hooks=hooks))


@pytest.mark.parametrize("stop", [2, 5, 10])
def test_resumes_bit_exactly(tmp_path, stop):
    """On each plateau; 12 steps are at 8 pixels until 0.3, at 16 until 0.6, then at all 20."""
    data, whole, first, second = tiny_pooled().train, [], [], []
    straight, broken, resumed = watched(whole), watched(first, stop), watched(second)
    fit(straight, data, epochs=2, seed=0)
    with pytest.raises(Stop):
        fit(broken, data, epochs=2, seed=0, checkpoint=tmp_path, every=0.0)
    outcome = fit(resumed, data, epochs=2, seed=0, checkpoint=tmp_path, every=0.0)
    assert outcome.exact and fingerprint(resumed.model) == fingerprint(straight.model)
    assert whole == [8] * 4 + [16] * 4 + [20] * 4 and first[: stop - 1] + second == whole


class Own(nn.Module):
    """Flattens in its own code, so that with other sizes the batch changes and nothing fails."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(16, 2)

    def forward(self, x):
        return self.fc(self.conv(x).reshape(-1, 16))


class Placed(nn.Module):
    """A patch embedding with learned positions, which are added in the model's own code."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 4, 4)
        self.places = nn.Parameter(torch.zeros(1, 4, 25))

    def forward(self, x):
        return (self.patch(x).flatten(2) + self.places).mean(2)


@pytest.mark.parametrize(
    ("model", "side", "size", "words"),
    [
        (LeNet, 32, 16, "the layer fc1 does not take images of 16×16"),
        (TinyCnn, 20, 8, "the layer conv2 does not take images of 8×8"),
        (Placed, 20, 16, "Placed behind the layer patch does not take images of 16×16"),
        (Own, 20, 16, r"on images of 16×16 the outputs are \[\(128, 2\)\], not \[\(200, 2\)\]"),
        (TinyPooled, 20, 8, None),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_names_the_layer_that_stands_in_the_way(model, side, size, words):
    """And leaves the model, its statistics, its modes and the global generator as they were."""
    network = model()
    network.train()
    next(network.children()).eval()
    before, state = fingerprint(network), torch.get_rng_state()
    found = obstacle(network, images(2, 1, side, side), (size, size))
    if words is None:
        assert found is None
    else:
        with pytest.raises(NotApplicable, match=words):
            raise NotApplicable(found)
    assert fingerprint(network) == before and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_refuses():
    with pytest.raises(NotApplicable, match="the layer conv2") as caught:
        ProgressiveSize()(Setup.of(tiny_cnn()))
    assert "global pooling" in caught.value.remedy
    with pytest.raises(NotApplicable, match="IMAGES"):
        ProgressiveSize()(Setup.of(tiny_lstm()))
    with pytest.raises(NotApplicable, match="no smaller size"):
        ProgressiveSize(start=0.95, stages=1)(Setup.of(tiny_pooled()))
    for fields in ({"start": 1.0}, {"until": 1.0}, {"stages": 0}):
        with pytest.raises(BadInput, match=next(iter(fields))):
            ProgressiveSize.parse(fields)
