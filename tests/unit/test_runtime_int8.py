"""int8: bounds on the error of weights, quality of a trained net, size of the file, and that stored int8 costs no time."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from quadriga import runtime
from quadriga.core.batch import Batch
from quadriga.core.errors import NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.setup import Context
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.runtime._program import int8


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def task(count, seed):
    """Ten 12×12 patterns in noise."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, 1, 12, 12, generator=torch.Generator().manual_seed(99))
    target = torch.randint(0, 10, (count,), generator=draw)
    return patterns[target] + 1.5 * torch.randn(count, 1, 12, 12, generator=draw), target


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(200, 48), nn.ReLU(), nn.Linear(48, 10)),
    )
    x, y = task(2000, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(120):
        rows = slice(step % 20 * 100, step % 20 * 100 + 100)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    calibration = tuple(Batch(x[i : i + 64], y[i : i + 64], torch.arange(64)) for i in range(0, 512, 64))
    return model.eval(), Context(x[:2], calibration, accuracy)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
def test_a_trained_net_keeps_its_quality(name, activations, trained, tmp_path):
    model, context = trained
    spec = RuntimeSpec(name, threads=1, quant=QuantSpec(activations=activations))
    run = runtime.build(model, spec, context, tmp_path).run()
    x, y = task(1000, 2)
    with torch.inference_mode():
        before = model(x)
    after = run(x)
    assert (before.argmax(1) == y).double().mean() > 0.9  # there is something to lose
    assert (before.argmax(1) != after.argmax(1)).double().mean() <= 0.01
    assert 0 < (after - before).norm() / before.norm() < 0.03
    graph = onnx.load(tmp_path / "model.onnx").graph
    large = [
        t for t in graph.initializer if len(t.dims) >= 2 and t.data_type == onnx.TensorProto.FLOAT and len(t.raw_data) > 1024
    ]
    assert not large  # every layer's weights are int8
    weights = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) >= 2]
    assert len(weights) >= 2


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_weights_have_seven_bits_where_products_saturate(activations, trained, tmp_path, monkeypatch):
    """Two products of an unsigned and a 7-bit byte fit into 16 bits: 2 · 255 · 64 < 32,768."""
    model, context = trained
    largest = {}
    for saturates in (False, True):
        monkeypatch.setattr("quadriga.runtime._int8.saturates", lambda: saturates)  # noqa: B023
        spec = RuntimeSpec("onnxruntime", threads=1, quant=QuantSpec(activations=activations))
        runtime.build(model, spec, context, tmp_path / str(saturates))
        graph = onnx.load(tmp_path / str(saturates) / "model.onnx").graph
        users = [n for n in graph.node if n.op_type in ("Gemm", "MatMul", "MatMulInteger", "Conv", "DequantizeLinear")]
        fed = {name for n in users for name in n.input}
        weights = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2 and t.name in fed]
        largest[saturates] = max(int(abs(numpy_helper.to_array(t).astype(int)).max()) for t in weights)
    assert largest[True] <= 64 < largest[False] <= 127


def test_weights_have_a_scale_per_output_channel(trained, tmp_path):
    model, context = trained
    runtime.build(model, RuntimeSpec("onnxruntime", quant=QuantSpec(activations="none")), context, tmp_path)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for name in ("5.weight", "7.weight"):
        q, scale = torch.tensor(stored[f"{name}.q"]).float(), torch.tensor(stored[f"{name}.scale"])
        weight = model.get_parameter(name).detach()
        assert scale.shape == weight.shape[:1]
        assert ((q * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def test_rounding_errs_by_at_most_half_a_scale():
    weight = torch.randn(20, 7, 3) * torch.logspace(-3, 3, 20)[:, None, None]
    q, scale = int8(weight)
    assert q.dtype == torch.int8
    assert ((q * scale - weight).abs() <= scale * 0.5001).all()
    assert torch.equal(q.flatten(1).abs().amax(1), torch.full((20,), 127, dtype=torch.int8))


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_weights_only_is_a_quarter_of_the_bytes(name, tmp_path):
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    x = torch.randn(64, 128)
    context = Context(x[:2], (Batch(x, None, torch.arange(64)),), accuracy)
    full = runtime.build(model, RuntimeSpec(name, threads=1), context, tmp_path / "float")
    small = runtime.build(model, RuntimeSpec(name, threads=1, quant=QuantSpec(activations="none")), context, tmp_path / "int8")
    assert small.bytes <= 0.3 * full.bytes
    a, b = full.run()(x), small.run()(x)
    assert 0 < (a - b).norm() / a.norm() < 0.02


def test_stored_int8_is_made_float_once_when_the_session_starts(tmp_path):
    """So that it runs as fast as float: the graph that executes has no DequantizeLinear, and the operators of the float one."""
    import onnxruntime

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.lstm, self.out = (
                nn.Embedding(64, 32),
                nn.LSTM(32, 32, batch_first=True),
                nn.Linear(32, 64, bias=False),
            )
            self.out.weight = nn.Parameter(self.table.weight.detach().clone())

        def forward(self, x):
            return self.out(self.lstm(self.table(x))[0])

    tokens = torch.randint(0, 64, (8, 5))
    context = Context(tokens[:2], (Batch(tokens, None, torch.arange(8)),), accuracy)
    operators = {}
    for kind, quant in (("float", None), ("int8", QuantSpec(activations="none"))):
        built = runtime.build(Words().eval(), RuntimeSpec("onnxruntime", quant=quant), context, tmp_path / kind)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / f"{kind}.onnx")
        for key, value in built.entry["session"].items():
            options.add_session_config_entry(key, value)
        onnxruntime.InferenceSession(tmp_path / kind / "model.onnx", options, providers=["CPUExecutionProvider"])
        operators[kind] = [n.op_type for n in onnx.load(tmp_path / f"{kind}.onnx").graph.node]
    assert "DequantizeLinear" in [n.op_type for n in onnx.load(tmp_path / "int8" / "model.onnx").graph.node]
    assert "DequantizeLinear" not in operators["int8"]
    assert sorted(operators["int8"]) == sorted(operators["float"])


@pytest.mark.parametrize("activations", ["static", "none"])
def test_layers_that_keep_float_are_bit_equal_in_the_file(activations, trained, tmp_path):
    model, context = trained
    quant = QuantSpec(activations=activations, keep_float=("7",))
    runtime.build(model, RuntimeSpec("onnxruntime", quant=quant), context, tmp_path)
    stored = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert any(t.shape in {(10, 48), (48, 10)} and t.dtype == torch.float32 for t in stored.values())
    assert any(t.shape in {(48, 200), (200, 48)} and t.dtype == torch.int8 for t in stored.values())
    assert torch.equal(stored["7.weight"], model.get_parameter("7.weight").detach())


def test_pytorch_runtimes_refuse_int8_activations_and_name_what_can(trained, tmp_path):
    model, context = trained
    with pytest.raises(NotApplicable, match=r"eager does not run static int8.*onnxruntime or openvino"):
        runtime.build(model, RuntimeSpec("eager", quant=QuantSpec()), context, tmp_path)


def test_static_needs_calibration_and_a_layer(trained, tmp_path):
    model, context = trained
    bare = Context(context.example, (), accuracy)
    with pytest.raises(NotApplicable, match="calibration batches"):
        runtime.build(model, RuntimeSpec("onnxruntime", quant=QuantSpec()), bare, tmp_path)
    with pytest.raises(NotApplicable, match="no convolution"):
        runtime.build(nn.ReLU().eval(), RuntimeSpec("onnxruntime", quant=QuantSpec()), context, tmp_path)


def test_specialised_openvino_graphs_agree_with_the_dynamic_one(tmp_path):
    """OpenVINO 2026.4 computes nonsense for this int8 model with static shapes; the batch sizes that do are left dynamic."""
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=200, max_position_embeddings=32, **size)).eval()
    draw = {"input_ids": torch.randint(0, 200, (64, 16)), "attention_mask": torch.ones(64, 16, dtype=torch.int64)}
    context = Context({k: v[:2] for k, v in draw.items()}, (Batch(draw, None, torch.arange(64)),), accuracy)
    run = runtime.build(model, RuntimeSpec("openvino", threads=1, quant=QuantSpec()), context, tmp_path, batches=(1, 8)).run()
    for batch in (1, 8):
        given = {k: v[:batch] for k, v in draw.items()}
        with torch.inference_mode():
            expected = model(**given).logits
        assert (run(given)["logits"] - expected).abs().max() < 0.2 * expected.abs().max() + 1e-3
