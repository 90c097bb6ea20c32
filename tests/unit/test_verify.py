"""Verification: equal outputs, kept quality, and compression that does not compress."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from quadriga.core.data import TensorData
from quadriga.core.errors import BadInput
from quadriga.core.method import Numerics
from quadriga.core.metric import Metric, accuracy, mean_squared_error
from quadriga.measure.quality import Scores, score
from quadriga.measure.stats import tango_lower
from quadriga.verify.equal import TOLERANCE, equal
from quadriga.verify.fake import Worth, fakes, told
from quadriga.verify.quality import PAIRED, SET, TANGO, compare, disagreement, without_labels

torch.set_num_threads(1)
X = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))


# --- equal


def test_a_model_equals_itself_bit_by_bit():
    model = nn.Linear(6, 3).eval()
    found = equal(model, model, X, numerics=Numerics.EXACT, batches=(1, 2, 25))
    assert found.holds and found.max_abs == 0 and found.batches == (1, 2, 25) and found.tolerance == 0


def test_exact_means_bits():
    for other in (
        lambda x: x + torch.finfo(torch.float32).eps * x.abs(),
        lambda x: x.double(),
        lambda x: x.masked_fill(x == 0, -0.0),
    ):
        given = torch.cat([X, torch.zeros(1, 6)]).flip(0)
        assert not equal(lambda x: x, other, given, numerics=Numerics.EXACT).holds


@pytest.mark.parametrize("compute", list(TOLERANCE))
def test_close_is_a_limit_on_error_over_magnitude(compute):
    for factor, holds in ((0.9, True), (1.1, False)):
        found = equal(lambda x: x, lambda x, f=factor: x.double() * (1 + f * TOLERANCE[compute]), X.double(), compute=compute)
        assert found.holds is holds
        assert found.max_rel == pytest.approx(factor * TOLERANCE[compute], rel=1e-3)


def test_real_computation_in_a_coarser_type_is_close_by_its_own_limit_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    half = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    run = lambda x: half(x.bfloat16()).float()  # noqa: E731
    assert equal(model, run, X, compute="bfloat16").holds
    assert not equal(model, run, X, compute="float32").holds


def test_each_output_is_held_to_its_own_magnitude():
    """An error that vanishes beside a large output is found in the small one."""
    reference = lambda x: {"large": 1e6 * x, "small": x}  # noqa: E731
    found = equal(reference, lambda x: {"large": 1e6 * x, "small": x + 1e-2}, X, batches=[2])
    assert [text.split(" at ")[0] for text in found.failures] == ["output.small"]


def test_an_error_at_one_batch_size_is_found():
    """Such as a graph that was traced with a constant batch."""
    found = equal(lambda x: x, lambda x: x if len(x) < 64 else x.flip(0), X, batches=(1, 2, 64))
    assert not found.holds and all("batch 64" in text for text in found.failures)


def test_other_shapes_names_types_and_nans():
    other_shape = equal(lambda x: x, lambda x: x[:, :2], X)
    assert not other_shape.holds and math.isinf(other_shape.max_abs) and other_shape.plain()["max_abs"] is None
    assert not equal(lambda x: (x, x), lambda x: (x,), X).holds
    assert not equal(lambda x: x, lambda x: x.masked_fill(x > 1, math.nan), X).holds
    assert not equal(lambda x: x.argmax(1), lambda x: x.argmin(1), X).holds  # integers have no tolerance
    nans = lambda x: x.masked_fill(x > 1, math.nan).masked_fill(x < -1, -math.inf)  # noqa: E731
    assert equal(nans, nans, X).holds and equal(nans, nans, X, numerics=Numerics.EXACT).holds
    with pytest.raises(ValueError, match="quality"):
        equal(nans, nans, X, numerics=Numerics.CHANGED)
    json.dumps(other_shape.plain(), allow_nan=False)


# --- quality


def scores_of(values, weights=None, predictions=None, scale=1.0):
    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    return Scores(values, weights, predictions, scale * float(np.average(values, weights=weights)))


def test_accuracy_goes_by_tango_in_points():
    right = np.ones((2, 1000))
    right[0, :100], right[1, 80:200] = 0, 0
    found = compare(scores_of(right[0], scale=100), scores_of(right[1], scale=100), accuracy, margin=5.0, level=0.95)
    assert found["method"] == TANGO
    assert found["difference"] == pytest.approx(-2.0) and found["low"] == pytest.approx(100 * tango_lower(80, 100, 1000, 0.95))
    assert (found["value"], found["baseline"], found["unit"], found["n"]) == (88.0, 90.0, "pt", 1000)
    assert found["holds"] is (found["low"] >= -5.0)
    assert not compare(scores_of(right[0], scale=100), scores_of(right[1], scale=100), accuracy, margin=2.0)["holds"]
    json.dumps(found)


def test_lower_is_better_turns_the_sign():
    rng = np.random.default_rng(0)
    worse = rng.gamma(2, 1, 500)
    found = compare(scores_of(worse), scores_of(worse * 0.9), mean_squared_error, margin=0.0, level=0.95)
    assert found["method"] == PAIRED and found["value"] < found["baseline"]
    assert 0 < found["low"] < found["difference"] and found["holds"]
    back = compare(scores_of(worse * 0.9), scores_of(worse), mean_squared_error, margin=0.0, level=0.95)
    assert back["difference"] == pytest.approx(-found["difference"]) and not back["holds"]


def test_unequal_weights_go_by_the_bootstrap_even_for_right_or_wrong():
    right = np.random.default_rng(1).integers(0, 2, (2, 300))
    weights = np.random.default_rng(2).integers(1, 5, 300)
    found = compare(scores_of(right[0], weights), scores_of(right[1], weights), accuracy, margin=100.0)
    assert found["method"] == PAIRED


def test_finalists_share_the_error_rate():
    right = np.random.default_rng(3).random((2, 2000)) < 0.9
    one, three = (compare(scores_of(right[0]), scores_of(right[1]), accuracy, 1.0, 0.97, finalists=k) for k in (1, 3))
    assert (
        three["low"] < one["low"]
        and three["low"] == compare(scores_of(right[0]), scores_of(right[1]), accuracy, 1.0, 0.99)["low"]
    )
    with pytest.raises(ValueError, match="finalists"):
        compare(scores_of(right[0]), scores_of(right[1]), accuracy, 1.0, finalists=4)


def test_a_set_metric_is_bootstrapped_in_pairs():
    """Same outputs, no difference, no spread; and a set metric that is a mean agrees with the paired bootstrap."""
    g = torch.Generator().manual_seed(4)
    data = TensorData(torch.randn(300, 3, generator=g), torch.randint(3, (300,), generator=g))
    whole = Metric("hits", "pt", True, whole=lambda o, t: float((o.argmax(1) == t).float().mean()), scale=100.0)
    noise = torch.randn(300, 3, generator=g)
    base, same, other = (score(run, data, whole, 300) for run in (lambda x: x, lambda x: x * 2, lambda x: x + noise))
    assert compare(base, same, whole, margin=0.0)["low"] == 0.0
    found = compare(base, other, whole, margin=1.0, level=0.95)
    paired = compare(score(lambda x: x, data, accuracy), score(lambda x: x + noise, data, accuracy, 300), accuracy, 1.0, 0.95)
    assert found["method"] == SET and found["disagreement"] is None
    assert found["difference"] == pytest.approx(paired["difference"], abs=1e-3)
    assert found["low"] == pytest.approx(paired["low"], abs=1.0)


def test_disagreement_prefers_predictions():
    a = scores_of([1, 1, 0, 0], predictions=np.array([1, 2, 3, 4]))
    b = scores_of([1, 1, 0, 1], predictions=np.array([1, 2, 5, 6]))
    assert disagreement(a, b) == 0.5
    assert disagreement(scores_of([1, 1, 0, 0]), scores_of([1, 1, 0, 1])) == 0.25


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=80))
@settings(max_examples=40, deadline=None)
def test_no_more_is_lost_than_the_certificate_says_whatever_the_labels_are(rows):
    label, one, other = np.array(rows).T
    a, b = (scores_of((p == label).astype(float), predictions=p, scale=100.0) for p in (one, other))
    bound = without_labels(a, b, accuracy, 0.99)
    assert a.value - b.value <= bound <= 100
    shuffled = scores_of(np.zeros(len(rows)), predictions=other, scale=100.0)
    assert without_labels(a, shuffled, accuracy, 0.99) == bound  # no label was looked at
    assert without_labels(a, b, accuracy, 0.99, finalists=2) >= bound


def test_there_is_no_certificate_without_predictions_or_for_other_metrics():
    right = scores_of([1, 0, 1], predictions=np.array([0, 1, 2]))
    assert without_labels(right, right, accuracy, 0.99) < 100
    assert without_labels(right, scores_of([1, 0, 1]), accuracy, 0.99) is None
    graded = scores_of([0.5, 0.2, 1.0], predictions=np.array([0, 1, 2]))
    assert without_labels(graded, graded, mean_squared_error, 0.99) is None


def test_scores_of_other_splits_are_refused():
    with pytest.raises(BadInput, match="cannot be paired"):
        compare(scores_of([1, 0]), scores_of([1, 0, 1]), accuracy, 1.0)


@given(st.integers(0, 2**16), st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_the_bound_is_below_the_difference_and_decides(seed, margin):
    rng = np.random.default_rng(seed)
    right = rng.random((2, 400)) < rng.uniform(0.3, 0.99, (2, 1))
    found = compare(scores_of(right[0], scale=100), scores_of(right[1], scale=100), accuracy, margin)
    assert found["low"] <= found["difference"] + 1e-9
    assert found["holds"] == (found["low"] >= -margin)


# --- fake


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def kinds(*args, **options):
    return {row["kind"] for row in fakes(*args, **options)}


def test_an_honest_network_is_clean():
    small = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
    assert fakes(small, net(), bytes=100, baseline_bytes=200) == []
    assert fakes(net(), net()) == []


def test_masks_are_found_until_removed_and_zeros_after():
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=0.6)
    found = fakes(model, net())
    assert {row["kind"] for row in found} == {"mask", "zeros"}
    assert found[0]["where"] == "0" and found[0]["number"] == pytest.approx(0.6, abs=0.01) and "60%" in found[0]["text"]
    prune.remove(model[0], "weight")
    assert kinds(model, net()) == {"zeros"}


def test_zeros_that_were_there_before_are_not_held_against_it():
    sparse = net()
    sparse[2].weight.data[:, ::2] = 0
    assert fakes(sparse, sparse) == []
    assert kinds(sparse, net()) == kinds(sparse) == {"zeros"}


def test_parametrizations_are_found():
    model = net()
    parametrizations.weight_norm(model[0])
    row = next(r for r in fakes(model) if r["kind"] == "parametrization")
    assert row["where"] == "0" and "WeightNorm" in row["text"]


def test_simulated_integers_are_found():
    class FakeQuantize(nn.Module):
        def forward(self, x):
            return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)

    model = nn.Sequential(nn.Linear(4, 4), FakeQuantize())
    assert kinds(model) == {"fake_quant"}

    class Plain(nn.Module):
        def forward(self, x):
            return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)

    assert kinds(torch.fx.symbolic_trace(Plain())) == {"fake_quant"}


def test_bytes_that_did_not_shrink_are_found():
    assert kinds(bytes=200, baseline_bytes=200) == {"bytes"}
    assert fakes(bytes=250, baseline_bytes=200)[0]["number"] == 1.25
    assert fakes(bytes=199, baseline_bytes=200) == []


def test_float_weights_that_are_called_int8_are_found():
    weights = sum(p.numel() for p in net().parameters())
    assert {r["kind"]: r["number"] for r in fakes(net(), bytes=4 * weights, bits=8)} == {"storage": 32}
    assert fakes(net(), bytes=4 * weights) == fakes(net(), bytes=2 * weights, bits=8) == []


def test_each_kind_is_told_with_what_it_is_worth():
    masked = net()
    prune.l1_unstructured(masked[0], "weight", amount=0.6)
    rows = [*fakes(masked, net()), *fakes(Tied(False), Tied(True)), *fakes(net(), bytes=9000, bits=8)]
    lines = told(rows, Worth("onnxruntime", 0.001, 0.0))
    assert len(lines) == 4 and all("0 % smaller, 0 % faster in onnxruntime" in line for line in lines)
    assert "by a mask" in lines[0] and "called" not in lines[0] and "zeros (60% of 0.weight)" in lines[-1]


def test_what_it_is_worth_has_a_sign():
    assert str(Worth("eager", -0.5, -0.2)) == "50 % larger, 20 % slower in eager"
    assert str(Worth("openvino", 0.75)) == "75 % smaller in openvino"


class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 32), nn.Linear(32, 32, bias=False)
        self.head.weight = self.embed.weight if tie else nn.Parameter(self.embed.weight.detach().clone())


def test_a_broken_tie_is_found_with_its_bytes():
    rows = fakes(Tied(False), Tied(True))
    assert [(row["kind"], row["number"]) for row in rows] == [("untied", 4 * 1024)]
    assert "embed.weight and head.weight" in rows[0]["text"]
    assert kinds(Tied(False)) == {"untied"}  # equal weights stored twice are so without a baseline too
    assert fakes(Tied(True), Tied(True)) == []
    assert fakes(Tied(False), Tied(False)) == []  # the baseline never shared them
