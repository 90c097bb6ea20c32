"""What of the CUDA part can be tried without a GPU: what there is, refusals, settings that are put back."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu_on_cpu import H100, TURING

from quadriga import methods
from quadriga.core import cuda
from quadriga.core.errors import NotApplicable
from quadriga.core.products import CUDNN, cudnn_precision, matmul_precision, products_kept
from quadriga.core.setup import Setup
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.doctor import examine
from quadriga.methods.hardware import _measured
from quadriga.methods.hardware.compile import Compile
from quadriga.methods.hardware.cuda import CUDA
from quadriga.methods.hardware.cuda_graphs import CUDAGraphs
from quadriga.methods.hardware.half_weights import HalfWeights
from quadriga.methods.hardware.inductor import Inductor
from quadriga.methods.hardware.matmul_backend import MatmulBackend
from quadriga.methods.hardware.mixed_precision import MixedPrecision
from quadriga.methods.hardware.onnxruntime import ONNXRuntime
from quadriga.methods.hardware.quantize_int8 import QuantizeInt8
from quadriga.methods.hardware.tf32 import TF32
from quadriga.methods.training.accumulate import Accumulate
from quadriga.runtime import cudagraphs
from quadriga.testing import tiny_cnn
from quadriga.testing.setups import trained_setup
from quadriga.train.step import Runner, settings

NONE = cuda.Found((), "13.0", "", "there is no NVIDIA GPU", "check the driver")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def with_gpu(monkeypatch):
    """This machine says that it has a GPU."""

    def has(row):
        monkeypatch.setattr(cuda, "found", lambda: cuda.Found((row,), "13.0", "580.65"))

    has(H100)
    return has


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "found", lambda: NONE)


# what there is


def test_a_pytorch_without_cuda_is_told_from_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    found = cuda.found.__wrapped__()
    assert found.used is None and "built without CUDA" in found.reason and "install a PyTorch with CUDA" in found.remedy
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)

    def absent():
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", absent)
    found = cuda.found.__wrapped__()
    assert found.used is None and "no NVIDIA GPU: CUDA initialization: the driver is too old" in found.reason

    def broken():
        raise RuntimeError("CUDA driver initialization failed\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert cuda.found.__wrapped__().reason == "CUDA does not start: CUDA driver initialization failed"


@pytest.mark.parametrize(("major", "minor", "native"), [(9, 0, (True, True, True)), (7, 5, (False, True, False))])
def test_a_device_says_what_it_multiplies(major, minor, native, monkeypatch):
    facts = SimpleNamespace(name="A", major=major, minor=minor, total_memory=10**9)
    for place, name, value in (
        (torch.backends.cuda, "is_built", lambda: True),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_properties", lambda i: facts),
        (torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "compute_80"]),
    ):
        monkeypatch.setattr(place, name, value)
    row = cuda.found.__wrapped__().used
    assert (row["bf16"], row["fp16"], row["tf32"]) == native and row["capability"] == f"{major}.{minor}"
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_100"])
    assert f"no kernels for A (capability {major}.{minor})" in cuda.found.__wrapped__().reason


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("nothing", ""),
    ],
)
def test_the_drivers_version_is_read(text, version, tmp_path):
    (tmp_path / "version").write_text(text)
    assert cuda.driver(tmp_path / "version") == version and cuda.driver(tmp_path / "absent") == ""


def test_doctor_lists_the_gpu_and_what_its_absence_removes(with_gpu, monkeypatch):
    found = examine()
    line = next(c for c in found["checks"] if c["check"] == "gpu")
    assert found["cuda"] == [H100] and line["ok"]
    assert line["detail"] == "NVIDIA H100 (80 GB, capability 9.0); CUDA 13.0; driver 580.65"
    monkeypatch.setattr(cuda, "found", lambda: NONE)
    found = examine()
    removed = {row["runtime"]: row["methods"] for row in found["removed"]}
    assert removed["PyTorch on a GPU"] == "cuda, tf32" and removed["cuda_graphs"] == "cuda_graphs" and found["ok"]
    checks = {c["check"]: c for c in found["checks"]}
    for name in ("gpu", "runtime cuda_graphs"):
        assert not checks[name]["ok"] and checks[name]["remedy"] == "check the driver" and not checks[name]["needed"]


# methods


def test_without_a_gpu_all_of_it_is_refused_with_a_remedy(without_gpu):
    setup = trained_setup(tiny_cnn)
    for method in (CUDA(), CUDAGraphs()):
        with pytest.raises(NotApplicable, match=r"there is no NVIDIA GPU \(check the driver\)"):
            method(setup)
    with pytest.raises(NotApplicable, match=r"tf32 requires CUDA \(put the step cuda before it"):
        TF32()(setup)
    with pytest.raises(NotApplicable, match=r"CUDA graphs need a GPU.*put cuda before it"):
        Compile(mode="reduce-overhead", keep="always")(setup)
    assert all(methods.available()[n].unsearched() == NONE.reason for n in ("cuda", "cuda_graphs", "tf32"))


def test_each_writes_its_field(with_gpu):
    setup, plain = trained_setup(tiny_cnn), RuntimeSpec()
    there = CUDA()(setup)
    assert there.runtime == replace(plain, device="cuda") and "CUDA" in there.traits
    assert TF32()(there).runtime == replace(plain, device="cuda", matmul="high")
    assert CUDAGraphs()(setup).runtime == CUDAGraphs()(there).runtime == replace(plain, name="cuda_graphs", device="cuda")
    assert ONNXRuntime()(there).runtime.name == "onnxruntime"  # trained there, run here
    assert not any(methods.available()[n].unsearched() for n in ("cuda", "cuda_graphs", "tf32"))
    for method, after in ((CUDA(), there), (TF32(), TF32()(there)), (CUDA(), CUDAGraphs()(setup))):
        with pytest.raises(NotApplicable, match="already"):
            method(after)


def test_what_the_gpu_does_not_do_natively_is_refused(with_gpu):
    with_gpu(TURING)
    setup = CUDA()(trained_setup(tiny_cnn))
    with pytest.raises(NotApplicable, match=r"Tesla T4 \(capability 7.5\) has no TF32"):
        TF32()(setup)
    for method in (MixedPrecision(keep="always"), HalfWeights()):
        with pytest.raises(NotApplicable, match=r"Tesla T4 \(capability 7.5\) has no bf16 products"):
            method(setup)
    assert MixedPrecision(kind="fp16", keep="always")(setup).runtime.autocast == "fp16"
    assert "no TF32" in TF32.unsearched() and not CUDA.unsearched()
    with_gpu(H100)
    assert MixedPrecision(keep="always")(setup).runtime.autocast == HalfWeights()(setup).runtime.weights == "bf16"


def test_the_cpus_matmul_backend_and_the_gpu_refuse_each_other(with_gpu, monkeypatch):
    """Its "medium" would be TF32 there, which nobody asked for."""
    monkeypatch.setattr("quadriga.methods.hardware.matmul_backend.medium_error", lambda: 0.0)
    setup = trained_setup(tiny_cnn)
    with pytest.raises(NotApplicable, match="use tf32 there"):
        MatmulBackend()(CUDA()(setup))
    for method in (CUDA(), CUDAGraphs()):
        with pytest.raises(NotApplicable, match=r"medium.*is TF32 on a GPU"):
            method(MatmulBackend()(setup))


def test_int8_activations_are_no_runtimes_of_pytorch_on_a_gpu(with_gpu):
    setup = trained_setup(tiny_cnn)
    for one in (CUDAGraphs(), Inductor()):
        if isinstance(one, Inductor) and importlib.util.find_spec("triton") is None:
            continue
        there = one(CUDA()(setup))
        with pytest.raises(NotApplicable, match="does not run static int8"):
            QuantizeInt8()(there)
    with pytest.raises(NotApplicable, match=r'the device is the CPU \(use device = "cuda"\)'):
        cudagraphs.write(SimpleNamespace(), RuntimeSpec("cuda_graphs"), None, [1])
    spec = RuntimeSpec("cuda_graphs", device="cuda", quant=QuantSpec())
    with pytest.raises(NotApplicable, match="cuda_graphs does not run static int8"):
        cudagraphs.write(SimpleNamespace(), spec, None, [1])


def test_tf32_is_no_equal_of_float32():
    assert RuntimeSpec(device="cuda").exact and not RuntimeSpec(device="cuda", matmul="high").exact
    assert RuntimeSpec("onnxruntime", device="cuda", matmul="high").exact  # it has products of its own


def test_compiling_for_a_gpu_needs_triton_and_graphs_no_accumulation(with_gpu, monkeypatch):
    real = importlib.util.find_spec
    setup = CUDA()(trained_setup(tiny_cnn))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else real(name, *a))
    for method in (Compile(keep="always"), Inductor()):
        with pytest.raises(NotApplicable, match=r"triton is not installed.*\(pip install triton\)"):
            method(setup)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "triton" else real(name, *a))
    graphs = Compile(mode="reduce-overhead", keep="always")
    spec = graphs(setup).runtime
    assert (spec.compile, spec.compile_mode) == (True, "reduce-overhead")
    with pytest.raises(NotApplicable, match="gradients that accumulate"):
        graphs(Accumulate()(setup))
    with pytest.raises(NotApplicable, match="gradients that accumulate"):
        Runner(setup.model, setup.training.loss, replace(spec, device="cpu"), micro=4)


def test_training_is_timed_where_it_will_be(with_gpu):
    """With the device that was chosen, though the recipe ends in a runtime of its own, and with one that is chosen later."""
    seen = []
    setup = CUDA()(Setup.of(tiny_cnn()))
    for one, end in ((setup, RuntimeSpec("onnxruntime")), (Setup.of(tiny_cnn()), RuntimeSpec(device="cuda"))):
        context = replace(one.context, runtime=end, pace=lambda arms: seen.extend(a.runtime for a in arms) or [2.0, 1.0])
        MixedPrecision()(replace(one, context=context))
    assert [s.device for s in seen] == ["cuda"] * 4 and [s.autocast for s in seen] == ["none", "bf16"] * 2
    _measured.native("bf16", "cuda")


# the precision of products


def test_the_precision_is_put_back_after_an_error():
    """Matrices', and on a GPU cuDNN's, in whichever of PyTorch's two ways they were set."""
    before = (torch.get_float32_matmul_precision(), cudnn_precision())
    for setter in (lambda: None, lambda: setattr(CUDNN.conv, "fp32_precision", "ieee")):
        with products_kept():
            setter()
            mine = cudnn_precision()
            with pytest.raises(ZeroDivisionError), settings(RuntimeSpec(device="cuda", matmul="high")):
                assert torch.get_float32_matmul_precision() == "high" and cudnn_precision() == ("tf32", "tf32")
                raise ZeroDivisionError
            assert cudnn_precision() == mine
            with settings(RuntimeSpec(device="cuda")):
                assert torch.get_float32_matmul_precision() == "highest" and "tf32" not in cudnn_precision()
            assert cudnn_precision() == mine
        assert (torch.get_float32_matmul_precision(), cudnn_precision()) == before


def test_the_cpus_precision_leaves_cudnn_alone():
    before = cudnn_precision()
    with matmul_precision("medium"):
        assert cudnn_precision() == before
