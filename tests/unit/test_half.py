"""Half precision: who may have it, what is stored, and what comes out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from quadriga import runtime
from quadriga.core.batch import Batch, resize, tensors
from quadriga.core.errors import NotApplicable
from quadriga.core.half import HALF, halved, in_float, in_half
from quadriga.core.metric import accuracy
from quadriga.core.setup import Context, Setup
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.methods.hardware import _measured
from quadriga.methods.hardware.half_weights import HalfWeights
from quadriga.methods.hardware.mixed_precision import MixedPrecision
from quadriga.methods.hardware.quantize_int8 import QuantizeInt8


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(_measured, "speed_here", lambda dtype: 1.8)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(_measured, "speed_here", lambda dtype: 0.027)


class Sequence(nn.Module):
    """A table tied to the output, positions that are added, a recurrent and an attention layer, norms."""

    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(40, 16), nn.Parameter(torch.randn(6, 16))
        self.lstm, self.norm = nn.LSTM(16, 16, batch_first=True), nn.LayerNorm(16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.out = nn.Linear(16, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        x, _ = self.lstm(self.table(tokens) + self.places)
        return self.out(self.layer(self.norm(x)))


class Rows(nn.Module):
    """Reads the rows of an image one after the other."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, images):
        return self.out(self.lstm(images.flatten(1, 2))[0][:, -1])


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.Flatten()),
        *(nn.Linear(256, 40), nn.ReLU(), nn.Linear(40, 10)),
    )


NETS = {
    "convolutional": (convolutional, lambda: torch.randn(64, 1, 8, 8)),
    "sequence": (Sequence, lambda: torch.randint(40, (64, 6))),
}


def context(inputs):
    count = len(tensors(inputs)[0])
    return Context(resize(inputs, 2), (Batch(inputs, None, torch.arange(count)),), accuracy)


def setup_of(model):
    splits = [(torch.randn(8, 1, 8, 8), torch.randint(2, (8,))) for _ in range(3)]
    return Setup.of(Workload(model=model, train=splits[0], val=splits[1], test=splits[2], trained=True))


def test_a_copy_is_halved_but_for_norms_and_ties_stay():
    model = Sequence()
    half = halved(model, torch.bfloat16)
    assert half.out.weight is half.table.weight
    assert {p.dtype for p in half.norm.parameters()} == {torch.float32}
    assert {half.places.dtype, half.lstm.weight_hh_l0.dtype, half.layer.linear1.weight.dtype} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_only_floats_change_their_type():
    tree = {"x": torch.ones(2), "mask": torch.ones(2, dtype=torch.bool), "rest": (torch.arange(2), None)}
    there = in_half(tree, torch.float16)
    assert (there["x"].dtype, there["mask"].dtype, there["rest"][0].dtype) == (torch.float16, torch.bool, torch.int64)
    assert in_float(there)["x"].dtype is torch.float32


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("place", ["eager", "onnxruntime", "openvino"])
def test_every_runtime_halves_the_bytes_and_stays_near(place, kind, name, tmp_path):
    if not runtime.probe()[place].ok:
        pytest.skip(f"{place} is not installed")
    make, draw = NETS[name]
    model, inputs = make().eval(), draw()
    plain = runtime.build(model, RuntimeSpec(place, threads=1), context(inputs), tmp_path / "plain")
    half = runtime.build(model, RuntimeSpec(place, threads=1, weights=kind), context(inputs), tmp_path / "half")
    weights = sum(p.numel() for p in model.parameters())  # a tied one counts once
    assert plain.bytes - half.bytes > 1.7 * weights
    expected, found = model(inputs).detach(), half.run()(inputs)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert found.dtype is torch.float32 and 1e-6 < error < (0.05 if kind == "bf16" else 0.01)


@pytest.mark.parametrize("name", NETS)
def test_stored_weights_are_computed_with_in_float32(name, tmp_path):
    """ONNX Runtime's outputs are those of the float32 model with rounded matrices."""
    pytest.importorskip("onnxruntime")
    make, draw = NETS[name]
    model, inputs = make().eval(), draw()
    built = runtime.build(model, RuntimeSpec("onnxruntime", threads=1, weights="fp16"), context(inputs), tmp_path)
    with torch.no_grad():
        for p in dict.fromkeys(model.parameters()):
            if p.dim() > 1:
                p.copy_(p.half().float())
    assert torch.allclose(built.run()(inputs), model(inputs), atol=2e-4)


def test_a_live_model_runs_as_the_built_one_does(tmp_path):
    model, inputs = convolutional().eval(), torch.randn(64, 1, 8, 8)
    spec = RuntimeSpec(weights="bf16", channels_last=True, threads=1)
    live, built = runtime.prepare(model, spec), runtime.build(model, spec, context(inputs), tmp_path).run()
    assert live(inputs).dtype is torch.float32 and torch.allclose(live(inputs), built(inputs), atol=0.02)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_method_writes_its_field_and_what_follows_is_refused(fast):
    after = HalfWeights()(setup_of(convolutional()))
    assert after.runtime == RuntimeSpec(weights="bf16") and not after.runtime.exact
    assert not RuntimeSpec(quant=QuantSpec()).exact and RuntimeSpec("onnxruntime", channels_last=True).exact
    for method in (HalfWeights(), QuantizeInt8(activations="weights"), MixedPrecision()):
        with pytest.raises(NotApplicable, match="requires FLOAT_WEIGHTS"):
            method(after)


def test_a_processor_without_such_products_refuses_to_compute_with_them(slow):
    setup = setup_of(convolutional())
    setup = replace(setup, context=replace(setup.context, pace=lambda arms: pytest.fail("timed in vain")))
    for method in (HalfWeights(), HalfWeights(kind="fp16"), MixedPrecision()):
        with pytest.raises(NotApplicable, match=r"multiplies (bf16|fp16) at 0\.027 of float32's speed"):
            method(setup)
    stored = replace(setup, context=replace(setup.context, runtime=RuntimeSpec("onnxruntime")))
    assert HalfWeights()(stored).runtime.weights == "bf16"
    assert MixedPrecision(keep="always")(setup).runtime.autocast == "bf16"


@pytest.mark.parametrize("kind", HALF)
def test_an_lstm_trains_in_half_or_is_refused_beforehand(kind):
    """A refusal says exactly what the first step would have found."""
    setup = setup_of(Rows())

    def works():
        with torch.autocast("cpu", HALF[kind]):
            try:
                setup.model.train()(torch.zeros(2, 1, 8, 8))
            except RuntimeError:
                return False
        return True

    if works():
        assert MixedPrecision(kind=kind, keep="always")(setup).runtime.autocast == kind
    else:
        with pytest.raises(NotApplicable, match=f"trains no LSTM in {kind}"):
            MixedPrecision(kind=kind, keep="always")(setup)


def test_what_the_processor_says_of_lstms_decides(monkeypatch):
    setup = setup_of(Rows())
    monkeypatch.setattr("quadriga.methods.hardware.mixed_precision.lstm_trains", lambda kind: False)
    with pytest.raises(NotApplicable, match="trains no LSTM in bf16"):
        MixedPrecision()(setup)
    assert MixedPrecision()(setup_of(convolutional())).runtime.autocast == "bf16"
    monkeypatch.setattr("quadriga.methods.hardware.mixed_precision.lstm_trains", lambda kind: True)
    assert MixedPrecision()(setup).runtime.autocast == "bf16"


def test_weights_that_float16_cannot_hold_are_refused(fast):
    model = convolutional()
    with torch.no_grad():
        model[0].weight[0] = 1e5
    with pytest.raises(NotApplicable, match="larger than 65,504"):
        HalfWeights(kind="fp16")(setup_of(model))
    assert HalfWeights()(setup_of(model)).runtime.weights == "bf16"
    setup = setup_of(convolutional())
    setup.model.bfloat16()
    with pytest.raises(NotApplicable, match="not float32"):
        HalfWeights()(setup)


def test_the_speed_of_products_is_a_ratio_of_best_times():
    """The clock gives float32 steps of 4 and half precision steps of 2."""
    ticks = itertools.accumulate(itertools.cycle([0, 4, 0, 2]))
    assert _measured.product_speed(torch.bfloat16, clock=lambda: float(next(ticks)), size=2) == 2.0
