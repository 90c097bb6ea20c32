"""What a runtime cannot take is refused with its own words and a way out that holds; a crash is a mistake of ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quadriga import runtime
from quadriga.core.errors import NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Batch, Context
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.core.trial import Status
from quadriga.engine import tasks
from quadriga.engine.tasks import Desk
from quadriga.runtime._bags import embedding_bag
from quadriga.runtime._refuse import PYTORCH, refusal
from quadriga.testing.workloads import tiny_mlp

EAGER, ORT, OPENVINO = (RuntimeSpec(name, threads=1) for name in ("eager", "onnxruntime", "openvino"))
INT8 = {kind: QuantSpec(activations=kind) for kind in ("static", "dynamic", "none")}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def built(model, spec, inputs, folder):
    context = Context(inputs[:2], (Batch(inputs, None, torch.arange(len(inputs))),), accuracy)
    return runtime.build(model.eval(), spec, context, folder, batches=(1, 8))


def mlp(dtype):
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3)).to(dtype)


def cnn(dtype):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).to(dtype)


@pytest.mark.parametrize(
    ("make", "dtype", "spec", "words"),
    [
        (mlp, torch.float64, OPENVINO, "openvino cannot run the model: .*f64"),
        (cnn, torch.float64, OPENVINO, r"openvino computes other outputs at batch 1: \S+e-0[678] apart"),
        (cnn, torch.float64, ORT, "onnxruntime fails at batch 1: Could not find an implementation for Conv"),
        (mlp, torch.bfloat16, ORT, '"input" is bfloat16, which NumPy lacks'),
        (mlp, torch.bfloat16, OPENVINO, '"input" is bfloat16, which NumPy lacks'),
    ],
)
def test_a_float_type_that_a_runtime_lacks_is_refused_in_its_words_with_a_way_out_that_works(
    make, dtype, spec, words, tmp_path
):
    model = make(dtype)
    inputs = torch.randn(8, *((8,) if make is mlp else (1, 6, 6))).to(dtype)
    with pytest.raises(NotApplicable, match=words) as refused:
        built(model, spec, inputs, tmp_path / "no")
    assert "core.cpp" not in refused.value.reason and "eager or inductor" in refused.value.remedy
    found = built(model, EAGER, inputs, tmp_path / "eager").run()(inputs)
    assert torch.equal(found, model(inputs)) and found.dtype is dtype


@pytest.mark.parametrize(
    ("dtype", "spec", "apart"), [(torch.float64, ORT, 1e-12), (torch.float16, ORT, 1e-2), (torch.float16, OPENVINO, 1e-2)]
)
def test_a_float_type_that_a_runtime_has_is_held_to_that_types_rounding(dtype, spec, apart, tmp_path):
    model, inputs = mlp(dtype), torch.randn(8, 8).to(dtype)
    made = built(model, spec, inputs, tmp_path)
    assert made.entry["computes"] == str(dtype).removeprefix("torch.")
    assert runtime.standalone.difference(model(inputs).detach(), made.run()(inputs)) <= apart


def test_a_clip_behind_what_openvino_cannot_convert_is_refused_and_ends_no_process(tmp_path):
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.stft(x, 16, 8, window=torch.ones(16), return_complex=True).abs().clamp_min(1e-5).mean(-1)

    with pytest.raises(NotApplicable, match="openvino cannot run the model: STFT: Shape of signal input"):
        built(Spectrum(), OPENVINO, torch.randn(8, 64), tmp_path)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "eager"])
def test_int8_of_weights_that_are_no_float32_is_refused_and_never_nothing(name, tmp_path):
    spec, inputs = RuntimeSpec(name, threads=1, quant=INT8["none"]), torch.randn(8, 8)
    with pytest.raises(NotApplicable, match="int8 weights are made of float32 ones, and these are float64") as refused:
        built(mlp(torch.float64), spec, inputs.double(), tmp_path / "double")
    assert "model.float()" in refused.value.remedy
    assert built(mlp(torch.float64).float(), spec, inputs, tmp_path / "single").bytes
    with pytest.raises(NotApplicable, match="no weight matrix has 256 elements"):
        built(nn.Sequential(nn.Linear(8, 3)), spec, inputs, tmp_path / "small")


def test_bf16_storage_of_a_half_model_is_refused(tmp_path):
    with pytest.raises(NotApplicable, match="bf16 weights are made of float32 ones, and these are float16"):
        built(mlp(torch.float16), replace(ORT, weights="bf16"), torch.randn(8, 8).half(), tmp_path)


class Bags(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(60, 16, mode=mode, padding_idx=0), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.bag(x))


@pytest.mark.parametrize(("spec", "mode", "kind"), [(ORT, "max", "dynamic"), (OPENVINO, "mean", "static")])
def test_embedding_bags_work_in_every_runtime_and_in_int8(spec, mode, kind, tmp_path):
    model, inputs = Bags(mode), torch.randint(0, 60, (8, 5))
    expected = model.eval()(inputs).detach()
    found = built(model, spec, inputs, tmp_path / "float").run()
    for rows in (1, 3, 8):
        torch.testing.assert_close(found(inputs[:rows]), expected[:rows], rtol=1e-5, atol=1e-6)
    small = built(model, replace(spec, quant=INT8[kind]), inputs, tmp_path / "int8").run()
    assert 0 < runtime.standalone.difference(expected, small(inputs)) < 0.1


@settings(deadline=None, max_examples=60)
@given(data=st.data(), mode=st.sampled_from(["sum", "mean", "max"]), last=st.booleans(), padding=st.sampled_from([None, 0, 3]))
def test_the_form_of_embedding_bags_is_pytorchs(data, mode, last, padding):
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(sum))
    indices = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=sum(sizes), max_size=sum(sizes))))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    offsets, table = offsets if last else offsets[:-1], torch.randn(9, 3)
    weights = torch.rand(len(indices)) if mode == "sum" and data.draw(st.booleans()) else None
    expected = nn.functional.embedding_bag(
        indices, table, offsets, mode=mode, include_last_offset=last, padding_idx=padding, per_sample_weights=weights
    )
    number = ("sum", "mean", "max").index(mode)
    found = embedding_bag(table, indices, offsets, False, number, False, weights, last, padding)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("spec", [EAGER, ORT])
def test_what_no_runtime_can_export_never_advises_another_runtime(spec, tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x

    with pytest.raises(NotApplicable, match=r"which every runtime needs: .*test_runtime_refusals\.py:\d+") as refused:
        built(nn.Sequential(nn.ReLU(), Branch()), spec, torch.randn(8, 3), tmp_path)
    assert 'in "1"' in refused.value.reason and "eager" not in refused.value.remedy and "torch.where" in refused.value.remedy


@pytest.mark.filterwarnings("ignore")  # of PyTorch's older quantization
def test_layers_that_are_quantized_already_and_sparse_matrices_are_named(tmp_path):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("near", torch.eye(3).to_sparse())

        def forward(self, x):
            return (self.near @ x.t()).t()

    small = torch.ao.quantization.quantize_dynamic(mlp(torch.float32), {nn.Linear}, torch.qint8)
    for model, inputs, words, way in (
        (small, torch.randn(8, 8), "quantized already", "give the float model"),
        (Sparse(), torch.randn(8, 3), "a sparse tensor", "to_dense"),
    ):
        with pytest.raises(NotApplicable, match=f"which every runtime needs: .*{words}") as refused:
            built(model, EAGER, inputs, tmp_path)
        assert way in refused.value.remedy


def test_a_model_that_draws_is_blamed_and_not_the_runtime(tmp_path):
    class Draws(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5)

    for spec in (EAGER, ORT, OPENVINO):
        with pytest.raises(NotApplicable, match="the model gives other outputs for equal inputs in eval mode") as refused:
            built(Draws(), spec, torch.randn(8, 3), tmp_path)
        assert "if self.training" in refused.value.remedy


def test_where_the_export_is_wrong_every_runtime_is_named(tmp_path):
    class Remembers(nn.Module):  # a value of the example becomes a constant of the export
        def forward(self, x):
            return x * (1.0 if torch.compiler.is_exporting() else 2.0)

    with pytest.raises(NotApplicable, match=r"so does what torch\.export made of the model, which every runtime needs"):
        built(Remembers(), ORT, torch.randn(8, 3), tmp_path)


def test_errors_of_runtimes_are_refusals_and_ours_are_crashes(tmp_path, monkeypatch):
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Absent

    said = "Exception from src/inference/src/cpp/core.cpp:84:\nCheck 'false' failed at a/b.cpp:1:\nno such operator\n"
    raised = {
        "openvino": RuntimeError(said),
        "onnxruntime": Absent("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no Gemm(13)"),
    }
    desk = Desk(tiny_mlp(), tmp_path, 0)
    for name, error in raised.items():
        monkeypatch.setattr(desk, "_hello", lambda recipe, args, error=error: (_ for _ in ()).throw(error))
        found = desk.do("hello", {})
        assert found["status"] == Status.REFUSED and found["remedy"] == PYTORCH
        assert found["reason"] == f"{name} cannot run the model: {'no such operator' if name == 'openvino' else 'no Gemm(13)'}"
    unknown = "Exception from src/a.cpp:1:\nSummary:\n-- No conversion rule found for operations: Det-20\nTo facilitate\n"
    assert refusal(RuntimeError(unknown)).reason == "openvino cannot run the model: it has no Det"
    compiler = refusal(torch._dynamo.exc.Unsupported("no such call\nand more"))
    assert (
        compiler is not None
        and str(compiler) == "inductor cannot run the model: no such call (use eager, onnxruntime or openvino)"
    )
    for ours, status in ((KeyError("x"), Status.FAILED), (RuntimeError("out of memory"), Status.OUT_OF_MEMORY)):
        assert refusal(ours) is None
        monkeypatch.setattr(desk, "_hello", lambda recipe, args, error=ours: (_ for _ in ()).throw(error))
        assert desk.do("hello", {})["status"] == status


@pytest.mark.parametrize("when", ["build", "call"])
def test_without_a_reference_in_onnx_runtime_speeds_are_measured_against_eager(when, tmp_path, monkeypatch):
    real = runtime.build

    def build(model, spec, *args, **options):
        if spec.name != "onnxruntime":
            return real(model, spec, *args, **options)
        if when == "build":
            raise TypeError("a mistake of ours")
        return replace(real(model, spec, *args, **options), folder=tmp_path / "away")

    monkeypatch.setattr(tasks.runtime, "build", build)
    desk = Desk(tiny_mlp(trained=True), tmp_path, 0)
    found = desk.do("cost", {"recipe": [], "hash": "x", "batches": (1, 16), "seconds": 0.01})
    assert found["status"] == Status.COMPLETE and found["values"]["speed/1"] > 0
    refused = desk.do("cost", {"recipe": Recipe((step("onnxruntime"),)).plain(), "hash": "y", "batches": (1,)})
    assert refused["status"] == Status.FAILED  # what stood behind it is told where it belongs
