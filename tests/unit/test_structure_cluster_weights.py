"""cluster_weights: a fixed point of k-means, few values, and values that stay shared in training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure._held import weights
from quadriga.methods.structure.cluster_weights import ClusterWeights, clustered, hold_clusters, kmeans, nearest
from quadriga.methods.structure.prune_weights import PruneWeights
from quadriga.testing import tiny_cnn
from quadriga.train.loop import fit

torch.set_num_threads(1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=60), st.integers(1, 9))
def test_it_ends_in_a_fixed_point(values, count):
    """Every value is in the interval of its nearest centroid, and every centroid is the mean of its values."""
    x = torch.tensor(values, dtype=torch.float64)
    centres = kmeans(x, count)
    place = nearest(x, centres)
    distance = (x[:, None] - centres).abs()
    torch.testing.assert_close(distance.gather(1, place[:, None])[:, 0], distance.min(1).values)
    for k in range(len(centres)):
        torch.testing.assert_close(x[place == k].mean(), centres[k], rtol=1e-9, atol=1e-9)


def test_more_clusters_leave_less_error_and_all_of_them_none():
    torch.manual_seed(0)
    w = torch.randn(500)
    errors = [float((clustered(w, k) - w).square().sum()) for k in (1, 2, 4, 8, 16, 64)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]
    few = torch.tensor([-1.0, 0.5, 2.0, 0.0]).repeat(10)
    assert torch.equal(clustered(few, 4), few)


def test_values_are_few_zeros_stay_and_training_keeps_them_shared():
    workload = tiny_cnn()
    setup = PruneWeights(ratio=0.5)(Setup.of(workload))
    zeros = {n: p == 0 for n, p in weights(setup.model)}
    setup = ClusterWeights(bits=3, least=64)(setup)
    places = {n: p.detach().unique(return_inverse=True)[1] for n, p in weights(setup.model)}
    before = {n: p.detach().clone() for n, p in weights(setup.model)}
    fit(setup, workload.train, epochs=1, seed=0)
    for name, p in weights(setup.model):
        if p.numel() >= 64:
            assert len(p.unique()) <= 8 and (p[zeros[name]] == 0).all() and not torch.equal(p, before[name])
            for k in places[name].unique():
                assert len(p[places[name] == k].unique()) == 1
    assert "FLOAT_WEIGHTS" not in setup.traits


def test_a_cluster_becomes_the_mean_of_its_members():
    model = torch.nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 1, 1, 5], [5, 5, 5, 5]])
    hook = hold_clusters(model)
    model.weight.data += torch.tensor([[0.0, 3, 3, 0], [0, 0, 5, 0]])
    hook.after_step(model, 0.5)
    assert model.weight.tolist() == [[3.0, 3.0, 3.0, 6.0], [6.0, 6.0, 6.0, 6.0]]


def test_bad_fields_and_small_layers():
    with pytest.raises(BadInput, match="bits"):
        ClusterWeights(bits=9)
    with pytest.raises(NotApplicable, match="has 100000 weights"):
        ClusterWeights(least=100_000)(Setup.of(tiny_cnn()))
