"""tie_layers: one set of matrices for several blocks, counted once, trained as one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quadriga.core.axes import Patch
from quadriga.core.batch import call, tensors
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.stacks import Block
from quadriga.measure.size import parameters
from quadriga.methods.structure.tie_layers import Adapted, TieLayers, layers_alike, parted, runs, tie
from quadriga.testing import tiny_cnn, tiny_mlp, tiny_transformer
from quadriga.testing.zoo import ZOO

torch.set_num_threads(1)


def outputs(setup):
    with torch.no_grad():
        return tensors(call(setup.model.eval(), setup.context.example))[0]


def matrices(module):
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def test_equal_blocks_lose_nothing():
    setup = Setup.of(tiny_transformer())
    first, second = setup.model.blocks
    second.load_state_dict(first.state_dict())
    before, count, shared = outputs(setup), parameters(setup.model), matrices(first)
    model = TieLayers()(setup).model
    assert parameters(model) == count - shared and model.blocks[1].up.weight is model.blocks[0].up.weight
    assert model.blocks[1].norm1.weight is not model.blocks[0].norm1.weight
    torch.testing.assert_close(outputs(setup), before, rtol=1e-6, atol=1e-6)


def test_a_difference_of_that_rank_is_kept_exactly():
    setup = Setup.of(tiny_transformer())
    first, second = setup.model.blocks
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for layer in (second.qkv, second.proj, second.up, second.down):
            layer.weight += 0.1 * torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features)
    before = outputs(setup)
    model = TieLayers(rank=2)(setup).model
    assert type(model.blocks[1].up) is Adapted and model.blocks[0].up.weight is model.blocks[1].up.weight
    torch.testing.assert_close(outputs(setup), before, rtol=1e-3, atol=1e-4)


def test_the_shared_weight_is_the_mean_and_can_be_taken_back():
    stack = nn.ModuleList(nn.Sequential(nn.Linear(3, 4)) for _ in range(3))
    run = [Block(str(i), stack, m) for i, m in enumerate(stack)]
    mean, own = torch.stack([b[0].weight.data for b in stack]).mean(0), [b[0].weight.data.clone() for b in stack]
    patch = Patch()
    tie(stack, run, 0, patch)
    assert all(b[0].weight is stack[0][0].weight for b in stack)
    torch.testing.assert_close(stack[2][0].weight.data, mean)
    patch.undo()
    assert all(torch.equal(b[0].weight.data, w) for b, w in zip(stack, own, strict=True))


@pytest.mark.parametrize(("sets", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 2]), (6, []), (9, [])])
def test_runs_are_even(sets, sizes):
    stack = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(6))
    assert [len(r) for r in runs([Block(str(i), stack, m) for i, m in enumerate(stack)], sets)] == sizes


@pytest.mark.parametrize("name", ZOO)
def test_models_of_transformers_share_their_layers(name):
    setup = Setup.of(ZOO[name]())
    count = parameters(setup.model)
    model = TieLayers()(setup).model
    assert parameters(model) < 0.8 * count
    loss = outputs(setup).square().mean()
    assert loss.isfinite()


def test_what_cannot_share_is_refused():
    for build in (tiny_cnn, tiny_mlp):
        with pytest.raises(NotApplicable, match="no stack holds neighbours"):
            TieLayers()(Setup.of(build()))
    setup = TieLayers()(Setup.of(tiny_transformer()))
    with pytest.raises(NotApplicable, match="tied already"):
        TieLayers()(setup)
    with pytest.raises(NotApplicable, match="rank is too high"):
        TieLayers(rank=15)(Setup.of(tiny_transformer()))
    with pytest.raises(BadInput, match="sets"):
        TieLayers(sets=0)


def test_layers_alike_share_where_there_is_no_stack():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    setup = replace(Setup.of(tiny_mlp()), model=net, context=replace(Setup.of(tiny_mlp()).context, example=torch.randn(2, 6)))
    model, count = TieLayers()(setup).model, 6 * 8 + 8 + 2 * (8 * 8 + 8) + 8 * 3 + 3
    assert model[4].weight is model[2].weight and model[4].bias is not model[2].bias
    assert parameters(model) == count - 64


def test_layers_alike_keep_a_difference_of_their_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        net[4].weight.copy_(net[2].weight + torch.randn(8, 1) @ torch.randn(1, 8))
    x = torch.randn(5, 6)
    before, patch = net(x), Patch()
    (run,) = parted(layers_alike(net), 1)
    tie(net, run, 1, patch)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    assert type(net[2]) is type(net[4]) is Adapted
    patch.undo()
    assert type(net[2]) is nn.Linear
