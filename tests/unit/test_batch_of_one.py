"""One artifact with a runtime for a single example and another for a batch: what executes, what is stored, what is verified."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import TwoInputs
from torch import nn

from quadriga import artifact, runtime
from quadriga.core.batch import Batch, call, resize, tensors
from quadriga.core.errors import NotApplicable
from quadriga.core.metric import Floor, accuracy
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Context, Setup
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.engine.tasks import Desk
from quadriga.engine.walk import walk
from quadriga.measure.quality import Scores
from quadriga.methods import build
from quadriga.runtime import standalone
from quadriga.stages.conclude import Finalist, Judge
from quadriga.stages.ratios import not_faster
from quadriga.testing import tiny_mlp

ORT, OV = RuntimeSpec("onnxruntime", threads=1), RuntimeSpec("openvino", threads=1)
TWO = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")


def context(inputs):
    return Context(resize(inputs, 2), (Batch(inputs, None, torch.arange(len(tensors(inputs)[0]))),), accuracy)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 5)).eval()


@pytest.fixture
def called(monkeypatch):
    """The runtimes that were called since the list was cleared."""
    seen = []

    def spied(name, make):
        def loaded(folder, entry, threads):
            run = make(folder, entry, threads)

            def noted(*args, **kwargs):
                seen.append((name, threads))
                return run(*args, **kwargs)

            return noted

        return loaded

    for name, make in list(standalone.RUNTIMES.items()):
        monkeypatch.setitem(standalone.RUNTIMES, name, spied(name, make))
    return seen


@pytest.mark.parametrize("pair", [False, True], ids=["a tensor", "a pair"])
@pytest.mark.parametrize(
    ("one", "more"),
    [
        (ORT, OV),
        (OV, RuntimeSpec("eager")),
        (RuntimeSpec("eager"), ORT),
        pytest.param(ORT, replace(ORT, threads=2), marks=TWO),
        pytest.param(OV, replace(OV, threads=2), marks=TWO),
    ],
)
def test_the_size_of_the_batch_says_which_runtime_executes(one, more, pair, tmp_path, called):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    model = TwoInputs().eval() if pair else network()
    example = (torch.randn(4, 8), torch.randn(4, 3)) if pair else torch.randn(4, 12)
    built = runtime.build(model, replace(more, alone=one), context(example), tmp_path, (1, 64))
    for own in (None, 1):
        run = built.run(threads=own)
        for batch, spec in {1: one, 2: more, 64: more, 5: more}.items():
            called.clear()
            x = resize(example, batch)
            with torch.no_grad():
                torch.testing.assert_close(tensors(run(x)), tensors(call(model, x)), atol=1e-5, rtol=1e-4)
            assert called == [(spec.name, own or spec.threads)], batch
    spec = runtime.open_built(tmp_path).spec
    assert (spec.name, spec.alone.name, spec.alone.threads) == (more.name, one.name, one.threads)
    assert built.entry["batches"] == [64] and built.entry["alone"]["batches"] == [1]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@TWO
def test_each_part_has_a_session_with_its_own_threads(name, tmp_path, monkeypatch):
    """The number with which the session was made that answers a call; a caller's own number is for all."""
    pytest.importorskip(name)
    spec, example = RuntimeSpec(name, threads=2, alone=RuntimeSpec(name, threads=1)), torch.randn(4, 12)
    built = runtime.build(network(), spec, context(example), tmp_path, (1, 64))
    seen = sessions(name, monkeypatch)
    asked = {1: 1, 2: 2, 64: 2, 5: 2}  # batch → threads
    for own, expected in ((None, asked), (2, dict.fromkeys(asked, 2))):
        run = built.run(threads=own)
        for batch, threads in expected.items():
            seen.clear()
            run(resize(example, batch))
            assert set(seen) == {threads}, batch


def sessions(name, monkeypatch):
    """A list to which the number of threads is added of every session that is called; OpenVINO's have it from the compiler."""
    seen = []
    if name == "onnxruntime":
        import onnxruntime

        real_session = onnxruntime.InferenceSession

        class Session:
            def __init__(self, path, options, **others):
                self.real, self.threads = real_session(path, options, **others), options.intra_op_num_threads
                self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs

            def run(self, *args):
                seen.append(self.threads)
                return self.real.run(*args)

        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        return seen
    import openvino

    real = openvino.InferRequest.infer

    def infer(self, *args, **kwargs):
        seen.append(self.get_compiled_model().get_property("INFERENCE_NUM_THREADS"))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(openvino.InferRequest, "infer", infer)
    return seen


def test_a_part_that_compiles_does_not_keep_the_other_from_being_checked(tmp_path, monkeypatch):
    """Inductor compiles in its first call, which a build does not wait for; ONNX Runtime's part is run all the same."""
    pytest.importorskip("onnxruntime")
    real = standalone.RUNTIMES["onnxruntime"]
    monkeypatch.setitem(standalone.RUNTIMES, "onnxruntime", lambda *given: lambda x: -real(*given)(x))
    monkeypatch.setattr(torch, "compile", lambda *given, **options: pytest.fail("it was compiled"))
    for spec, batch in ((RuntimeSpec("inductor", alone=ORT), 1), (replace(ORT, alone=RuntimeSpec("inductor", threads=1)), 2)):
        with pytest.raises(NotApplicable, match=f"onnxruntime computes other outputs at batch {batch}"):
            runtime.build(network(), spec, context(torch.randn(4, 12)), tmp_path)


def test_equal_files_are_stored_once(tmp_path):
    pytest.importorskip("onnxruntime")
    model, example = network(), torch.randn(64, 12)
    plain = runtime.build(model, ORT, context(example), tmp_path / "plain")
    threads = runtime.build(model, replace(ORT, threads=None, alone=ORT), context(example), tmp_path / "threads")
    assert threads.entry["files"] == threads.entry["alone"]["files"] == ["model.onnx"]
    assert threads.bytes - plain.bytes < 600, "nothing but the entry grows"
    int8 = replace(ORT, quant=QuantSpec(), alone=ORT)
    both = runtime.build(model, int8, context(example), tmp_path / "both")
    assert both.entry["files"] == ["model.onnx", "one-model.onnx"] and both.entry["alone"]["files"] == ["one-model.onnx"]
    assert both.bytes > plain.bytes + os.path.getsize(tmp_path / "both" / "model.onnx")
    assert not [p for p in (tmp_path / "both").iterdir() if p.is_dir()], "what it was made in is gone"
    assert int8.bits == 40 and not int8.exact and replace(OV, alone=ORT).exact


@pytest.mark.parametrize("storage", ["plain", "entropy"])
def test_an_artifact_runs_and_checks_itself_without_quadriga(storage, tmp_path):
    pytest.importorskip("onnxruntime")
    model, example = network(), torch.randn(64, 12)
    spec = RuntimeSpec("eager", storage=storage, alone=replace(ORT, quant=QuantSpec(activations="dynamic")))
    folder = artifact.write(
        tmp_path / "artifact", model, spec, context(example), recipe=Recipe(), evidence={}, probes_inputs=example
    )
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from load import load, flatten; m = load();"
        "x = torch.linspace(-1, 1, 36).reshape(3, 12); torch.save([m(x), m(x[:1])], sys.argv[2]);"
        "assert 'quadriga' not in sys.modules and 'onnxruntime' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "y.pt")], check=True, cwd=tmp_path)
    batch, single = torch.load(tmp_path / "y.pt", weights_only=True)
    with torch.no_grad():
        expected = model(torch.linspace(-1, 1, 36).reshape(3, 12))
    torch.testing.assert_close(batch, expected)
    assert 0 < (single - expected[:1]).abs().max() < 0.1, "int8, for one example alone"
    report = artifact.verify(folder)
    assert report["ok"] and "onnxruntime and eager" in report["message"]
    assert "onnxruntime and eager" in (folder / "README.md").read_text()
    damaged = folder / (
        "model.qdz" if storage == "entropy" else "model.onnx" if (folder / "model.onnx").exists() else "one-model.onnx"
    )
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert not artifact.verify(folder)["ok"]


def test_two_parts_of_pytorch_have_one_number_of_threads(tmp_path):
    spec = RuntimeSpec("inductor", threads=2, alone=RuntimeSpec("eager", threads=1))
    with pytest.raises(NotApplicable, match="share PyTorch's number of threads"):
        runtime.build(network(), spec, context(torch.randn(4, 12)), tmp_path)


def test_a_part_that_cannot_run_here_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    absent = runtime.Probe(False, "", "it is not installed", "install it")
    monkeypatch.setattr(runtime._modules()["openvino"], "probe", lambda: absent)
    with pytest.raises(NotApplicable, match="openvino cannot run here"):
        runtime.build(network(), replace(ORT, alone=OV), context(torch.randn(4, 12)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def steps(*given):
    return [build(step(name, **fields)) for name, fields in given]


def test_a_recipe_says_both_parts():
    setup = Setup.of(tiny_mlp(trained=True))
    for method in steps(
        ("quantize_int8", {"activations": "dynamic"}), ("threads", {"count": 1}), ("entropy_storage", {}), ("onnxruntime", {}),
        ("batch_of_one", {}), ("half_weights", {"kind": "bf16"}), ("openvino", {}),
    ):  # fmt: skip
        setup = method(setup)
    spec = setup.runtime
    assert (spec.name, spec.threads, spec.weights, spec.quant, spec.storage) == ("openvino", None, "bf16", None, "entropy")
    assert (spec.alone.name, spec.alone.threads, spec.alone.quant.activations) == ("onnxruntime", 1, "dynamic")
    with pytest.raises(NotApplicable, match="already"):
        steps(("batch_of_one", {}))[0](setup)
    with pytest.raises(NotApplicable, match="requires RUNTIME"):
        steps(("batch_of_one", {}))[0](Setup.of(tiny_mlp()))


def test_each_part_of_a_recipe_knows_the_runtime_that_it_ends_in():
    """half_weights asks whether PyTorch computes: it does for a batch, where the weights stay in float32."""
    workload = tiny_mlp(trained=True)
    ends = []

    class Spy(type(build(step("half_weights")))):
        def apply(self, setup):
            ends.append(setup.ending.name)
            return super().apply(setup)

    recipe = Recipe((step("half_weights"), step("openvino"), step("batch_of_one"), step("half_weights"), step("onnxruntime")))
    spies = iter([Spy(), Spy()] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quadriga.engine.walk.build", lambda s: next(spies) if s.method == "half_weights" else build(s))
        walk(workload, recipe, seed=0, store=None)
    assert ends[-2:] == ["openvino", "onnxruntime"]


def test_quality_is_scored_through_both_and_the_worse_counts(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    workload = tiny_mlp(trained=True)
    desk = Desk(workload, tmp_path, 0)
    int8 = step("quantize_int8", activations="dynamic")
    recipe = Recipe((int8, step("threads", count=1), step("onnxruntime"), step("batch_of_one")))
    args = {"recipe": recipe.plain(), "hash": recipe.hash, "name": "both", "batches": (1, 64)}
    spoiled = standalone.RUNTIMES["onnxruntime"]

    def silly(folder, entry, threads):
        run = spoiled(folder, entry, threads)
        return lambda x: run(x) if len(x) > 1 else -run(x)

    plain = desk.do("train", args)
    monkeypatch.setitem(standalone.RUNTIMES, "onnxruntime", silly)
    wrong = desk.do("train", args)
    assert plain["status"] == wrong["status"] == "complete", (plain, wrong)
    assert wrong["values"]["quality"] < plain["values"]["quality"] - 10
    assert desk.do("realize", args)["status"] == "complete"
    scored = desk.do("score", {**args, "split": "test", "folder": "work/built/both"})["info"]
    batch, single = (Scores.load(tmp_path / scored[key]).value for key in ("scores", "alone"))
    assert batch + single == pytest.approx(100, abs=20), "two classes, and the signs are turned: wrong where it was right"


def test_what_differs_for_one_example_is_refused_by_the_name_of_its_runtime(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    real = standalone.RUNTIMES["onnxruntime"]
    monkeypatch.setitem(standalone.RUNTIMES, "onnxruntime", lambda *given: lambda x: -real(*given)(x))
    spec = RuntimeSpec("eager", alone=ORT)
    with pytest.raises(NotApplicable, match="onnxruntime computes other outputs at batch 1"):
        runtime.build(network(), spec, context(torch.randn(4, 12)), tmp_path)


@pytest.mark.parametrize(("spoiled", "holds"), [((), True), (("scores",), False), (("alone",), False)])
def test_the_floor_has_to_hold_through_both(tmp_path, spoiled, holds):
    """On test, of one finalist: 2 of 400 answers differ, or 40 in one of its parts."""
    base = np.ones(400)
    parts = {"baseline": base}
    for name, part in (("final-0", "scores"), ("final-0, alone", "alone")):
        mine = base.copy()
        mine[: 40 if part in spoiled else 2] = 0
        parts[name] = mine
    metric = tiny_mlp().metric
    scores = {n: Scores(v, base, v.astype(int), 100 * v.mean(), 0.0) for n, v in parts.items()}
    study = SimpleNamespace(workload=SimpleNamespace(metric=metric), options=SimpleNamespace(floor=Floor.parse("-3pt")))
    finalist = Finalist(Recipe(), None, "work/built/final")
    Judge(study)._judge_quality([finalist], scores)
    assert finalist.quality["holds"] == (not finalist.why_not) == holds
    assert finalist.quality["difference"] == pytest.approx(-0.5 if holds else -10)


@pytest.mark.parametrize(
    ("single", "batch", "expected"),
    [
        ((1.9, "faster"), (1.0, "equivalent"), ""),
        ((1.9, "faster"), (0.98, "slower"), "slower than the unchanged model in eager PyTorch: 0.98 times as fast at batch 32"),
        ((1.9, "faster"), (0.8, "undecided"), ""),
        ((1.9, "faster"), (0.7, "slower"), "slower than the unchanged model in eager PyTorch: 0.70 times as fast at batch 32"),
        ((1.0, "equivalent"), (1.0, "equivalent"), "not shown to be faster"),
        ((0.5, "slower"), (1.01, "undecided"), "not shown to be faster"),
    ],
)
def test_what_is_as_fast_for_a_batch_and_faster_for_one_example_is_faster(single, batch, expected):
    found = not_faster({b: {"value": v, "verdict": w} for b, (v, w) in (("1", single), ("32", batch))})
    assert expected in found and bool(found) == bool(expected)
