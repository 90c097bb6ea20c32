"""Simulated int8, layers left in float because they hurt, and training under the rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from quadriga import runtime
from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.rounding import round_activation, round_weight
from quadriga.core.setup import PROBE, Context, Setup
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.methods.hardware._simulate import (
    Rounding,
    fewest_floats,
    output_errors,
    products,
    roundings,
    simulated,
    squared_error,
    watch,
)
from quadriga.methods.hardware.qat import QAT
from quadriga.methods.hardware.quantize_int8 import QuantizeInt8
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.methods.structure.distill import Distill
from quadriga.testing import tiny_cnn
from quadriga.train.loop import fit


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def batches(count=4, shape=(16,), rows=64):
    draw = torch.Generator().manual_seed(5)
    inputs = torch.randn(count * rows, *shape, generator=draw)
    return tuple(Batch(x, torch.zeros(rows, dtype=torch.long), torch.arange(rows)) for x in inputs.split(rows))


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


def spiked():
    """One input of its third layer is a thousand times the others, which it needs: one scale cannot serve both."""

    class Spiked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.spoilt = nn.Linear(16, 64), nn.Linear(64, 15), nn.Linear(16, 4)
            with torch.no_grad():
                self.spoilt.weight[:, 15] = 0.0

        def forward(self, x):
            x = self.second(functional.relu(self.first(x)))
            return self.spoilt(torch.cat([x, 1000 * x.new_ones(len(x), 1)], 1))

    return Spiked()


def test_simulated_layers_compute_with_rounded_weights_and_inputs_and_are_themselves_again():
    model, (batch, *_) = mlp().eval(), batches()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = watch(model, products(model), [batch])
    layers = roundings(seen, "static")
    with simulated(model, layers), torch.no_grad():
        found = model(batch.inputs)
    x = batch.inputs
    with torch.no_grad():
        for name, layer in model.named_children():
            if isinstance(layer, nn.Linear):
                x = functional.linear(
                    round_activation(x, layers[name].low, layers[name].high), round_weight(layer.weight), layer.bias
                )
            else:
                x = layer(x)
    torch.testing.assert_close(found, x)
    assert (layers["0"].low, layers["0"].high) == (float(batch.inputs.min()), float(batch.inputs.max()))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any("weight" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_fails_leaves_the_layers_as_they_were():
    model = mlp()
    with pytest.raises(RuntimeError), simulated(model, {"0": Rounding("dynamic")}):
        model(torch.randn(2, 17))
    assert not any("weight" in vars(m) or m._forward_hooks for m in model.modules())


def test_the_simulation_foretells_what_onnxruntime_computes(tmp_path):
    """Most of the distance between int8 and float is the simulation's too."""
    model = mlp().eval()
    data = batches()
    spec = RuntimeSpec("onnxruntime", threads=1, quant=QuantSpec())
    context = Context(data[0].inputs[:2], data, accuracy)
    found = runtime.build(model, spec, context, tmp_path).run()(data[0].inputs)
    with torch.no_grad():
        exact = model(data[0].inputs)
        with simulated(model, roundings(watch(model, products(model), data), "static")):
            foretold = model(data[0].inputs)
    assert (found - foretold).norm() < 0.8 * (found - exact).norm()  # 0.46 to 0.70 by seed: the output is rounded too


def test_the_layer_that_hurts_is_found_and_alone_left_out():
    model, data = spiked().eval(), batches()
    seen = watch(model, products(model), data)
    layers = roundings(seen, "static")
    errors = output_errors(model, layers, data)
    assert max(errors, key=errors.get) == "spoilt" and errors["spoilt"] > 100 * errors["first"]
    work = {name: one.products for name, one in seen.items()}
    assert work == {"first": 4 * 64 * 16 * 64, "second": 4 * 64 * 64 * 15, "spoilt": 4 * 64 * 16 * 4}
    left = fewest_floats(errors, work, lambda names: squared_error(model, without(layers, names), data) < 0.05**2)
    assert left == ["spoilt"]


def without(layers, names):
    return {name: one for name, one in layers.items() if name not in names}


@pytest.mark.parametrize("needed", range(6))
def test_as_few_layers_as_are_enough_and_not_many_questions(needed):
    names, asked = [f"l{i}" for i in range(5)], []

    def holds(left):
        asked.append(len(left))
        return len(left) >= needed

    found = fewest_floats({n: 5.0 - i for i, n in enumerate(names)}, dict.fromkeys(names, 1), holds)
    assert found == (names[:needed] if needed < 5 else None)
    assert len(asked) <= 1 + 3


def workload(model):
    splits = [(torch.randn(128, 16), torch.randint(4, (128,))) for _ in range(3)]
    return Workload(model=model, train=splits[0], val=splits[1], test=splits[2], trained=True)


def test_quantize_int8_leaves_sensitive_layers_out_and_says_so_once():
    decided = []

    def decide(key, compute):
        decided.append((key, compute()))
        return decided[-1][1]

    setup = Setup.of(workload(spiked()), decide=decide)
    assert QuantizeInt8()(setup).runtime.quant.keep_float == ()
    after = QuantizeInt8(sensitive="float", keep_float=("first",))(setup)
    assert after.runtime.quant.keep_float == ("first", "spoilt")
    assert decided == [("layers left in float", ["spoilt"])]


def test_the_floor_decides_where_it_is_known():
    setup = Setup.of(workload(spiked()), enough=lambda model, own=None: True)
    assert QuantizeInt8(sensitive="float")(setup).runtime.quant.keep_float == ()
    setup = Setup.of(workload(spiked()), enough=lambda model, own=None: len(model.spoilt._forward_hooks) == 0)
    assert QuantizeInt8(sensitive="float")(setup).runtime.quant.keep_float == ("spoilt",)
    setup = Setup.of(workload(spiked()), enough=lambda model, own=None: False)
    with pytest.raises(NotApplicable, match="not good enough in any layer"):
        QuantizeInt8(sensitive="float")(setup)


def test_a_probe_without_trained_weights_leaves_none_out():
    setup = Setup.of(workload(spiked()), enough=lambda model, own=None: pytest.fail("nothing is measured"))
    probe = replace(setup, traits=setup.traits | {PROBE})
    assert QuantizeInt8(sensitive="float")(probe).runtime.quant.keep_float == ()


def learnable(seed):
    """Which of four products of inputs is largest."""
    torch.manual_seed(seed)
    x = torch.randn(384, 16)
    splits = [(part, (part[:, :4] * part[:, 4:8]).argmax(1)) for part in x.split(128)]
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    return Workload(model=model, train=splits[0], val=splits[1], test=splits[2], batch_size=32)


def test_training_under_two_bits_is_better_at_two_bits_than_training_without():
    losses = {}
    for aware in (False, True):
        task = learnable(seed=1)
        setup = Optimizer(kind="adamw", lr=0.01)(Setup.of(task, seed=1))
        setup = QAT(activations="weights", bits=2)(setup) if aware else setup
        fit(setup, task.train, epochs=60, seed=1)
        model, data = setup.model.eval(), task.train.batch(torch.arange(128))
        assert not any("weight" in vars(m) or m._forward_pre_hooks for m in model.modules())
        with torch.no_grad(), simulated(model, {name: Rounding("none", 2) for name in products(model)}):
            losses[aware] = float(functional.cross_entropy(model(data.inputs), data.target))
    assert losses[True] < 0.5 * losses[False]  # 1.1 and 5.3


def noisy():
    """Half of the labels are drawn; the rest are what the network itself says."""
    x = torch.randn(1024, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        said = model(x).argmax(1)
    y = torch.where(torch.rand(1024) < 0.5, torch.randint(4, (1024,)), said)
    return Workload(model=model, train=(x[:512], y[:512]), val=(x[512:], y[512:]), test=(x[512:], y[512:]), batch_size=32)


def test_a_float_teacher_guides_the_rounded_student():
    """Trained under the rounding on noisy labels, the student that its float teacher guides errs from it much less often."""
    task, errors = noisy(), {}
    teacher, unseen = Setup.of(task).model.eval(), task.val.batch(torch.arange(512)).inputs
    for guided in (False, True):
        setup = Setup.of(task)
        setup = replace(setup, context=replace(setup.context, teacher=teacher), traits=setup.traits | {"TEACHER"})
        setup = Distill(alpha=0.9)(setup) if guided else setup
        setup = QAT(activations="weights", bits=2)(Optimizer(kind="adamw", lr=0.005)(setup))
        fit(setup, task.train, epochs=30, seed=0)
        model = setup.model.eval()
        with torch.no_grad(), simulated(model, {name: Rounding("none", 2) for name in products(model)}):
            errors[guided] = float((model(unseen).argmax(1) != teacher(unseen).argmax(1)).float().mean())
    assert errors[True] < 0.8 * errors[False], errors  # seen with four seeds: 0.03 to 0.28 and 0.13 to 0.47


def test_rounding_begins_when_it_is_asked_to():
    """With a start behind the last step the weights are those of plain training, bit for bit."""
    ends = {}
    for start in (None, 0.99, 0.5):
        task = tiny_cnn((64, 48, 48))
        setup = Setup.of(task, seed=2)
        setup = setup if start is None else QAT(start=start)(setup)
        fit(setup, task.train, epochs=2, seed=2)
        ends[start] = torch.cat([p.detach().flatten() for p in setup.model.parameters()])
    assert torch.equal(ends[None], ends[0.99])
    assert not torch.equal(ends[None], ends[0.5])


def test_qat_refuses_what_it_cannot_do():
    with pytest.raises(BadInput, match=r"qat\.start is 1\.0"):
        QAT(start=1.0)
    setup = Setup.of(tiny_cnn())
    with pytest.raises(NotApplicable, match="compiled"):
        QAT()(replace(setup, runtime=replace(setup.runtime, compile=True)))
    with pytest.raises(NotApplicable, match="no linear"):
        QAT()(replace(setup, model=nn.Identity()))
