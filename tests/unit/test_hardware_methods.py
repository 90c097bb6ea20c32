"""The hardware methods write plain data into the runtime slot, and refuse by facts."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.products import LIMIT, medium_error, product_error
from quadriga.core.setup import Setup
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.methods.hardware import matmul_backend
from quadriga.methods.hardware.channels_last import ChannelsLast
from quadriga.methods.hardware.compile import Compile
from quadriga.methods.hardware.eager import Eager
from quadriga.methods.hardware.executorch import ExecuTorch
from quadriga.methods.hardware.half_weights import HalfWeights
from quadriga.methods.hardware.inductor import Inductor
from quadriga.methods.hardware.matmul_backend import MatmulBackend
from quadriga.methods.hardware.onnxruntime import ONNXRuntime
from quadriga.methods.hardware.openvino import OpenVINO
from quadriga.methods.hardware.quantize_int8 import QuantizeInt8
from quadriga.methods.hardware.threads import Threads


@pytest.fixture
def setup():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    splits = [(torch.randn(8, 1, 8, 8), torch.randint(2, (8,))) for _ in range(3)]
    workload = Workload(model=model, train=splits[0], val=splits[1], test=splits[2], trained=True)
    return Setup.of(workload)


def test_each_method_writes_its_field_and_nothing_else(setup):
    plain = RuntimeSpec()
    assert ChannelsLast()(setup).runtime == replace(plain, channels_last=True)
    assert Threads(count=1)(setup).runtime == replace(plain, threads=1)
    assert Compile()(setup).runtime == replace(plain, compile=True)
    assert ONNXRuntime()(setup).runtime == replace(plain, name="onnxruntime")
    assert OpenVINO()(setup).runtime == replace(plain, name="openvino")
    assert Inductor()(setup).runtime == replace(plain, name="inductor")
    after = QuantizeInt8(activations="weights", keep_float=("2",))(setup)
    assert after.runtime == replace(plain, quant=QuantSpec(activations="none", keep_float=("2",)))
    assert "FLOAT_WEIGHTS" not in after.traits
    assert setup.runtime == plain


def test_a_second_runtime_is_refused(setup):
    once = ONNXRuntime()(setup)
    for method in (Eager(), Inductor(), ONNXRuntime(), OpenVINO()):
        with pytest.raises(NotApplicable, match="the runtime is onnxruntime already"):
            method(once)


@pytest.mark.parametrize(
    ("method", "package"), [(ONNXRuntime(), "onnxruntime"), (OpenVINO(), "openvino"), (OpenVINO(), "onnx")]
)
def test_an_absent_package_is_refused_with_its_command(method, package, setup, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    with pytest.raises(NotApplicable, match=rf"{package} is not installed \(pip install quadriga\["):
        method(setup)


def test_no_compiler_is_refused_with_its_command(setup, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for method in (Compile(), Inductor()):
        with pytest.raises(NotApplicable, match=r"no C\+\+ compiler \(install g\+\+"):
            method(setup)


def test_more_threads_than_cores_are_refused(setup):
    cores = os.cpu_count()
    assert Threads(count=cores)(setup).runtime.threads == cores
    with pytest.raises(NotApplicable, match=f"{cores + 1} threads on {cores} cores"):
        Threads(count=cores + 1)(setup)
    with pytest.raises(BadInput, match="count is 0"):
        Threads(count=0)


def test_medium_is_refused_where_products_round_to_bfloat16(setup, monkeypatch):
    """A bfloat16 product errs by about 2⁻⁹; the limit lies between it and float32's error."""
    rounded = product_error(lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    assert product_error(lambda a, b: a @ b) < 1e-6 < LIMIT < 1e-3 < rounded
    monkeypatch.setattr(matmul_backend, "medium_error", lambda: rounded)
    with pytest.raises(NotApplicable, match=r"err by 0\.00"):
        MatmulBackend()(setup)
    monkeypatch.setattr(matmul_backend, "medium_error", lambda: 4e-7)
    assert MatmulBackend()(setup).runtime.matmul == "medium"
    with pytest.raises(NotApplicable, match="highest already"):
        MatmulBackend(precision="highest")(setup)


def test_the_probe_of_products_leaves_the_precision():
    before = torch.get_float32_matmul_precision()
    assert medium_error() > 0
    assert torch.get_float32_matmul_precision() == before


def test_channels_last_needs_a_convolution(setup):
    with pytest.raises(NotApplicable, match="no 2-d convolution"):
        ChannelsLast()(replace(setup, model=nn.Flatten()))
    with pytest.raises(NotApplicable, match="requires IMAGES"):
        ChannelsLast()(replace(setup, traits=setup.traits - {"IMAGES"}))


def test_int8_needs_a_trained_model_and_layers(setup):
    with pytest.raises(NotApplicable, match="requires TRAINED"):
        QuantizeInt8()(replace(setup, traits=setup.traits - {"TRAINED"}))
    with pytest.raises(NotApplicable, match="requires FLOAT_WEIGHTS"):
        QuantizeInt8()(QuantizeInt8()(setup))
    with pytest.raises(NotApplicable, match="no layer for static int8"):
        QuantizeInt8()(replace(setup, model=nn.Sequential(nn.Embedding(9, 9))))
    with pytest.raises(NotApplicable, match="no layer for static int8"):
        QuantizeInt8(keep_float=("0", "2"))(setup)
    with pytest.raises(BadInput, match='no layer "3"'):
        QuantizeInt8(keep_float=("3",))(setup)
    with pytest.raises(NotApplicable, match="calibration batches"):
        QuantizeInt8()(replace(setup, context=replace(setup.context, calibration=())))


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_eager_and_int8_activations_refuse_each_other_in_both_orders(activations, setup):
    with pytest.raises(NotApplicable, match=f"eager does not run {activations} int8"):
        Eager()(QuantizeInt8(activations=activations)(setup))
    with pytest.raises(NotApplicable, match=f"eager does not run {activations} int8"):
        QuantizeInt8(activations=activations)(Eager()(setup))
    assert QuantizeInt8(activations="weights")(Eager()(setup)).runtime.quant is not None


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_inductor_runs_int8_activations_where_torchao_is(activations, setup, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "torchao" else real(name, *a))
    int8 = QuantizeInt8(activations=activations)
    assert int8(Inductor()(setup)).runtime == Inductor()(int8(setup)).runtime
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else real(name, *a))
    for method, after in ((int8, Inductor()(setup)), (Inductor(), int8(setup))):
        with pytest.raises(NotApplicable, match=r"torchao is not installed \(pip install quadriga\[pt2e\]"):
            method(after)


def test_executorch_and_what_it_does_not_run_refuse_each_other(setup, monkeypatch):
    real, names = importlib.util.find_spec, ("executorch", "torchao", "flatbuffers", "ruamel", "tabulate")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name in names else real(name, *a))
    weights = QuantizeInt8(activations="weights")
    for method, after in ((weights, ExecuTorch()(setup)), (ExecuTorch(), weights(setup))):
        with pytest.raises(NotApplicable, match="executorch does not run weights int8"):
            method(after)
    with pytest.raises(NotApplicable, match="executorch stores no bf16 weights"):
        ExecuTorch()(replace(setup, runtime=replace(setup.runtime, weights="bf16")))
    with pytest.raises(NotApplicable, match="executorch stores no bf16 weights"):
        HalfWeights(kind="bf16")(ExecuTorch()(setup))
    assert ExecuTorch()(QuantizeInt8()(setup)).runtime == RuntimeSpec("executorch", quant=QuantSpec())
