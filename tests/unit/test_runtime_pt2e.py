"""Runtimes that read torch.export's own programs: ExecuTorch, and TorchInductor with int8 activations."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quadriga import runtime
from quadriga.core.batch import Batch, call, resize, tensors
from quadriga.core.errors import NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.setup import Context
from quadriga.core.slots import QuantSpec, RuntimeSpec

AWAY = [name for name in ("executorch", "torchao") if importlib.util.find_spec(name) is None]
executorch = pytest.mark.skipif("executorch" in AWAY, reason="executorch is not installed (quadriga[executorch])")
torchao = pytest.mark.skipif("torchao" in AWAY, reason="torchao is not installed (quadriga[pt2e])")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def context(inputs):
    return Context(resize(inputs, 2), (Batch(inputs, None, torch.arange(len(tensors(inputs)[0]))),), accuracy)


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(200, 48), nn.ReLU(), nn.Linear(48, 10)),
    )


class Block(nn.Module):
    """A transformer block between an embedding and an output layer; the second output has the batch as dimension 1."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(60, 32), nn.Linear(32, 60)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, tokens):
        inner = self.block(self.table(tokens))
        return self.out(inner), inner.transpose(0, 1)


class Fused(nn.Module):
    """Attention of one head, whose projections are one layer, split into three."""

    def __init__(self):
        super().__init__()
        self.table, self.qkv, self.out = nn.Embedding(60, 32), nn.Linear(32, 96), nn.Linear(32, 60)

    def forward(self, tokens):
        q, k, v = self.qkv(self.table(tokens)).split(32, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


MODELS = {"cnn": (cnn, lambda: torch.randn(64, 1, 12, 12)), "block": (Block, lambda: torch.randint(0, 60, (64, 9)))}
EXACT = {**MODELS, "fused": (Fused, lambda: torch.randint(0, 60, (64, 9)))}


def made(form):
    make, draw = EXACT[form]
    return make().eval(), draw()


def apart(model, run, inputs, batch):
    """‖found − expected‖ / ‖expected‖, the worst of the outputs."""
    given = resize(inputs, batch)
    with torch.inference_mode():
        expected = tensors(call(model, given))
    found = tensors(run(given))
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in expected]
    return max(float((y - x).norm() / x.norm()) for x, y in zip(expected, found, strict=True))


@executorch
@pytest.mark.parametrize("form", EXACT)
def test_executorch_computes_what_the_model_computes_at_any_batch(form, tmp_path):
    """150 is above the planned 64: it is split, and joined where each output has its batch."""
    model, inputs = made(form)
    run = runtime.build(model, RuntimeSpec("executorch", threads=1), context(inputs), tmp_path, batches=(1, 25)).run()
    assert all(apart(model, run, inputs, batch) < 1e-5 for batch in (1, 2, 25, 64, 150))
    first = run(inputs[:3])
    kept = [y.clone() for y in tensors(first)]
    run(inputs[3:6])
    assert all(torch.equal(x, y) for x, y in zip(kept, tensors(first), strict=True))  # its own memory


@executorch
@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_executorch_int8_is_close_and_smaller(form, activations, tmp_path):
    model, inputs = made(form)
    full = runtime.build(model, RuntimeSpec("executorch", threads=1), context(inputs), tmp_path / "float")
    quant = QuantSpec(activations=activations)
    small = runtime.build(model, RuntimeSpec("executorch", threads=1, quant=quant), context(inputs), tmp_path / "int8")
    run = small.run()
    assert all(0 < apart(model, run, inputs, batch) < 0.1 for batch in (1, 2, 25, 64))
    assert small.bytes < (0.55 if form == "cnn" else 0.85) * full.bytes  # XNNPACK leaves embeddings and norms float


@executorch
def test_executorch_keeps_layers_float_bit_for_bit_in_the_file(tmp_path):
    model, inputs = made("cnn")
    weight = model[7].weight.detach().numpy().tobytes()
    found = {}
    for kept in ((), ("7",)):
        spec = RuntimeSpec("executorch", threads=1, quant=QuantSpec(keep_float=kept))
        runtime.build(model, spec, context(inputs), tmp_path / str(len(kept)))
        found[kept] = weight in (tmp_path / str(len(kept)) / "model.pte").read_bytes()
    assert found == {(): False, ("7",): True}


@executorch
def test_executorch_does_not_split_a_batch_whose_examples_depend_on_each_other(tmp_path):
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model, x = Centred().eval(), torch.randn(100, 4)
    run = runtime.build(model, RuntimeSpec("executorch"), context(x), tmp_path).run()
    torch.testing.assert_close(run(x[:64]), model(x[:64]))
    with pytest.raises(ValueError, match="at most 64 examples a call, got 100"):
        run(x)


@executorch
def test_executorch_refuses_what_it_cannot_hold(tmp_path):
    model, inputs = made("cnn")
    with pytest.raises(NotApplicable, match="no float products of int8 weights"):
        spec = RuntimeSpec("executorch", quant=QuantSpec(activations="none"))
        runtime.build(model, spec, context(inputs), tmp_path)
    with pytest.raises(NotApplicable, match="no bf16 weights"):
        runtime.build(model, RuntimeSpec("executorch", weights="bf16"), context(inputs), tmp_path)


@executorch
def test_executorch_runs_and_counts_its_threads_without_quadriga(tmp_path):
    model, inputs = made("cnn")
    runtime.build(model, RuntimeSpec("executorch", threads=1), context(inputs), tmp_path)
    code = (
        "import sys, torch, load; run = load.load(); torch.save(run(torch.load('x.pt')), 'y.pt');"
        "from executorch.extension.pybindings import portable_lib as p;"
        "print(p._threadpool_get_thread_count(), 'quadriga' in sys.modules)"
    )
    assert outside(code, inputs[:5], tmp_path) == ["1", "False"]
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(inputs[:5]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("away", ["executorch", "torchao", "flatbuffers", "ruamel", "tabulate"])
def test_executorch_says_which_package_is_absent(away, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == away else object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.5.1")
    probe = runtime.probe()["executorch"]
    assert (probe.ok, probe.reason) == (False, f"the package {away} is not installed")
    assert probe.remedy == "pip install quadriga[executorch]"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object())
    assert runtime.probe()["executorch"].ok


@torchao
@pytest.mark.parametrize(("form", "activations"), [("cnn", "static"), ("block", "static"), ("block", "dynamic")])
def test_inductor_int8_multiplies_bytes_with_torch_alone(form, activations, tmp_path):
    """In a fresh process: close to float, and the compiled code calls oneDNN's int8 products, not dequantized float ones."""
    model, inputs = made(form)
    full = runtime.build(model, RuntimeSpec("inductor", threads=1), context(inputs), tmp_path / "float")
    quant = QuantSpec(activations=activations)
    small = runtime.build(model, RuntimeSpec("inductor", threads=1, quant=quant), context(inputs), tmp_path / "int8")
    assert small.bytes < (0.55 if form == "cnn" else 0.7) * full.bytes
    code = (
        "import sys, torch, load; from torch._inductor.utils import run_and_get_code as seen; x = torch.load('x.pt');"
        "run = load.load(); _, text = seen(run, x[:1]); ys = [run(x[:n]) for n in (1, 2, 25)]; torch.save(ys, 'y.pt');"
        "print(any('onednn.qlinear' in t or 'qlinear_pointwise' in t for t in text), 'torchao' in sys.modules)"
    )
    assert outside(code, inputs, tmp_path / "int8") == ["True", "False"]
    found = iter(torch.load(tmp_path / "int8" / "y.pt"))
    assert all(0 < apart(model, lambda _: next(found), inputs, batch) < 0.1 for batch in (1, 2, 25))


@torchao
def test_inductor_int8_keeps_layers_float_and_stores_bytes_as_bytes(tmp_path):
    model, inputs = made("cnn")
    spec = RuntimeSpec("inductor", quant=QuantSpec(keep_float=("7",)))
    runtime.build(model, spec, context(inputs), tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    assert torch.equal(stored["7.weight"], model[7].weight)
    assert {tuple(t.shape) for t in stored.values() if t.dtype == torch.int8} == {(8, 1, 3, 3), (48, 200)}


@torchao
@pytest.mark.parametrize(
    ("quant", "data", "words"),
    [(QuantSpec(per_channel=False), True, "per output channel only"), (QuantSpec(), False, "needs calibration batches")],
)
def test_inductor_refuses_what_it_cannot_quantize(quant, data, words, tmp_path):
    model, inputs = made("cnn")
    given = context(inputs) if data else Context(inputs[:2], (), accuracy)
    with pytest.raises(NotApplicable, match=words):
        runtime.build(model, RuntimeSpec("inductor", quant=quant), given, tmp_path)


def test_inductor_int8_without_torchao_is_refused_with_its_command(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else real(name, *a))
    model, inputs = made("cnn")
    with pytest.raises(NotApplicable, match=r"need the package torchao.*pip install quadriga\[pt2e\]"):
        runtime.build(model, RuntimeSpec("inductor", quant=QuantSpec()), context(inputs), tmp_path)


def outside(code: str, inputs: torch.Tensor, folder: Path) -> list[str]:
    """The words that a fresh process prints, which finds in its folder load.py and the inputs as x.pt."""
    torch.save(inputs, folder / "x.pt")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-2:]
