"""What guessing reaches: constants for the metrics that know theirs, outputs dealt out for all others."""

from __future__ import annotations

import math

import pytest
import torch

from quadriga.core.data import TensorData
from quadriga.core.metric import Metric, accuracy, bits_per_byte, mean_squared_error
from quadriga.measure.guess import guess
from quadriga.measure.quality import score

N = 600


def labelled(share: float = 0.5) -> TensorData:
    """Two classes, the first with a share of the examples, sorted by class; the input is the label."""
    y = (torch.arange(N) >= share * N).long()
    return TensorData(y.float().unsqueeze(1), y)


def right(x):
    """Logits that are always right."""
    return torch.cat([1 - x, x], 1)


def found(run, data, metric):
    return guess(run, data, metric, score(run, data, metric))


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_the_majority_class_is_the_best_constant(share):
    constants = [score(lambda x, c=c: torch.eye(2)[c].expand(len(x), 2), labelled(share), accuracy).value for c in (0, 1)]
    one = found(right, labelled(share), accuracy)
    assert one.value == pytest.approx(max(constants))
    assert one.how == "always class 0"
    assert one.beaten


def test_a_model_that_always_says_the_same_does_not_beat_guessing():
    one = found(lambda x: torch.tensor([1.0, 0.0]).expand(len(x), 2), labelled(0.7), accuracy)
    assert one.value == pytest.approx(70.0)
    assert not one.beaten


def test_chance_does_not_beat_guessing_but_a_little_knowledge_does():
    torch.manual_seed(0)
    y = torch.randint(2, (N,))
    coin = TensorData(torch.randn(N, 1), y)
    assert not found(lambda x: torch.cat([-x, x], 1), coin, accuracy).beaten
    hint = TensorData(y.float().unsqueeze(1) + torch.randn(N, 1) - 0.5, y)
    assert found(lambda x: torch.cat([-x, x], 1), hint, accuracy).beaten


def test_unigram_bits_are_the_entropy_of_the_targets_and_ignored_ones_do_not_count():
    targets = torch.tensor([[0, 0, 1, -100], [2, 0, 0, -100], [1, 3, 0, 0]]).repeat(40, 1)
    data = TensorData(targets.clamp_min(0), targets)
    counts = torch.tensor([6.0, 2.0, 1.0, 1.0])
    entropy = -float((counts / 10 * (counts / 10).log2()).sum())
    even = found(lambda x: torch.zeros(*x.shape, 5), data, bits_per_byte)
    assert even.value == pytest.approx(entropy)
    assert not even.beaten
    knowing = found(lambda x: 20.0 * torch.nn.functional.one_hot(x, 5), data, bits_per_byte)
    assert knowing.beaten
    assert math.log2(4) > entropy


def test_the_mean_of_the_targets_is_the_best_constant_in_squared_error():
    torch.manual_seed(1)
    y = torch.randn(N, 3) * torch.tensor([1.0, 2.0, 3.0]) + 5
    data = TensorData(y.clone(), y)
    one = found(lambda x: x, data, mean_squared_error)
    assert one.value == pytest.approx(float(((y - y.mean(0)) ** 2).mean()), rel=1e-5)
    assert one.beaten
    assert not found(lambda x: torch.full_like(x, 5.0), data, mean_squared_error).beaten


def test_of_a_metric_of_the_users_own_the_outputs_are_dealt_out():
    """F1 of the whole set, and one value per example: neither says what the best constant is."""

    def f1(output, target):
        said = output.argmax(1)
        hits = float(((said == 1) & (target == 1)).sum())
        return 2 * hits / max(float((said == 1).sum() + (target == 1).sum()), 1.0)

    y = torch.randint(2, (N,), generator=torch.Generator().manual_seed(3))
    data = TensorData(y.float().unsqueeze(1), y)
    whole = found(right, data, Metric("f1", whole=f1))
    assert 0.35 < whole.value < 0.65
    assert whole.beaten
    each = found(right, data, Metric("hit", whole=lambda output, target: (output.argmax(1) == target).float()))
    assert 0.35 < each.value < 0.65
    assert each.beaten
    deaf = found(lambda x: torch.ones(len(x), 2), data, Metric("hit", whole=lambda o, t: (o.argmax(1) == t).float()))
    assert not deaf.beaten


def test_outputs_of_unequal_shapes_cannot_be_dealt_out():
    sizes = iter([2, 3, 4, 5, 6, 7])
    metric = Metric("none", whole=lambda output, target: torch.ones(len(output)))
    data = labelled()
    assert guess(lambda x: torch.ones(len(x), next(sizes)), data, metric, score(right, data, metric)) is None
