"""prune_weights: exactly the smallest go, and stay away in training."""

import pytest
import torch

from quadriga.core.errors import BadInput
from quadriga.core.setup import Setup
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.methods.structure._held import weights
from quadriga.methods.structure.prune_weights import PruneWeights, masks
from quadriga.testing import tiny_cnn, tiny_lstm, tiny_transformer
from quadriga.train.loop import fit

torch.set_num_threads(1)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.93])
def test_the_smallest_go_and_no_others(ratio):
    torch.manual_seed(0)
    some = {"a": torch.randn(7, 9), "b": 3 * torch.randn(4, 5, 2)}
    found = masks(some, ratio)
    gone = torch.cat([some[n][~found[n]].abs() for n in some])
    left = torch.cat([some[n][found[n]].abs() for n in some])
    assert len(gone) == round(ratio * 103) and gone.max() <= left.min()
    each = masks(some, ratio, "layer")
    assert {n: int((~m).sum()) for n, m in each.items()} == {"a": round(ratio * 63), "b": round(ratio * 40)}


@pytest.mark.parametrize("build", [tiny_cnn, tiny_lstm, tiny_transformer])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_zeros_stay_zeros_under_momentum_and_decay_and_the_rest_trains(build, kind):
    workload = build()
    setup = PruneWeights(ratio=0.7)(Setup.of(workload))
    zeros = {n: p == 0 for n, p in weights(setup.model)}
    before = {n: p.detach().clone() for n, p in setup.model.named_parameters()}
    setup = Optimizer(kind=kind, lr=0.01, weight_decay=0.1)(setup)
    fit(setup, workload.train, epochs=1, seed=0)
    for name, p in weights(setup.model):
        assert (p[zeros[name]] == 0).all() and (zeros[name].all() or not torch.equal(p, before[name]))
    share = sum(int(z.sum()) for z in zeros.values()) / sum(z.numel() for z in zeros.values())
    assert abs(share - 0.7) < 0.01


def test_embeddings_can_be_left_and_biases_always_are():
    setup = PruneWeights(ratio=0.9, embeddings=False)(Setup.of(tiny_lstm()))
    assert (setup.model.embed.weight != 0).all()
    assert all((p != 0).all() for n, p in setup.model.named_parameters() if "bias" in n)
    with pytest.raises(BadInput, match="ratio"):
        PruneWeights(ratio=1.0)
