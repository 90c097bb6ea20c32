"""Finished models on an NVIDIA GPU, and what training there leans on: TF32, graphs, transfer, loss scaling, memory."""

import importlib.util
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from test_cuda_runtime import Placed
from test_gpu import DEVICE, flat, on_gpu, setup_of
from torch import nn

from quadriga import artifact, runtime
from quadriga.core import cuda
from quadriga.core.batch import Batch, call, device_of, evaluating, resize, tensors
from quadriga.core.data import Data, TensorData
from quadriga.core.errors import NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.products import cudnn_precision
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Context, Setup
from quadriga.core.slots import OptimizerSlot, RuntimeSpec
from quadriga.doctor import examine
from quadriga.engine.walk import walk
from quadriga.measure.latency import paired
from quadriga.methods.hardware.cuda import CUDA
from quadriga.methods.hardware.tf32 import TF32
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.runtime import standalone
from quadriga.testing import TINY, tiny_cnn, tiny_mlp
from quadriga.testing.setups import trained_setup
from quadriga.train.loop import fit
from quadriga.train.step import Runner, prepared, settings
from quadriga.workloads import load

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Please use the new API settings:UserWarning"),  # PyTorch 2.9 and later, once
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # they are left alone on purpose
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning"),
]
GRAPHS = RuntimeSpec("cuda_graphs", device=DEVICE)
NAMES = ["eager", "cuda_graphs", pytest.param("inductor", marks=pytest.mark.slow)]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_tf32 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="the GPU has no TF32"
)


def context_of(inputs):
    return Context(resize(inputs, 2), (Batch(inputs, None, torch.arange(len(tensors(inputs)[0]))),), accuracy)


def placed():
    return Placed().eval(), torch.randint(20, (64, 5))


def tiny(name):
    workload = TINY[name](trained=True)
    return workload.build(0).eval(), resize(workload.val.batch(torch.arange(48)).inputs, 64)


# finished models


@on_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("network", [*TINY, "placed"])
def test_outputs_are_those_of_eager_at_batch_1_2_and_the_largest(network, name, tmp_path):
    """From either memory, and where the inputs are; of eager on the GPU, and on the CPU."""
    model, inputs = placed() if network == "placed" else tiny(network)
    run = runtime.build(model, RuntimeSpec(name, device=DEVICE), context_of(inputs), tmp_path, (1, 64)).run()
    live = runtime.prepare(model, RuntimeSpec(device=DEVICE))
    for batch in (1, 2, 64):
        given = resize(inputs, batch)
        with torch.no_grad():
            expected = call(model, given)
        for found in (run(given), live(given)):
            assert found.device.type == "cpu"
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        there = run(given.to(DEVICE))
        assert there.device.type == DEVICE
        torch.testing.assert_close(there.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert device_of(model).type == "cpu"


@on_gpu
@pytest.mark.parametrize("weights", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["eager", "cuda_graphs"])
def test_half_weights_and_channels_last(name, weights, tmp_path):
    if not cuda.found().used[weights]:
        pytest.skip(f"the GPU has no {weights} products")
    model, inputs = tiny("cnn")
    spec = RuntimeSpec(name, device=DEVICE, weights=weights, channels_last=True)
    found = runtime.build(model, spec, context_of(inputs), tmp_path).run()(inputs)
    with torch.no_grad():
        expected = model(inputs)
    assert found.dtype is torch.float32 and 1e-6 < standalone.difference(expected, found) < 0.05


@on_gpu
def test_a_recordings_outputs_are_the_callers_whatever_comes_next(tmp_path):
    """Kept outputs stay; threads and streams take turns; the least recent shape makes room."""
    model, inputs = tiny("mlp")
    run = runtime.build(model, GRAPHS, context_of(inputs), tmp_path).run()
    with torch.no_grad():
        expected = model(inputs)
    kept = {size: run(inputs[:size].to(DEVICE)) for size in range(1, standalone.cuda_graphs.RECORDED + 5)}
    for size, found in kept.items():
        torch.testing.assert_close(found.cpu(), expected[:size], rtol=1e-4, atol=1e-5)
    wrong = []

    def several(start):
        with torch.cuda.stream(torch.cuda.Stream()):
            for k in range(start, start + 200):
                rows = torch.arange(k, k + 4) % 64
                if not torch.allclose(run(inputs[rows]), expected[rows], rtol=1e-4, atol=1e-5):
                    wrong.append(k)

    threads = [threading.Thread(target=several, args=(start,)) for start in (0, 17, 31)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert run(inputs[:0]).shape == (0, expected.shape[1])


@on_gpu
def test_a_program_that_reads_values_back_is_refused_and_leaves_all_as_it_was():
    place = (torch.device(DEVICE, torch.cuda.current_device()), torch.cuda.Stream(), torch.cuda.graph_pool_handle())
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="no CUDA graph can be recorded"):
        standalone.cuda_graphs.Recording(lambda leaves: [leaves[0] * leaves[0].sum().item()], [torch.ones(2)], place, False)
    assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == 0
    good = standalone.cuda_graphs.Recording(lambda leaves: [leaves[0] * 2], [torch.ones(2)], place, False)
    assert good.replay([torch.full((2,), 3.0)])[0].tolist() == [6.0, 6.0]


class Masked(nn.Module):
    """Counts its positive values, and can be captured all the same."""

    def forward(self, x):
        return x + x[x > 0].sum()


@on_gpu
def test_what_cannot_be_recorded_is_refused_when_it_is_built_and_runs_in_eager(tmp_path):
    inputs = torch.randn(8, 4)
    with pytest.raises(NotApplicable, match=r"no CUDA graph can be recorded: aten\.index"):
        runtime.build(Masked().eval(), GRAPHS, context_of(inputs), tmp_path)
    run = runtime.build(Masked().eval(), RuntimeSpec(device=DEVICE), context_of(inputs), tmp_path).run()
    torch.testing.assert_close(run(inputs), Masked()(inputs))


@on_gpu
@pytest.mark.parametrize("name", ["eager", "cuda_graphs"])
@pytest.mark.parametrize("storage", ["plain", "entropy"])
def test_an_artifact_is_loaded_in_a_fresh_process_and_says_where_it_cannot(name, storage, tmp_path):
    model, inputs = tiny("cnn")
    spec, recipe = RuntimeSpec(name, device=DEVICE, storage=storage), Recipe((step("cuda"), step(name)))
    folder = artifact.write(
        tmp_path / "made", model, spec, context_of(inputs), recipe=recipe, evidence={}, probes_inputs=inputs, batches=(1, 64)
    )
    report = artifact.verify(folder)
    assert report["ok"] and name in report["message"], report
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "load.py"], cwd=folder, capture_output=True, text=True, env=hidden, check=False)
    assert done.returncode == 1 and "runs on an NVIDIA GPU" in done.stdout


@on_gpu
def test_arms_are_timed_and_their_memory_on_the_gpu_is_told(tmp_path):
    model, inputs = tiny("cnn")
    folders = {}
    for name in ("eager", "cuda_graphs"):
        spec = RuntimeSpec(name, device=DEVICE)
        folders[name] = runtime.build(model, spec, context_of(inputs), tmp_path / name).folder
    arms = {name: {"kind": "folder", "path": str(folder)} for name, folder in folders.items()}
    timings = paired(arms, {1: inputs[:1]}, restarts=2, blocks=2, block_seconds=0.02, folder=tmp_path)
    assert not timings.errors
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert all(timings.device[n] >= weights and timings.growth[n] >= timings.device[n] for n in arms)
    assert all(timings.latency(1, n).value > 0 for n in arms)


# placement and precision


@on_gpu
def test_the_method_places_training_and_what_is_built():
    """Batches, weights and the finished model are there, by a recipe alone; the model comes back."""
    seen, inner = set(), tiny_cnn().loss
    workload = tiny_cnn()

    def loss(output, batch):
        seen.update((output.device.type, batch.index.device.type))
        return inner(output, batch)

    setup = CUDA()(Setup.of(workload))
    fit(replace(setup, training=replace(setup.training, loss=loss)), workload.train, epochs=1, seed=0)
    assert seen == {DEVICE} and device_of(setup.model).type == "cpu"
    walked = walk(tiny_cnn(trained=True), Recipe((step("cuda"), step("cuda_graphs"))), seed=0, store=None)
    assert (walked.setup.runtime.name, walked.setup.runtime.device) == ("cuda_graphs", DEVICE)


@on_gpu
@pytest.mark.parametrize("reference", ["lenet_fashion", "gpt_shakespeare?examples=64&size=0.8M"])
def test_ready_made_networks_train_as_on_the_cpu(reference):
    workload = load(reference)
    data = TensorData(*(t[:48] for t in (workload.train.inputs, workload.train.target)))
    found = []
    for device in (DEVICE, "cpu"):
        setup = Setup.of(workload)
        setup = replace(setup, training=replace(setup.training, batch_size=16), runtime=RuntimeSpec(device=device))
        fit(replace(setup, optimizer=OptimizerSlot(lambda m: torch.optim.SGD(m.parameters(), lr=0.05))), data, epochs=1, seed=0)
        found.append(flat(setup.model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def error_of(function, *inputs):
    with torch.no_grad():
        exact = function(*(x.double() for x in inputs))
        return float((function(*inputs).double() - exact).norm() / exact.norm())


@on_gpu
@needs_tf32
def test_tf32_acts_where_it_is_asked_for_and_nowhere_else():
    """On matrices and on convolutions; afterwards the process's settings are as they were."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 256, 256, device=DEVICE)
    images, kernels = torch.randn(8, 64, 16, 16, device=DEVICE), torch.randn(64, 64, 3, 3, device=DEVICE)
    before = (torch.get_float32_matmul_precision(), cudnn_precision())
    with settings(RuntimeSpec(device=DEVICE)):
        assert error_of(torch.matmul, a, b) < 1e-5 and error_of(torch.conv2d, images, kernels) < 1e-5
    setup = TF32()(CUDA()(trained_setup(tiny_cnn)))
    with settings(setup.runtime):
        assert 1e-4 < error_of(torch.matmul, a, b) < 5e-3 and 1e-4 < error_of(torch.conv2d, images, kernels) < 5e-3
    assert (torch.get_float32_matmul_precision(), cudnn_precision()) == before


@on_gpu
@needs_tf32
@pytest.mark.parametrize("name", ["eager", "cuda_graphs"])
def test_a_finished_model_keeps_its_own_precision(name, tmp_path):
    """TF32 errs by 1e-3 or less; float32 does not."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 64)).eval(), torch.randn(8, 64, 8, 8)
    with torch.no_grad():
        expected = model.double()(inputs.double()).float()
    model.float()
    errors = []
    for matmul in ("high", "highest"):
        spec = RuntimeSpec(name, device=DEVICE, matmul=matmul)
        run = runtime.build(model, spec, context_of(inputs), tmp_path / matmul).run()
        errors.append(standalone.difference(expected, run(inputs)))
    assert 5e-5 < errors[0] < 5e-3 and errors[1] < 1e-5


# training


class Plain(Data):
    """A split that is not resident and has no workers, as a user's own."""

    resident = False

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def batch(self, index):
        return self.data.batch(index)


@on_gpu
@pytest.mark.filterwarnings("ignore")  # the profiler's own
def test_batches_go_through_pinned_memory():
    """As the profiler sees the copies; and the weights are those of data that lie there from the start."""
    from torch.profiler import ProfilerActivity, profile

    workload = tiny_cnn()
    setups = [setup_of(workload) for _ in range(2)]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        fit(setups[0], Plain(workload.train), epochs=1, seed=0)
    names = " ".join(event.key for event in seen.key_averages())
    assert "Pinned -> Device" in names
    fit(setups[1], workload.train, epochs=1, seed=0)
    torch.testing.assert_close(flat(setups[0].model), flat(setups[1].model), rtol=0, atol=1e-4)


@on_gpu
def test_batches_arrive_whole_while_the_gpu_is_busy():
    """Hundreds of batches are sent while the computation lags behind; each has its own values."""
    model = nn.Linear(4, 4)
    runner = Runner(model.to(DEVICE), None, RuntimeSpec(device=DEVICE))
    busy, sums = torch.randn(2048, 2048, device=DEVICE), []
    for number in range(300):
        batch = runner.place(Batch(torch.full((64, 64), float(number)), None, torch.arange(64)))
        busy = busy @ busy
        busy = busy / busy.norm()
        sums.append(batch.inputs.sum() + 0 * busy[0, 0])
        del batch
    assert torch.stack(sums).tolist() == [64.0 * 64 * number for number in range(300)]


@on_gpu
def test_fp16_survives_an_overflow():
    """A scale far too large: steps are left out while it falls, then the loss does."""
    workload = tiny_mlp()
    setup = setup_of(workload, 0.01, autocast="fp16")
    with prepared(setup) as runner:
        runner.scaler.load_state_dict({**runner.scaler.state_dict(), "scale": 2.0**30})
        optimizer = torch.optim.Adam(setup.model.parameters(), lr=0.01, fused=True)
        batch, kept, losses, still = runner.place(workload.train.batch(torch.arange(64))), flat(setup.model), [], 0
        for _ in range(60):
            losses.append(float(runner.forward_backward(batch)))
            runner.unscale(optimizer)
            runner.update(optimizer)
            still += torch.equal(flat(setup.model), kept)
        assert 0 < still < 40 and runner.state()["scale"] < 2.0**30
        assert flat(setup.model).isfinite().all() and losses[-1] < 0.8 * losses[0]


@on_gpu
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "adagrad", "muon", "schedule_free"])
def test_optimizers_take_their_fused_form_and_give_the_cpus_weights(kind):
    workload, found = tiny_mlp(), []
    for device in (DEVICE, "cpu"):
        setup = Optimizer(kind=kind)(replace(Setup.of(workload), runtime=RuntimeSpec(device=device)))
        fit(setup, workload.train, epochs=1, seed=0)
        found.append(flat(setup.model))
    with prepared(setup_of(workload)):
        pass
    made = Optimizer(kind=kind).make(workload.build(0).to(DEVICE))
    assert any(group.get("fused") for group in made.param_groups)
    apart = (found[0] - found[1]).abs()
    close = apart < (2e-2 if kind == "muon" else 1e-4)  # muon orthogonalises in bfloat16 there
    assert close.float().mean() > 0.99 and apart.max() < 5e-2  # a first step of Adam's goes by the sign of a gradient near 0


@on_gpu
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("build", [tiny_cnn, TINY["transformer"]])
def test_a_compiled_step_gives_the_same_weights(build, mode):
    workload, found = build(), []
    for fields in ({}, {"compile": True, "compile_mode": mode}):
        setup = setup_of(workload, 0.05, **fields)
        fit(setup, workload.train, epochs=3, seed=0)
        found.append(flat(setup.model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@on_gpu
def test_doctor_names_the_gpu():
    found = examine()
    assert found["cuda"][0]["name"] == torch.cuda.get_device_name(0)
    line = next(c for c in found["checks"] if c["check"] == "runtime cuda_graphs")
    assert line["ok"] and next(c for c in found["checks"] if c["check"] == "gpu")["ok"]


@on_gpu
def test_evaluation_stays_where_the_model_is():
    model, inputs = tiny("cnn")
    with evaluating(model.to(DEVICE)), torch.no_grad():
        assert model(inputs.to(DEVICE)).device.type == DEVICE
