"""prune_blocks: the blocks that do least go, and the rest computes as before."""

import pytest
import torch
from torch import nn

from quadriga import Workload
from quadriga.core.batch import call, tensors
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure.prune_blocks import PruneBlocks
from quadriga.testing import tiny_cnn, tiny_lstm, tiny_transformer
from quadriga.testing.zoo import ZOO


def outputs(setup, model):
    with torch.no_grad():
        return tensors(call(model.eval(), setup.context.example))[0]


@pytest.mark.parametrize("idle", [0, 1])
def test_a_block_that_does_nothing_goes_and_nothing_changes(idle):
    setup = Setup.of(tiny_transformer())
    stays = setup.model.blocks[1 - idle]
    for layer in (setup.model.blocks[idle].proj, setup.model.blocks[idle].down):
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    before = outputs(setup, setup.model)
    after = PruneBlocks(ratio=0.5)(setup).model
    assert list(after.blocks) == [stays] and "blocks.0.up.weight" in after.state_dict()
    assert torch.equal(outputs(setup, after), before)


@pytest.mark.parametrize(("name", "stack"), [("bert", "bert.encoder.layer"), ("llama", "model.layers"), ("vit", "vit.layers")])
def test_models_of_transformers_lose_a_third_of_their_layers(name, stack):
    setup = Setup.of(ZOO[name]())
    count = len(setup.model.get_submodule(stack))
    model = PruneBlocks(ratio=1 / 3)(setup).model
    layers = model.get_submodule(stack)
    assert len(layers) == count - max(1, round(count / 3))
    places = [m.layer_idx for layer in layers for m in layer.modules() if hasattr(m, "layer_idx")]
    assert places == sorted(places) and set(places) <= set(range(len(layers)))
    assert outputs(setup, model).isfinite().all()


class ByNumber(nn.Module):
    """Asks for its blocks by their numbers."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        return self.parts[1](self.parts[0](x))


def test_a_forward_that_asks_for_blocks_by_number_is_left_whole():
    x, y = torch.randn(64, 4), torch.randint(4, (64,))
    workload = Workload(model=ByNumber(), train=(x, y), val=(x, y), test=(x, y), loss="cross_entropy", metric="accuracy")
    setup = Setup.of(workload)
    with pytest.raises(NotApplicable, match=r"parts\.[01]: the changed model does not run"):
        PruneBlocks()(setup)
    assert [*setup.model.parts._modules] == ["0", "1"]


def test_one_block_of_a_stack_stays():
    setup = Setup.of(tiny_transformer())
    assert len(PruneBlocks(ratio=0.99)(setup).model.blocks) == 1


@pytest.mark.parametrize("build", [tiny_cnn, tiny_lstm])
def test_without_blocks_it_refuses(build):
    with pytest.raises(NotApplicable, match="stack"):
        PruneBlocks()(Setup.of(build()))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_outside_is_refused(ratio):
    with pytest.raises(BadInput, match="ratio"):
        PruneBlocks(ratio=ratio)
