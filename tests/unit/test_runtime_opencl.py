"""Models compute on the OpenCL device what they compute in PyTorch, and nowhere else; a training step there is PyTorch's."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import opencl_device
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from quadriga import runtime, workloads
from quadriga.core import opencl
from quadriga.core.batch import Batch, call, resize, tensors
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.setup import Context, Setup
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.runtime import standalone
from quadriga.runtime.opencl import Trainer

SPEC = RuntimeSpec("opencl", threads=1)


@pytest.fixture(autouse=True)
def _device():
    opencl_device.needed()
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def computed(monkeypatch):
    """(device, kernels run so far) of every output that came back."""
    from tinygrad.runtime import ops_cl

    kernels, seen, run, back = [], [], ops_cl.CLProgram.__call__, standalone.from_cl
    monkeypatch.setattr(ops_cl.CLProgram, "__call__", lambda *a, **k: (kernels.append(1), run(*a, **k))[1])
    monkeypatch.setattr(standalone.opencl, "from_cl", lambda y: (seen.append((y.device, len(kernels))), back(y))[1])
    return seen


def context(inputs):
    return Context(resize(inputs, 2), (Batch(inputs, None, torch.arange(len(tensors(inputs)[0]))),), accuracy)


def agree(model, built, example, sizes=(1, 2, 5), limit=1e-4):
    """Outputs against eager PyTorch's at each batch size, three times each: compiled, recorded, replayed."""
    run = built.run()
    for batch in sizes:
        for time in range(3):
            given = resize(example, batch)
            given = (given + 0.1 * time) if torch.is_tensor(given) and given.is_floating_point() else given
            with torch.inference_mode():
                expected = tensors(call(model, given))
            found = tensors(run(given))
            assert max(standalone.difference(e, f) for e, f in zip(expected, found, strict=True)) <= limit


@pytest.mark.parametrize("name", ["lenet_fashion", "resnet20_fashion", "gpt_shakespeare:2M"])  # a minute each, uncached
def test_ready_workloads_compute_there_what_pytorch_computes(name, computed, tmp_path):
    from tinygrad import Device

    workload = workloads.load(name)
    model = workload.build(0).eval()
    built = runtime.build(model, SPEC, Setup.of(workload, 0, model).context, tmp_path)
    computed.clear()
    agree(model, built, workload.example)
    kernels = [count for _, count in computed]
    assert {device for device, _ in computed} == {"CL"} and all(a < b for a, b in itertools.pairwise(kernels))
    assert Device["CL"].device_name == opencl.found().used["device"]


class Parts(nn.Module):
    """Two inputs of which one has int64 numbers, a nested dict of outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.table = nn.Linear(8, 4), nn.Embedding(9, 4)

    def forward(self, a, b):
        total = self.left(a) + self.table(b)
        return {"logits": total, "parts": (total.relu(), None, total.argmax(-1))}


def test_structures_strides_gradients_and_memory(tmp_path):
    model, inputs = Parts().eval(), (torch.randn(8, 8), torch.randint(0, 9, (8,)))
    run = runtime.build(model, SPEC, context(inputs), tmp_path).run()
    found, expected = run(inputs), model(*inputs)
    assert found["parts"][1] is None and torch.equal(found["parts"][2], expected["parts"][2])
    torch.testing.assert_close(found["parts"][0], expected["parts"][0].detach(), rtol=1e-5, atol=1e-6)
    kept = found["logits"].clone()
    run((-inputs[0], inputs[1]))
    assert torch.equal(found["logits"], kept)  # the next call did not write into it
    found["logits"].add_(1)  # and it is the caller's own to change
    strided = inputs[0].T.contiguous().T.requires_grad_()
    torch.testing.assert_close(run((strided, inputs[1]))["logits"], kept)


def test_every_shape_is_recorded_once_and_only_so_many_are_kept(monkeypatch, tmp_path):
    made, real = [], standalone.opencl.opencl_shape
    monkeypatch.setattr(standalone.opencl, "opencl_shape", lambda *a: (made.append(1), real(*a))[1])
    monkeypatch.setattr(standalone.opencl, "SHAPES", 2)
    model, x = nn.Linear(3, 2).eval(), torch.randn(4, 3)
    run = runtime.build(model, SPEC, context(x), tmp_path).run()
    made.clear()
    for batch, count in ((1, 1), (2, 2), (1, 2), (3, 3), (2, 3), (1, 4)):
        torch.testing.assert_close(run(x[:batch]), model(x[:batch]).detach())
        assert len(made) == count


def test_int8_computes_what_onnx_runtime_computes_from_the_same_file(tmp_path):
    """Static QDQ: one rounding of an activation may fall the other way, more may not."""
    import onnxruntime

    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 32)).eval(), torch.randn(64, 1, 8, 8)
    built = runtime.build(model, RuntimeSpec("opencl", quant=QuantSpec()), context(x), tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    reference = torch.from_numpy(session.run(None, {built.entry["names"][0]: x[:2].numpy()})[0])
    found = built.run()(x[:2])
    assert standalone.difference(reference, found) <= 0.01
    assert 1e-4 < standalone.difference(model(x[:2]).detach(), found) < 0.1  # and it is int8


def test_an_operator_that_tinygrad_lacks_is_named(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    with pytest.raises(NotApplicable, match="tinygrad has no ONNX operator LSTM"):
        runtime.build(Recurrent().eval(), SPEC, context(torch.randn(4, 5, 4)), tmp_path)


ALONE = """
import ctypes, json, sys, load
from safetensors.torch import load_file
from tinygrad import Device
from tinygrad.runtime import ops_cl
kernels, run = [], ops_cl.CLProgram.__call__
ops_cl.CLProgram.__call__ = lambda *a, **k: (kernels.append(1), run(*a, **k))[1]
given = load_file("given.safetensors")
found, units = load.load()(given["x"]), ctypes.c_uint32()
ops_cl.cl.clGetDeviceInfo(Device["CL"].cl_dev, 0x1002, 4, ctypes.byref(units), None)  # CL_DEVICE_MAX_COMPUTE_UNITS
print(json.dumps([load.difference(given["y"], found), len(kernels), units.value, "quadriga" in sys.modules]))
"""


def test_the_folder_runs_alone_and_on_the_device_whatever_the_environment_prefers(tmp_path):
    """In a fresh process, without Quadriga, where tinygrad is told to use its interpreter; PoCL has the recorded thread."""
    from safetensors.torch import save_file

    model, x = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).eval(), torch.randn(3, 6)
    runtime.build(model, SPEC, context(x), tmp_path)
    save_file({"x": x, "y": model(x).detach()}, tmp_path / "given.safetensors")
    environment = {**os.environ, "DEV": "PYTHON"}
    environment = {k: v for k, v in environment.items() if not k.startswith("POCL_")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    difference, kernels, units, ours = json.loads(done.stdout.splitlines()[-1])
    assert difference <= 1e-5 and kernels >= 2 and not ours
    assert units == 1 or opencl.found().used["kind"] != "cpu"


def test_an_artifact_without_a_driver_says_what_to_install(tmp_path):
    """`python load.py` where the library is there and no driver is."""
    runtime.build(nn.Linear(3, 2).eval(), SPEC, context(torch.randn(2, 3)), tmp_path)
    environment = {**os.environ, "OCL_ICD_VENDORS": str(tmp_path)}
    done = subprocess.run([sys.executable, "load.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED: there is no OpenCL device" in done.stdout and "pocl-opencl-icd" in done.stdout


def test_an_output_that_lies_elsewhere_is_an_error():
    from tinygrad import Tensor

    with pytest.raises(RuntimeError, match="the output lies on PYTHON, not on the OpenCL device"):
        standalone.from_cl(Tensor([1.0], device="PYTHON"))


# ---- training


def same_steps(model, batches, **numbers):
    """Train in PyTorch and on the device, and compare the losses, and all weights and statistics after every step."""
    trainer = Trainer(model, batches[0][0], **{k: v for k, v in numbers.items()})
    decay = numbers.pop("decay", 0.0)
    optimizer = torch.optim.SGD(model.parameters(), weight_decay=decay, **numbers)
    for x, target in batches:
        loss = cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert trainer.step(x, target) == pytest.approx(float(loss.detach()), rel=1e-5)
        found = trainer.state_dict()
        assert set(found) == set(model.state_dict())
        for name, expected in model.state_dict().items():
            assert standalone.difference(expected, found[name]) <= 1e-5, name
    return trainer


def test_training_a_lenet_on_the_device_is_training_it_in_pytorch(computed):
    """Five steps of SGD with momentum and decay on Fashion-MNIST, the last batch smaller; the model itself stays as it was."""
    workload = workloads.load("lenet_fashion")
    batches = [workload.train.batch(torch.arange(8 * i, 8 * i + (8 if i < 4 else 5))) for i in range(5)]
    trainer = same_steps(workload.build(0).train(), [(b.inputs, b.target) for b in batches], lr=0.05, momentum=0.9, decay=1e-3)
    assert {device for device, _ in computed} == {"CL"}
    fresh = workload.build(0)
    fresh.load_state_dict(trainer.state_dict())
    assert not torch.equal(fresh.fc3.weight, workload.build(0).fc3.weight)


class Many(nn.Module):
    """The operations that LeNet lacks: normalization, groups, a residual, a gate, and every pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 4, padding="same", bias=False), nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=(2, 1), dilation=(2, 1), groups=3)
        self.down = nn.Conv2d(6, 4, 3, stride=2, padding="valid")
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.first(x)), inplace=True)
        x = nn.functional.max_pool2d(x, 3, 2, 1)  # zeros of the ReLU tie
        x = x + nn.functional.relu6(4 * self.deep(x))
        x = nn.functional.avg_pool2d(self.down(x), (1, 2), 1).tanh()
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        return self.fc((x * x.sigmoid()).mean((2, 3)))


def test_training_every_operation_and_running_statistics():
    batches = [(3 * torch.randn(4, 2, 12, 12), torch.randint(0, 3, (4,))) for _ in range(3)]
    model = Many().train()
    model.fc.bias.requires_grad_(False)  # stays
    bias = model.fc.bias.clone()
    trainer = same_steps(model, batches, lr=0.1, momentum=0.5)
    assert torch.equal(trainer.state_dict()["fc.bias"], bias)
    assert trainer.state_dict()["norm.num_batches_tracked"] == 3


@pytest.mark.slow
def test_a_resnets_step_on_the_device_is_pytorchs():
    """One step: after two, PyTorch's own float32 weights are 1 % away from its float64 ones, and the device's are 0.5 %."""
    workload = workloads.load("resnet20_fashion")
    model, batch = workload.build(0).train(), workload.train.batch(torch.arange(8))
    trainer = Trainer(model, batch.inputs, lr=0.05, momentum=0.9)
    loss = cross_entropy(model(batch.inputs), batch.target)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9).step()
    assert trainer.step(batch.inputs, batch.target) == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(trainer.state_dict(), dict(model.state_dict()), rtol=1e-5, atol=1e-5)


def test_of_equal_maxima_the_first_gets_the_gradient():
    """PyTorch's rule; tinygrad's own max shares it among them."""
    from tinygrad import Tensor

    from quadriga.runtime import _opencl_ops

    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 2.0], [0.0, 2.0, 2.0]])[None, None].requires_grad_()
    nn.functional.max_pool2d(x, 2, 1, 1).sum().backward()

    def gradient():
        y = Tensor(x.detach().numpy())
        return _opencl_ops.max_pool2d(y, [2, 2], [1, 1], [1, 1]).sum().gradient(y)[0]

    assert torch.equal(standalone.from_cl(standalone.on_cl(gradient)), x.grad)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


class Two(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Ceil(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(nn.functional.max_pool2d(x.view(-1, 1, 1, 3), (1, 2), ceil_mode=True).flatten(1))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), r"OpenCL training has no form of aten\..*(dropout|bernoulli)"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=None)), "cumulatively"),
        (Twice(), "two layers share a weight"),
        (Two(3, 2), "returns more than one tensor"),
        (Ceil(), "OpenCL training has no max_pool2d with ceil_mode"),
    ],
)
def test_what_cannot_be_trained_there_is_refused_with_the_reason(model, words):
    with pytest.raises(NotApplicable, match=words):
        Trainer(model.train(), torch.randn(4, 3), lr=0.1)


@pytest.mark.parametrize("numbers", [{"lr": 0.0}, {"lr": 0.1, "momentum": 1.0}, {"lr": 0.1, "decay": -1.0}])
def test_bad_numbers_are_refused(numbers):
    with pytest.raises(BadInput, match="give "):
        Trainer(nn.Linear(3, 2), torch.randn(4, 3), **numbers)
    with pytest.raises(BadInput, match="the number of examples is 1; give at least two"):
        Trainer(nn.Linear(3, 2), torch.randn(1, 3), lr=0.1)


def test_ci_must_have_a_device(monkeypatch):
    """Where QUADRIGA_OPENCL=required, a missing device is a failure and no skip."""
    monkeypatch.setattr(runtime, "probe", lambda: {"opencl": runtime.Probe(False, "", "none", "install one")})
    monkeypatch.setenv("QUADRIGA_OPENCL", "required")
    with pytest.raises(pytest.fail.Exception, match="no OpenCL: none; install one"):
        opencl_device.needed()
    monkeypatch.delenv("QUADRIGA_OPENCL")
    with pytest.raises(pytest.skip.Exception):
        opencl_device.needed()
