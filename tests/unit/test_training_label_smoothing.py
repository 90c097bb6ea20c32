"""Label smoothing against torch's own, soft targets, ignored targets, and the losses that it wraps."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.training._targets import smooth
from quadriga.methods.training.label_smoothing import LabelSmoothing
from quadriga.testing import tiny_lstm, tiny_mlp, tiny_transformer

torch.set_num_threads(1)


def batch(target):
    return Batch(None, target, torch.arange(len(target)))


@pytest.mark.parametrize("amount", [0.05, 0.3])
@pytest.mark.parametrize("form", ["hard", "soft", "ignored"])
def test_equals_torch(amount, form):
    """The smoothed loss is F.cross_entropy(label_smoothing=…), per example, for every form of target."""
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 0, 1, 2, -100 if form == "ignored" else 0, 1])
    target = torch.softmax(logits.flip(0), 1) if form == "soft" else target
    setup = LabelSmoothing(amount=amount)(Setup.of(tiny_lstm()))
    expected = functional.cross_entropy(logits, target, label_smoothing=amount, reduction="none")
    torch.testing.assert_close(setup.training.loss(logits, batch(target)), expected)
    torch.testing.assert_close(setup.training.loss({"logits": logits}, batch(target)), expected)


def test_rows_sum_to_one():
    soft = smooth(torch.tensor([0, 3]), 4, 0.2)
    torch.testing.assert_close(soft.sum(1), torch.ones(2))
    assert soft.argmax(1).tolist() == [0, 3] and float(soft.min()) == pytest.approx(0.05)


def test_twice_composes():
    """Smoothing by a and b is smoothing by 1 - (1 - a)(1 - b): the inner one keeps its effect."""
    logits, target = torch.randn(5, 3), batch(torch.tensor([0, 1, 2, 1, 0]))
    both = LabelSmoothing(amount=0.1)(LabelSmoothing(amount=0.2)(Setup.of(tiny_lstm())))
    one = LabelSmoothing(amount=1 - 0.9 * 0.8)(Setup.of(tiny_lstm()))
    torch.testing.assert_close(both.training.loss(logits, target), one.training.loss(logits, target))


def test_refuses_what_it_cannot_help():
    """No classes; a loss that takes class numbers only; a scalar loss."""
    with pytest.raises(NotApplicable, match="CLASSES"):
        LabelSmoothing()(Setup.of(tiny_transformer()))
    hard = replace(tiny_mlp(), loss=lambda o, t: functional.nll_loss(o.log_softmax(-1), t, reduction="none"))
    with pytest.raises(NotApplicable, match="soft targets"):
        LabelSmoothing()(Setup.of(hard))
    scalar = replace(tiny_mlp(), loss=functional.cross_entropy)
    with pytest.raises(NotApplicable, match="PER_EXAMPLE_LOSS"):
        LabelSmoothing()(Setup.of(scalar))


@pytest.mark.parametrize("amount", [0.0, 1.0, -0.1])
def test_bad_values(amount):
    with pytest.raises(BadInput, match="amount"):
        LabelSmoothing.parse({"amount": amount})
