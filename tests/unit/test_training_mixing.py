"""Mixup and CutMix against kornia and the papers' formulas, and token dropout against what it promises."""

import math
from dataclasses import replace

import kornia.augmentation as K
import pytest
import torch
from torch import nn
from torch.nn import functional

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.core.workload import Workload
from quadriga.methods.training._images import beta
from quadriga.methods.training._targets import soft
from quadriga.methods.training.cutmix import Cutmix, cutmix, draw
from quadriga.methods.training.mixup import Mixup, mixup
from quadriga.methods.training.token_dropout import TokenDropout
from quadriga.testing import tiny_cnn, tiny_lstm, tiny_mlp, tiny_transformer

torch.set_num_threads(1)
IMAGES = torch.rand(8, 3, 12, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def at(seed=0, batch=32):
    return Moment(torch.Generator().manual_seed(seed), 0.0, torch.zeros(batch, dtype=torch.int64))


def of(inputs, target, weight=None):
    return Batch(inputs, target, torch.arange(len(target)), weight)


def kornias_targets(labels):
    """kornia's (label, partner's label, share of the partner) as probabilities."""
    own, other, share = labels[:, 0].long(), labels[:, 1].long(), labels[:, 2:]
    return (1 - share) * soft(own, 4) + share * soft(other, 4)


def test_mixup_equals_kornia():
    module = K.RandomMixUpV2(data_keys=["input", "class"])
    x, labels = module(IMAGES, LABELS)
    found = mixup(of(IMAGES, soft(LABELS, 4)), module._params["mixup_pairs"], 1 - module._params["mixup_lambdas"])
    torch.testing.assert_close(found.inputs, x)
    torch.testing.assert_close(found.target, kornias_targets(labels))


def test_cutmix_equals_kornia():
    module = K.RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True)
    x, labels = module(IMAGES, LABELS)
    corners = module._params["crop_src"][0].long()
    (left, top), (right, bottom) = corners[:, 0].unbind(1), corners[:, 2].unbind(1)
    box = (top, left, bottom - top + 1, right - left + 1)
    found = cutmix(of(IMAGES, soft(LABELS, 4)), module._params["mix_pairs"][0], box)
    assert torch.equal(found.inputs, x)
    area = (box[2] * box[3] / 120)[:, None]
    expected = (1 - area) * soft(LABELS, 4) + area * soft(labels[0, :, 1].long(), 4)
    torch.testing.assert_close(found.target, expected)
    torch.testing.assert_close(found.target, kornias_targets(torch.cat((labels[0, :, :2], 1 - labels[0, :, 2:]), 1)))


def test_mixed_cross_entropy_is_the_mean_of_two():
    """The papers' form: share · loss(own label) + (1 - share) · loss(partner's)."""
    setup = Setup.of(tiny_cnn())
    share, partner = torch.rand(8), torch.randperm(8)
    logits = torch.randn(8, 4)
    mixed = mixup(of(IMAGES, soft(LABELS, 4)), partner, share)
    one, two = (functional.cross_entropy(logits, t, reduction="none") for t in (LABELS, LABELS[partner]))
    torch.testing.assert_close(setup.training.loss(logits, mixed), share * one + (1 - share) * two)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_beta_has_its_moments(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)) of 40,000 draws, which the seed alone decides."""
    torch.manual_seed(5)
    drawn = beta(alpha, 40_000, at(1))
    torch.manual_seed(6)
    assert torch.equal(drawn, beta(alpha, 40_000, at(1))) and not torch.equal(drawn, beta(alpha, 40_000, at(2)))
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(drawn.mean()) - 0.5) < 4.5 * math.sqrt(variance / 40_000)
    assert float(drawn.var()) == pytest.approx(variance, rel=0.03)
    tiny = beta(1e-3, 1000, at())
    assert bool(((tiny >= 0) & (tiny <= 1)).all())


def test_cutmix_boxes_are_the_papers():
    """Its code in a loop: a centre, half of each side to both sides, cut at the border."""
    share, size = beta(1.0, 50, at()), (12, 10)
    top, left, tall, wide = draw(share, size, at(3))
    drawn = at(3).uniform(2, 50)
    for i in range(50):
        for side, where, first, length in ((12, drawn[0, i], top[i], tall[i]), (10, drawn[1, i], left[i], wide[i])):
            cut, centre = int(side * math.sqrt(1 - float(share[i]))), int(side * where)
            start, end = max(centre - cut // 2, 0), min(centre + cut // 2, side)
            assert (int(first), int(length)) == (start, end - start)


@pytest.mark.parametrize("method", [Mixup(alpha=1.0), Cutmix(probability=1.0)], ids=lambda m: m.name)
def test_mixing_keeps_sums_and_seeds(method):
    """Rows of targets sum to 1, also when mixed twice; ignored labels are zeros; weights are mixed; the seed decides."""
    setup = method(method(Setup.of(tiny_cnn())))
    batch = tiny_cnn().train.batch(torch.arange(32))
    first, second = setup.training.transforms
    once, again, other = (first(batch, at(s)) for s in (0, 0, 1))
    assert torch.equal(once.inputs, again.inputs) and not torch.equal(once.inputs, other.inputs)
    twice = second(once, at(9))
    for mixed in (once, twice):
        torch.testing.assert_close(mixed.target.sum(1), torch.ones(32))
        assert setup.training.loss(torch.zeros(32, 4), mixed).shape == (32,) and mixed.weight is None
    assert int((twice.target > 0).sum(1).max()) > 2
    weighted = first(replace(batch, target=torch.full((32,), -100), weight=torch.arange(32.0)), at())
    assert float(weighted.target.abs().max()) == 0
    lone = (first(replace(batch, weight=torch.eye(32)[k]), at()).weight for k in range(32))
    torch.testing.assert_close(sum(k * w for k, w in enumerate(lone)), weighted.weight)


@pytest.mark.parametrize("method", [Mixup(alpha=1.0, probability=0.3), Cutmix(probability=0.3)], ids=lambda m: m.name)
def test_some_are_left_alone(method):
    workload = tiny_cnn((960, 48, 48))
    batch = workload.train.batch(torch.arange(960))
    found = method(Setup.of(workload)).training.transforms[0](batch, at())
    changed = float((found.inputs != batch.inputs).flatten(1).any(1).double().mean())
    assert 0.3 * 0.6 < changed < 0.3 + 4.5 * math.sqrt(0.21 / 960)


def test_mixup_of_numbers_to_be_predicted():
    """On linear data it stays on the line; whole numbers and missing targets are refused."""
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [2.0], [-1.0]])
    workload = Workload(
        model=nn.Linear(3, 1), train=(x, y), val=(x + 1, y), test=(x + 2, y), loss="squared_error", metric="mean_squared_error"
    )
    found = Mixup(alpha=1.0)(Setup.of(workload)).training.transforms[0](of(x, y), at())
    torch.testing.assert_close(found.inputs @ torch.tensor([[1.0], [2.0], [-1.0]]), found.target)
    assert not torch.equal(found.target, y)
    with pytest.raises(NotApplicable, match="whole numbers"):
        Mixup()(Setup.of(tiny_lstm()))
    hard = replace(tiny_mlp(), loss=lambda o, t: functional.nll_loss(o.log_softmax(-1), t, reduction="none"))
    with pytest.raises(NotApplicable, match="soft targets"):
        Mixup()(Setup.of(hard))
    with pytest.raises(NotApplicable, match="IMAGES"):
        Cutmix()(Setup.of(tiny_mlp()))


def test_unigram_draws_from_the_batch():
    """A share p (1 - share of the same token) changes; what comes in is distributed as the batch is; targets stay."""
    tokens = (torch.rand(200, 100, generator=torch.Generator().manual_seed(0)).square() * 10).long()
    batch = of(tokens, torch.zeros(200))
    found = TokenDropout(probability=0.3).transform(batch, at())
    frequency = torch.bincount(tokens.flatten(), minlength=10).double() / 20_000
    changed = found.inputs != tokens
    rate = 0.3 * (1 - float(frequency.square().sum()))
    assert abs(float(changed.double().mean()) - rate) < 4.5 * math.sqrt(rate / 20_000)
    new = torch.bincount(found.inputs.flatten(), minlength=10).double() / 20_000
    assert float((new - frequency).abs().max()) < 4.5 * math.sqrt(0.3 * 0.25 / 20_000)
    assert found.target is batch.target and not torch.equal(found.inputs, TokenDropout().transform(batch, at(1)).inputs)


@pytest.mark.parametrize("kind", ["unigram", "blank"])
def test_kept_tokens_and_masks(kind):
    """Padding, and what the mask hides, neither changes nor comes in; masks and other inputs are the same objects."""
    tokens = torch.randint(1, 30, (64, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.randint(5, 20, (64, 1))).long()
    tokens = torch.where(mask == 1, tokens, 99)  # hidden, and to stay where it is
    tokens[:, 0] = 1
    method = TokenDropout(probability=0.5, kind=kind, token=31, keep=(1,))
    inputs = {"token_type_ids": torch.zeros_like(tokens), "input_ids": tokens, "attention_mask": mask}
    out = method.transform(of(inputs, torch.zeros(64)), at()).inputs
    assert out["attention_mask"] is mask and out["token_type_ids"] is inputs["token_type_ids"]
    new = out["input_ids"]
    assert torch.equal(new == 1, tokens == 1) and torch.equal(new == 99, tokens == 99)
    changed = new != tokens
    assert bool(changed.any()) and (kind == "unigram" or bool((new[changed] == 31).all()))


def test_token_dropout_refuses():
    with pytest.raises(NotApplicable, match="TOKENS"):
        TokenDropout()(Setup.of(tiny_cnn()))
    with pytest.raises(NotApplicable, match="20 tokens"):
        TokenDropout(kind="blank", token=20)(Setup.of(tiny_transformer()))
    setup = TokenDropout(kind="blank", token=19)(Setup.of(tiny_transformer()))
    assert len(setup.training.transforms) == 1


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (Mixup, {"alpha": 0.0}),
        (Mixup, {"probability": 1.5}),
        (Cutmix, {"alpha": -1.0}),
        (Cutmix, {"probability": 0.0}),
        (TokenDropout, {"probability": 1.0}),
        (TokenDropout, {"token": -1}),
    ],
)
def test_bad_values(method, fields):
    with pytest.raises(BadInput, match=next(iter(fields))):
        method.parse(fields)
