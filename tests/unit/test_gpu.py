"""Training and scoring on an NVIDIA GPU; and what of it can be tried without one."""

import contextlib
import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import together
import torch
from torch import nn

from quadriga.core.batch import Batch, device_of, evaluating
from quadriga.core.metric import Metric
from quadriga.core.setup import Setup
from quadriga.core.slots import OptimizerSlot, RuntimeSpec
from quadriga.measure.quality import score
from quadriga.measure.timings import Timings
from quadriga.methods.structure.distill import Distill
from quadriga.methods.training.crop import Crop
from quadriga.methods.training.flip import Flip
from quadriga.methods.training.rotate import Rotate
from quadriga.testing import TINY, tiny_cnn, tiny_mlp, tiny_transformer
from quadriga.testing.setups import trained_setup
from quadriga.train.loop import fit

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Please use the new API settings:UserWarning")  # PyTorch 2.9 and later, once
DEVICE = "cuda"
TOLERANCE = 1e-4  # of a weight after a few steps; rounding otherwise makes 3e-6 of difference on the CPU, TF32 about 1e-3


def on_gpu(test):
    """Needs a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")(test))


def setup_of(workload, lr=0.1, device=DEVICE, **spec):
    for module in workload.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # devices draw other numbers
    optimizer = OptimizerSlot(lambda model: torch.optim.Adam(model.parameters(), lr=lr) if lr < 0.1 else sgd(model, lr))
    return replace(Setup.of(workload), optimizer=optimizer, runtime=RuntimeSpec(device=device, **spec))


def sgd(model, lr):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def flat(model):
    """All weights in one vector."""
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


@on_gpu
@pytest.mark.parametrize("spec", [{}, {"channels_last": True}, {"matmul": "high"}], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_learns_there_and_comes_back(name, spec):
    """The loss falls; the weights are finite and on the CPU again, where the setup had them."""
    workload = TINY[name]()
    setup = setup_of(workload, 0.01, **spec)
    first = fit(setup_of(workload, 0.01, **spec), workload.train, epochs=0.01, seed=0).loss
    outcome = fit(setup, workload.train, epochs=20, seed=0)
    assert outcome.loss < 0.9 * first
    assert flat(setup.model).isfinite().all() and device_of(setup.model).type == "cpu"


@on_gpu
@pytest.mark.parametrize("name", TINY)
def test_gives_the_values_of_the_cpu(name):
    """After six steps the weights differ by far less than they moved."""
    workload = TINY[name]()
    before = flat(workload.model)
    there, here = setup_of(workload), setup_of(workload, device="cpu")
    for setup in (there, here):
        fit(setup, workload.train, epochs=1, seed=3)
    error, moved = (flat(there.model) - flat(here.model)).abs().max(), (flat(here.model) - before).abs().max()
    assert moved > 10 * TOLERANCE
    assert error < TOLERANCE


@on_gpu
def test_transforms_draw_there():
    """Crop, flip and rotate act on the batch where it is, from a generator of that device: equal seeds, equal weights."""
    workload = tiny_cnn()
    weights = []
    for _ in range(2):
        setup = setup_of(workload)
        for method in (Crop(padding=1), Flip(), Rotate()):
            setup = method(setup)
        fit(setup, workload.train, epochs=2, seed=1)
        weights.append(flat(setup.model))
    assert weights[0].isfinite().all()
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


@on_gpu
def test_a_teacher_gives_the_same_on_both_devices():
    """Distillation gives the weights that it gives on the CPU."""
    found = []
    for device in (DEVICE, "cpu"):
        setup = trained_setup(tiny_mlp)
        setup = Distill(temperature=2.0)(replace(setup, runtime=RuntimeSpec(device=device)))
        fit(setup, tiny_mlp().train, epochs=1, seed=0)
        found.append(flat(setup.model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


class Cut(Exception):
    """Stands for a kill."""


def cut(fraction):
    if fraction >= 0.5:
        raise Cut


@on_gpu
@pytest.mark.parametrize("build", [tiny_mlp, tiny_cnn])
def test_a_cut_run_goes_on(build, tmp_path):
    """Interrupted halfway and started again it ends where a straight run ends, with Adam's state on the device."""
    workload = build()
    straight, broken, resumed = (setup_of(workload, 0.01) for _ in range(3))
    whole = fit(straight, workload.train, epochs=2, seed=7)
    seconds = itertools.count()  # every look at the clock is a second later: each step is saved and shown
    with pytest.raises(Cut):
        fit(broken, workload.train, epochs=2, seed=7, checkpoint=tmp_path, every=1, clock=lambda: next(seconds), progress=cut)
    outcome = fit(resumed, workload.train, epochs=2, seed=7, checkpoint=tmp_path)
    assert outcome.exact and outcome.steps == whole.steps
    assert not torch.equal(flat(broken.model), flat(straight.model))
    torch.testing.assert_close(flat(resumed.model), flat(straight.model), rtol=0, atol=1e-4)
    assert fit(setup_of(workload, 0.01), workload.train, epochs=2, seed=7, checkpoint=tmp_path).steps == whole.steps


@on_gpu
def test_dropout_goes_on_where_it_stood(tmp_path):
    """The device's generator is part of a checkpoint: without it the masks of the second half would be others."""
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
    workload = replace(tiny_mlp(), model=model)
    setups = [replace(Setup.of(workload), runtime=RuntimeSpec(device=DEVICE)) for _ in range(3)]
    fit(setups[0], workload.train, epochs=2, seed=7)
    seconds = itertools.count()
    with pytest.raises(Cut):
        fit(
            setups[1], workload.train, epochs=2, seed=7, checkpoint=tmp_path, every=1, clock=lambda: next(seconds), progress=cut
        )
    torch.cuda.manual_seed(99)
    fit(setups[2], workload.train, epochs=2, seed=7, checkpoint=tmp_path)
    torch.testing.assert_close(flat(setups[2].model), flat(setups[0].model), rtol=0, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("name", TINY)
def test_mixed_precision_learns_and_keeps_float_weights(name, kind):
    workload = TINY[name]()
    first = fit(setup_of(workload, 0.01), workload.train, epochs=0.01, seed=0).loss
    setup = setup_of(workload, 0.01, autocast=kind)
    assert fit(setup, workload.train, epochs=20, seed=0).loss < 0.9 * first
    assert {p.dtype for p in setup.model.parameters()} == {torch.float32} and flat(setup.model).isfinite().all()


@on_gpu
@pytest.mark.parametrize("name", together.RECIPES)
def test_many_methods_at_once(name, tmp_path):
    """All of them act on the device's own batches; a cut run ends where a straight one does."""
    found = []
    for folder, end in ((None, None), (tmp_path, cut), (tmp_path, None)):
        setup, data = together.made(name)
        setup = replace(setup, runtime=RuntimeSpec(device=DEVICE))
        seconds = itertools.count()
        options = {"checkpoint": folder, "every": 1, "clock": lambda s=seconds: next(s), "progress": end}
        with pytest.raises(Cut) if end else contextlib.nullcontext():
            fit(setup, data, epochs=together.EPOCHS, seed=together.SEED, **options)
        found.append(flat(setup.model))
    assert found[0].isfinite().all() and not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-3)


SQUARED = Metric("squared", "", False, whole=lambda output, target: float((output.float().sum(-1) - target).square().mean()))


@on_gpu
@pytest.mark.parametrize(("build", "metric"), [(tiny_mlp, None), (tiny_transformer, None), (tiny_mlp, SQUARED)])
def test_scores_where_the_model_is(build, metric):
    """A module is scored on its own device, and stays there; the scores are the CPU's."""
    workload = build()
    model, metric = workload.build(), metric or workload.metric
    here = score(model, workload.val, metric, 20)
    there = score(model.to(DEVICE), workload.val, metric, 20)
    assert device_of(model).type == DEVICE and there.seconds > 0
    assert there.value == pytest.approx(here.value, rel=1e-4)
    if here.values is not None:
        assert there.values == pytest.approx(here.values, rel=1e-3, abs=1e-5)


# without a GPU


def test_a_batch_moves_whole():
    """Inputs, target, index and weight; nothing is copied when nothing moves."""
    batch = Batch({"x": torch.ones(2, 3), "y": (torch.ones(2),)}, torch.ones(2), torch.arange(2), torch.ones(2))
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    found = [moved.inputs["x"], moved.inputs["y"][0], moved.target, moved.index, moved.weight]
    assert all(t.device.type == "meta" for t in found)
    assert Batch(torch.ones(2), None, torch.arange(2)).to("meta").weight is None


def test_evaluation_gives_each_module_its_own_mode_back():
    """A batch norm that its user froze stays frozen, in scoring and in what a setup looks at first."""
    model = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].eval()
    workload = replace(tiny_mlp(), model=model)
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    score(model, workload.val, workload.metric)
    Setup.of(workload, model=model)
    assert [m.training for m in model] == [True, False, True]


@pytest.fixture
def benchmark(monkeypatch):
    """benchmarks/gpu.py as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_says_when_there_is_no_gpu(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"benchmark": "gpu", "skipped": "no CUDA device"}
    assert "no CUDA device" in err


def test_the_benchmark_pairs_its_arms(benchmark):
    """Both loops learn alike on the CPU, and every pair of arms that was timed has a ratio."""
    task = benchmark.tasks("0.8M", 100)[0]
    run = benchmark.restart(0, task, steps=30, blocks=2, device="cpu")
    here = [name for name, fields in benchmark.SPECS.items() if not benchmark.SLOW & set(fields)]
    assert {name: len(blocks) for name, blocks in run.items()} == dict.fromkeys(("bare", *here), 2)
    row = benchmark.summary([run, run])
    assert set(row["ratios"]) == {"bare/fit", *(f"fit/{name}" for name in here if name != "fit")}
    expected = [b[0] / f[0] for b, f in zip(run["bare"], run["fit"], strict=True)]
    assert min(expected) <= row["ratios"]["bare/fit"]["value"] <= max(expected)
    assert row["loss"]["fit"] == pytest.approx(row["loss"]["bare"], rel=0.3)


def test_the_benchmark_times_finished_networks_and_says_what_it_left_out(benchmark, tmp_path, monkeypatch):
    """Each arm is a folder in a process of its own; CUDA graphs are refused on the CPU, with the reason."""
    import gpu_inference

    monkeypatch.setattr(gpu_inference, "ARMS", {k: gpu_inference.ARMS[k] for k in ("eager", "channels_last", "cuda_graphs")})
    found = gpu_inference.infer("lenet_fashion", "cpu", tmp_path, restarts=2, blocks=2, seconds=0.01, level=0.99)
    assert set(found["seconds"]) == {"1", "64"} and set(found["seconds"]["1"]) == {"eager", "channels_last"}
    assert set(found["ratios"]["64"]) == {"eager/channels_last"}
    assert found["bytes"]["eager"] > 200_000 and found["startup"]["eager"] > 0 and not found["errors"]
    assert set(found["refused"]) == {"cuda_graphs"} and len(found["refused"]["cuda_graphs"]) > 20


def test_the_benchmarks_rows_are_eagers_time_over_the_others(benchmark):
    import gpu_inference

    timings = Timings.empty([1], ["eager", "fast"], 3)
    for _ in range(3):
        for arm, seconds in (("eager", 3e-3), ("fast", 1e-3)):
            timings.add(arm, {1: [(seconds, seconds)] * 4}, {"startup": 2.0, "device": 50})
    found = gpu_inference.rows(timings, 0.99)
    assert found["seconds"]["1"] == pytest.approx({"eager": 3e-3, "fast": 1e-3})
    assert found["ratios"]["1"]["eager/fast"]["value"] == pytest.approx(3.0)
    assert found["startup"] == {"eager": 2.0, "fast": 2.0} and found["device_bytes"] == {"eager": 50, "fast": 50}
