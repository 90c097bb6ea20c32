"""Scores: the metric's value, example by example, and clear errors for metrics that misbehave."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from quadriga.core.data import TensorData
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric, accuracy, bits_per_byte, mean_squared_error
from quadriga.measure.quality import Scores, join, score

torch.set_num_threads(1)


def classification(n=23, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return TensorData(torch.randn(n, classes, generator=g), torch.randint(classes, (n,), generator=g))


def metric_of(function, **options):
    return Metric("mine", "", True, whole=function, **options)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 256])
def test_accuracy_does_not_depend_on_the_batch_size(batch_size):
    data = classification()
    scores = score(lambda x: x, data, accuracy, batch_size)
    right = (data.inputs.argmax(1) == data.target).numpy()
    assert scores.value == pytest.approx(100 * right.mean())
    assert np.array_equal(scores.values, right.astype(float)) and len(scores) == 23
    assert np.array_equal(scores.predictions, data.inputs.argmax(1).numpy())


def test_bits_per_byte_is_weighted_by_tokens():
    """Σwv/Σw over sequences with ignored positions equals the mean over all positions that count."""
    g = torch.Generator().manual_seed(1)
    logits, target = torch.randn(6, 7, 11, generator=g), torch.randint(11, (6, 7), generator=g)
    target[0, 2:], target[3, 5:] = -100, -100
    scores = score(lambda x: x, TensorData(logits, target), bits_per_byte, 4)
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()) / math.log(2)
    assert scores.value == pytest.approx(float(flat), rel=1e-6)
    assert scores.weights.tolist() == [2, 7, 7, 5, 7, 7] and scores.predictions is None


def test_predictions_per_position_are_left_out():
    data = TensorData(torch.randn(5, 3, 4), torch.randint(4, (5, 3)))
    assert score(lambda x: x, data, accuracy).predictions is None


def test_a_module_is_evaluated_in_eval_mode_and_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9))
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = classification()
    one, two = score(model, data, accuracy, 7), score(model, data, accuracy, 7)
    assert np.array_equal(one.values, two.values)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_module_gets_dict_inputs_as_keywords():
    class Keyed(nn.Module):
        def forward(self, ids, mask):
            return {"logits": ids * mask}

    data = TensorData({"ids": torch.randn(5, 3), "mask": torch.ones(5, 3)}, torch.randint(3, (5,)))
    assert 0 <= score(Keyed(), data, accuracy, 2).value <= 100


def test_a_callable_with_one_value_per_example_is_paired():
    data = TensorData(torch.randn(9, 2), torch.randn(9, 2))
    scores = score(lambda x: x, data, metric_of(lambda o, t: (o - t).abs().sum(1)), 4)
    assert scores.values.tolist() == pytest.approx((data.inputs - data.target).abs().sum(1).tolist())
    assert scores.value == pytest.approx(scores.values.mean()) and scores.outputs is None


def test_a_callable_with_one_number_sees_the_whole_set_once_joined():
    data, calls = classification(), []

    def macro(output, target):
        calls.append(len(target))
        hits = output.argmax(1) == target
        return sum(float(hits[target == c].float().mean()) for c in range(4)) / 4  # NaN if a class is missing

    scores = score(lambda x: x, data, metric_of(macro), 5)
    assert scores.values is None and scores.value == macro(data.inputs, data.target)
    assert calls[:-1] == [5, 23] and torch.equal(scores.outputs, data.inputs)


def test_a_set_metric_may_fail_on_a_batch_that_is_too_small():
    def needs_all(output, target):
        if len(target) < 23:
            raise ValueError("one class only")
        return 0.5

    assert score(lambda x: x, classification(), metric_of(needs_all), 5).value == 0.5


def test_outputs_keep_their_type_when_joined():
    class Output(OrderedDict):
        logits = property(lambda self: self["logits"])

    parts = [Output(logits=torch.ones(2, 3), deep=(torch.zeros(2),)), Output(logits=torch.ones(1, 3), deep=(torch.zeros(1),))]
    joined = join(parts)
    assert joined.logits.shape == (3, 3) and joined["deep"][0].shape == (3,)
    with pytest.raises(BadInput, match="cannot be joined"):
        join([torch.ones(2, 3), torch.ones(2, 4)])


def broken_at(place, value):
    def metric(output, target):
        values = torch.ones(len(target))
        values[target == place] = value
        return values

    return metric


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_metric_and_example(value):
    data = TensorData(torch.randn(20, 2), torch.arange(20))
    with pytest.raises(BadInput, match=r'"mine" returned (nan|inf|-inf) for example 17'):
        score(lambda x: x, data, metric_of(broken_at(17, value)), 6)


@pytest.mark.parametrize(
    "returned, message",
    [
        ("good", "'good'"),
        (None, "None"),
        (math.nan, "nan on all examples"),
        (torch.tensor(math.inf), "inf on all examples"),
        (torch.ones(7), "tensor"),
        (["a"] * 23, "a"),
        ({"f1": 1.0}, "f1"),
        (True, "True"),
    ],
)
def test_a_metric_of_the_whole_set_has_to_return_a_number(returned, message):
    with pytest.raises(BadInput, match=message):
        score(lambda x: x, classification(), metric_of(lambda o, t: returned), 23)


def test_a_metric_that_raises_is_named_with_the_place():
    def fails(output, batch):
        raise ZeroDivisionError("float division by zero")

    with pytest.raises(BadInput, match=r'"mine" raised ZeroDivisionError: float division by zero on examples 0 to 5'):
        score(lambda x: x, classification(), Metric("mine", examples=fails), 6)
    with pytest.raises(BadInput, match=r"raised TypeError.*all examples"):
        score(lambda x: x, classification(), metric_of(lambda output: 1.0))


def test_an_error_of_the_model_is_not_blamed_on_the_metric():
    with pytest.raises(RuntimeError):
        score(lambda x: x @ torch.ones(7, 7), classification(), accuracy)


@pytest.mark.parametrize(
    "values, weights", [(torch.ones(5), torch.ones(6)), (torch.ones(6, 1), torch.ones(6)), ("abcdef", torch.ones(6))]
)
def test_wrong_shapes_are_refused(values, weights):
    with pytest.raises(BadInput, match='"mine" returned'):
        score(lambda x: x, classification(6), Metric("mine", examples=lambda o, b: (values, weights)))


def test_weights_that_sum_to_nothing_are_refused():
    with pytest.raises(BadInput, match="sum to 0"):
        score(lambda x: x, classification(6), Metric("mine", examples=lambda o, b: (torch.ones(6), torch.zeros(6))))


@pytest.mark.parametrize(
    "metric", [accuracy, metric_of(lambda o, t: float((o.argmax(1) == t).float().mean()), predict=accuracy.predict)]
)
def test_scores_survive_the_file(metric, tmp_path):
    scores = score(lambda x: x, classification(), metric)
    scores.save(tmp_path / "s.npz")
    read = Scores.load(tmp_path / "s.npz")
    assert (read.value, read.seconds, len(read)) == (scores.value, scores.seconds, len(scores))
    for name in ("values", "weights", "predictions", "outputs", "targets"):
        a, b = getattr(scores, name), getattr(read, name)
        assert (a is None) == (b is None) and (a is None or np.array_equal(np.asarray(a), np.asarray(b)))
    assert read.plain()["n"] == 23


def test_a_file_with_pickles_or_damage_is_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", facts=np.array({"value": 1}, dtype=object))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    for name in ("evil.npz", "cut.npz", "none.npz"):
        with pytest.raises(BadInput):
            Scores.load(tmp_path / name)


def test_lower_is_better_values_stay_in_the_metrics_own_unit():
    data = TensorData(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
    scores = score(lambda x: x, data, mean_squared_error)
    assert scores.values.tolist() == [1.0, 9.0] and scores.value == 5.0
