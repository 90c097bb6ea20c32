"""Every runtime computes what the model computes, for every form of inputs and outputs, and says why where it cannot."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import TwoInputs
from torch import nn

from quadriga import runtime
from quadriga.core.batch import Batch, call, resize, tensors
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.setup import Context
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime import standalone

ONE = RuntimeSpec("onnxruntime", threads=1)
FAST = ("eager", "onnxruntime", "openvino")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def context(inputs):
    """`inputs` hold 64 examples: the first two are the example, all are calibration."""
    count = len(tensors(inputs)[0])
    return Context(resize(inputs, 2), (Batch(inputs, None, torch.arange(count)),), accuracy)


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class Recurrent(nn.Module):
    """Returns a tuple with states whose batch is dimension 1."""

    def __init__(self):
        super().__init__()
        self.table, self.lstm, self.out = nn.Embedding(50, 16), nn.LSTM(16, 12, 2, batch_first=True), nn.Linear(12, 5)

    def forward(self, tokens):
        steps, states = self.lstm(self.table(tokens))
        return self.out(steps[:, -1]), states


class Tied(nn.Module):
    """One matrix is the embedding and the output layer."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(300, 32), nn.Linear(32, 32), nn.Linear(32, 300, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        return self.out(torch.relu(self.inner(self.table(tokens))))


class Biased(nn.Module):
    """Fused attention with a bias that is looked up by distance, as in T5 and in vision transformers."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.table = nn.Linear(12, 36), nn.Linear(12, 4), nn.Embedding(11, 3)
        self.register_buffer("distance", torch.arange(6)[:, None] - torch.arange(6) + 5)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(x.shape[0], 6, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table(self.distance).permute(2, 0, 1).unsqueeze(0).contiguous()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], 6, 12))[:, 0]


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=16, **size))


MODELS = {
    "tensor": (lenet, lambda: torch.randn(64, 1, 32, 32)),
    "recurrent": (Recurrent, lambda: torch.randint(0, 50, (64, 7))),
    "tied": (Tied, lambda: torch.randint(0, 300, (64, 6))),
    "tuple": (TwoInputs, lambda: (torch.randn(64, 8), torch.randn(64, 3))),
    "biased": (Biased, lambda: torch.randn(64, 6, 12)),
    "bert": (
        bert,
        lambda: {
            "input_ids": torch.randint(0, 60, (64, 8)),
            "attention_mask": (torch.rand(64, 8) < 0.9).long().index_fill(1, torch.tensor([0]), 1),
        },
    ),
}


def same_structure(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype
    if hasattr(a, "keys"):
        return type(b) is dict and list(a.keys()) == list(b) and all(same_structure(a[k], b[k]) for k in b)
    if isinstance(a, tuple | list):
        return type(b) is tuple and len(a) == len(b) and all(map(same_structure, a, b))
    return a == b


@pytest.fixture
def one_export(monkeypatch):
    """Capture and export, which take the time here, happen once for all runtimes of a test."""
    from copy import deepcopy

    from quadriga.runtime import _capture, _onnx

    kept = {}
    for module, name in ((_capture, "capture"), (_onnx, "export")):
        real = getattr(module, name)

        def once(*args, real=real):
            if real not in kept:
                kept[real] = real(*args)
            return deepcopy(kept[real]) if real.__name__ == "export" else kept[real]

        monkeypatch.setattr(module, name, once)


@pytest.mark.parametrize("form", MODELS)
def test_every_runtime_computes_what_the_model_computes(form, one_export, tmp_path):
    make, draw = MODELS[form]
    model, inputs = make().eval(), draw()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in FAST:
        run = runtime.build(model, RuntimeSpec(name, threads=1), context(inputs), tmp_path / name).run()
        for batch in (1, 2, 7, 64):
            given = resize(inputs, batch)
            with torch.inference_mode():
                expected = call(model, given)
            found = run(given)
            assert same_structure(expected, found)
            for e, f in zip(tensors(expected), tensors(found), strict=True):
                torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the model is not changed


@pytest.mark.slow
def test_inductor_computes_what_the_model_computes(tmp_path):
    if not runtime.probe()["inductor"].ok:
        pytest.skip(runtime.probe()["inductor"].reason)
    model, inputs = lenet().eval(), torch.randn(5, 1, 32, 32)
    run = runtime.build(model, RuntimeSpec("inductor", threads=1), context(inputs), tmp_path, batches=(1,)).run()
    for batch in (1, 2, 5):
        with torch.inference_mode():
            torch.testing.assert_close(run(inputs[:batch]), model(inputs[:batch]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_outputs_stay_and_inputs_may_be_strided_or_need_gradients(name, tmp_path):
    model, x = lenet().eval(), torch.randn(8, 1, 32, 32)
    run = runtime.build(model, RuntimeSpec(name, threads=1), context(x), tmp_path).run()
    first = run(x)
    kept = first.clone()
    run(-x)
    assert torch.equal(first, kept)  # the next call did not write into it
    first.add_(1)  # and it is the caller's own to change
    torch.testing.assert_close(run(x.transpose(2, 3)), run(x.transpose(2, 3).contiguous()))
    torch.testing.assert_close(run(x.clone().requires_grad_()), kept)
    assert not run(x.clone().requires_grad_()).requires_grad


def test_overhead_of_the_onnx_file_is_below_4_kb_and_weights_are_stored_once(tmp_path):
    for model, inputs in ((lenet(), torch.randn(2, 1, 32, 32)), (Tied(), torch.randint(0, 300, (2, 6)))):
        runtime.build(model.eval(), ONE, context(inputs), tmp_path)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())  # ties once
        assert 0 <= (tmp_path / "model.onnx").stat().st_size - weights < 4096


def test_tied_weights_are_stored_once_and_loaded_as_one(tmp_path):
    built = runtime.build(Tied().eval(), RuntimeSpec("eager"), context(torch.randint(0, 300, (2, 6))), tmp_path)
    assert set(built.entry["aliases"]) | set(built.entry["aliases"].values()) == {"table.weight", "out.weight"}
    weights = dict(zip(built.entry["weights"], standalone.load_weights(tmp_path, built.entry), strict=True))
    tables = [weights[name] for name in ("table.weight", "out.weight") if name in weights]
    assert len({t.data_ptr() for t in tables}) == 1
    assert (tmp_path / "weights.safetensors").stat().st_size < 300 * 32 * 4 + 33 * 32 * 4 + 1024


def test_names_of_inputs_are_the_forwards(tmp_path):
    built = runtime.build(TwoInputs().eval(), ONE, context((torch.randn(2, 8), torch.randn(2, 3))), tmp_path)
    import onnx

    graph = onnx.load(tmp_path / "model.onnx").graph
    assert built.entry["names"] == [i.name for i in graph.input] == ["a", "b"]
    assert [o.name for o in graph.output] == ["logits", "parts_0", "parts_2"]


def test_another_onnx_file_is_called_by_place(tmp_path):
    x = torch.randn(2, 3)
    built = runtime.build(nn.Linear(3, 2).eval(), ONE, context(x), tmp_path)
    import onnx

    proto, expected = onnx.load(tmp_path / "model.onnx"), built.run()(x)
    proto.graph.input[0].name = "pixels"
    for node in proto.graph.node:
        node.input[:] = ["pixels" if n == "input" else n for n in node.input]
    onnx.save(proto, tmp_path / "model.onnx")
    assert torch.equal(built.run()(x), expected)


def test_a_dict_may_be_given_as_keywords_and_a_wrong_one_is_named(tmp_path):
    make, draw = MODELS["bert"]
    inputs = draw()
    run = runtime.build(make().eval(), RuntimeSpec("eager"), context(inputs), tmp_path).run()
    torch.testing.assert_close(run(**inputs)["logits"], run(inputs)["logits"])
    with pytest.raises(ValueError, match=r"expected a dict of input_ids, attention_mask; got \['ids'\]"):
        run({"ids": inputs["input_ids"]})


def test_a_tuple_may_be_given_as_arguments_as_the_model_is_called(tmp_path):
    make, draw = MODELS["tuple"]
    model, inputs = make().eval(), draw()
    run = runtime.build(model, RuntimeSpec("eager"), context(inputs), tmp_path).run()
    torch.testing.assert_close(run(*inputs), run(inputs))
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), model(*inputs))


def test_lengths_that_vary_between_batches_are_dynamic(tmp_path):
    model = Tied().eval()
    short, long = (Batch(torch.randint(0, 300, (4, n)), None, torch.arange(4)) for n in (5, 9))
    run = runtime.build(model, ONE, Context(short.inputs[:2], (short, long), accuracy), tmp_path).run()
    tokens = torch.randint(0, 300, (3, 7))
    torch.testing.assert_close(run(tokens), model(tokens).detach(), rtol=1e-4, atol=1e-5)


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x * 2


class Strange(nn.Module):
    def forward(self, x):
        return {x}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Branches(), r"cannot be exported.*data-dependent.*test_runtime\.py:\d+"),
        (Fixed(), "cannot be exported.*batch"),
        (Counts(), "changes its buffer calls when it runs"),
        (Strange(), r"returns output \(set\), no tensor"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_with_the_reason(model, words, tmp_path):
    with pytest.raises(NotApplicable, match=words):
        runtime.build(model.eval(), RuntimeSpec("eager"), context(torch.randn(4, 3)), tmp_path)


def test_an_operation_without_an_onnx_form_is_named(tmp_path):
    class Eigen(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(NotApplicable, match=r"no ONNX form.*eig"):
        runtime.build(Eigen().eval(), ONE, context(torch.randn(4, 3, 3)), tmp_path)


def test_threads_are_recorded_and_can_be_overridden(tmp_path, monkeypatch):
    import onnxruntime

    seen = []
    real = onnxruntime.InferenceSession

    def session(path, options, **kwargs):
        seen.append((options.intra_op_num_threads, options.get_session_config_entry("session.intra_op.allow_spinning")))
        return real(path, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    built = runtime.build(nn.Linear(3, 2).eval(), replace(ONE, threads=2), context(torch.randn(4, 3)), tmp_path)
    built.run()
    built.run(threads=1)
    assert seen[-2:] == [(2, "0"), (1, "0")]
    runtime.build(nn.Linear(3, 2).eval(), replace(ONE, threads=None), context(torch.randn(4, 3)), tmp_path).run()
    assert seen[-1] == (standalone.folder.cores(), "0")
    eager = runtime.build(nn.Linear(3, 2).eval(), RuntimeSpec("eager", threads=2), context(torch.randn(4, 3)), tmp_path)
    eager.run()
    assert torch.get_num_threads() == 2
    eager.run(threads=1)
    assert torch.get_num_threads() == 1


def test_prepare_applies_the_memory_format_and_leaves_the_model():
    model, x = lenet().eval(), torch.randn(2, 1, 32, 32)
    seen = []
    run = runtime.prepare(model, RuntimeSpec(channels_last=True, threads=1))
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (
            seen.append(module.weight.is_contiguous(memory_format=torch.channels_last))
            if isinstance(module, nn.Conv2d)
            else None
        )
    )
    with handle:
        torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert seen[:2] == [True, True]
    assert model[2].weight.is_contiguous()


def test_eager_honours_the_memory_format(tmp_path):
    built = runtime.build(
        lenet().eval(), RuntimeSpec("eager", channels_last=True), context(torch.randn(2, 1, 32, 32)), tmp_path
    )
    weights = [w for w in standalone.load_weights(tmp_path, built.entry) if w.dim() == 4]
    assert len(weights) == 2
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_absent_runtime_is_refused_with_the_command_that_installs_it(name, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else real(n, *a))
    probe = runtime.probe()[name]
    assert not probe.ok
    assert probe.reason == f"the package {name} is not installed"
    assert "pip install quadriga[" in probe.remedy
    with pytest.raises(NotApplicable, match="is not installed"):
        runtime.build(nn.Linear(3, 2), RuntimeSpec(name), context(torch.randn(2, 3)), tmp_path)


def test_inductor_asks_for_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    probe = runtime.probe()["inductor"]
    assert (probe.ok, probe.reason) == (False, "there is no C++ compiler")


def test_an_unknown_runtime_names_the_nearest(tmp_path):
    with pytest.raises(BadInput, match='did you mean "onnxruntime"'):
        runtime.build(nn.Linear(3, 2), RuntimeSpec("onnxruntme"), context(torch.randn(2, 3)), tmp_path)


def test_importing_openvino_sends_nothing(tmp_path):
    """OpenVINO reports its import through the package openvino_telemetry; in our processes that package is never there."""
    import subprocess
    import sys

    runtime.build(nn.Linear(3, 2).eval(), RuntimeSpec("openvino"), context(torch.randn(2, 3)), tmp_path)
    code = "import sys, load; load.load(); print(sys.modules['openvino_telemetry'], 'openvino' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "True"]


def test_difference_is_zero_for_equal_and_infinite_for_nan_or_shape():
    a = torch.tensor([1.0, float("nan"), -4.0])
    assert standalone.difference(a, a) == 0
    assert standalone.difference(a, torch.tensor([1.0, float("nan"), -3.0])) == pytest.approx(0.25)
    assert standalone.difference(a, torch.tensor([1.0, 2.0, -4.0])) == float("inf")
    assert standalone.difference(a, a[:2]) == float("inf")
    assert standalone.difference(torch.arange(4), torch.tensor([0, 1, 2, 9])) == 0.25


def test_the_program_is_plain_python_without_pickle(tmp_path):
    runtime.build(lenet().eval(), RuntimeSpec("eager"), context(torch.randn(2, 1, 32, 32)), tmp_path)
    names = {p.name for p in Path(tmp_path).iterdir()}
    assert names == {"load.py", "program.py", "runtime.json", "weights.safetensors"}
    assert "def forward(self, w0" in (tmp_path / "program.py").read_text()


def test_no_grad_blocks_inside_a_forward_are_kept(tmp_path):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            with torch.no_grad():
                scale = x.abs().amax(1, keepdim=True)
            with torch.autocast("cpu", enabled=False):
                y = self.inner(x / scale)
            return y * scale

    model, x = Blocks().eval(), torch.randn(5, 3)
    run = runtime.build(model, RuntimeSpec("eager"), context(x), tmp_path).run()
    torch.testing.assert_close(run(x), model(x).detach())
