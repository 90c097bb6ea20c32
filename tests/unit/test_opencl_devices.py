"""What is said of OpenCL where it is missing or broken: by fakes of libOpenCL, of its drivers and of the packages."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from torch import nn

from quadriga import runtime
from quadriga.core import opencl
from quadriga.core.errors import NotApplicable
from quadriga.core.opencl import ALL, DEFAULT, GPU, INSTALL, Found
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.slots import RuntimeSpec
from quadriga.doctor import examine
from quadriga.methods import cards
from quadriga.methods.hardware.opencl import OpenCL
from quadriga.search.space import Space
from quadriga.stages import baseline, opening
from quadriga.testing import tiny_mlp

CPU, ACCELERATOR = 2, 8
ON_CPU = Found(({"platform": "PoCL", "device": "a CPU", "kind": "cpu", "version": "3.0", "used": True},))
ON_GPU = Found(({"platform": "Mesa", "device": "a GPU", "kind": "gpu", "version": "3.0", "used": True},))


@pytest.fixture(autouse=True)
def _asked_anew():
    opencl.found.cache_clear()
    yield
    opencl.found.cache_clear()


class Library:
    """A libOpenCL: for each platform, (name, kind) of its devices; the last of them is the default one."""

    def __init__(self, platforms, status=0):
        self.platforms, self.status = platforms, status

    def clGetPlatformIDs(self, room, ids, count):
        return self._list([100 * (p + 1) for p in range(len(self.platforms))], ids, count) or self.status

    def clGetDeviceIDs(self, platform, kind, room, ids, count):
        rows = self.platforms[platform.value // 100 - 1]
        chosen = [n for n, (_, k) in enumerate(rows) if kind.value == ALL or k & kind.value]
        chosen = [len(rows) - 1] if kind.value == DEFAULT and rows else chosen
        return self._list([platform.value + n + 1 for n in chosen], ids, count) or (0 if chosen else -1)

    def clGetPlatformInfo(self, platform, what, room, text, size):
        text.value = f"platform {platform.value // 100}".encode()

    def clGetDeviceInfo(self, device, what, room, into, size):
        name, kind = self.platforms[device.value // 100 - 1][device.value % 100 - 1]
        if what in (opencl.DEVICE_TYPE,):
            into._obj.value = kind
        else:
            into.value = name.encode()

    @staticmethod
    def _list(values, ids, count):
        if ids is None:
            count._obj.value = len(values)
        else:
            ids[:] = values


def ask(platforms, status=0):
    return opencl.ask(lambda: Library(platforms, status))


def test_every_device_of_every_platform_is_listed_and_the_used_one_is_marked():
    found = ask([[("A", CPU), ("B", GPU), ("C", GPU)], [("D", ACCELERATOR)]])
    assert [(d["platform"], d["device"], d["kind"], d["used"]) for d in found.devices] == [
        ("platform 1", "A", "cpu", False),
        ("platform 1", "B", "gpu", True),
        ("platform 1", "C", "gpu", False),
        ("platform 2", "D", "accelerator", False),
    ]
    assert found.used["device"] == "B" and not found.reason


def test_without_a_gpu_it_is_the_default_device():
    assert ask([[("A", CPU), ("B", ACCELERATOR)]]).used["device"] == "B"


@pytest.mark.parametrize(
    ("platforms", "status", "reason", "remedy"),
    [
        ([], -1001, "there is no OpenCL platform: no driver is installed", INSTALL),
        ([], 0, "there is no OpenCL platform: no driver is installed", INSTALL),
        ([], -6, "OpenCL answers with error -6", "clinfo -l shows which driver fails"),
        ([[]], 0, "no OpenCL platform has a device", INSTALL),
        ([[], [("A", GPU)]], 0, "the first OpenCL platform has no device", "OCL_ICD_VENDORS=<the .icd file of platform 2>"),
    ],
)
def test_each_way_of_having_none_has_a_reason_and_a_remedy(platforms, status, reason, remedy):
    found = ask(platforms, status)
    assert found.used is None and found.reason.startswith(reason) and found.remedy.startswith(remedy)


def test_a_library_that_is_missing_or_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(opencl.Path, "is_dir", lambda self: False)
    monkeypatch.delenv("OPENCL_PATH", raising=False)
    assert (opencl.ask().reason, opencl.ask().remedy) == ("there is no libOpenCL.so", INSTALL)
    (tmp_path / "libOpenCL.so.1").write_text("no library")
    monkeypatch.setenv("OPENCL_PATH", str(tmp_path / "libOpenCL.so.1"))
    assert "libOpenCL.so.1 does not load" in opencl.ask().reason


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -SEGV $$", "an OpenCL driver ended the process that asked it (status -11)"),
        ("echo '[]'", "an OpenCL driver ended the process that asked it (status 0)"),
        ("exec sleep 60", "the OpenCL drivers gave no answer (TimeoutExpired)"),
    ],
)
def test_a_driver_that_crashes_or_hangs_is_an_answer(script, reason, monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(opencl, "TIMEOUT", 2)
    assert opencl.found().used is None and opencl.found().reason == reason and "clinfo" in opencl.found().remedy


def test_asking_leaves_this_process_alone():
    """Neither a driver nor tinygrad is loaded where it is asked from."""
    import subprocess

    code = "from quadriga import runtime; runtime.probe(); print(open('/proc/self/maps').read().count('OpenCL'))"
    code += "; import sys; print('tinygrad' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


@pytest.fixture
def installed(monkeypatch):
    """Packages are there whether they are or not; `away` names one that is not."""
    real, away = importlib.util.find_spec, []

    def find(name, *rest):
        if name in away:
            return None
        return SimpleNamespace() if name == "tinygrad" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.14.0")
    return away


def test_the_probe_names_the_missing_package_or_the_missing_driver(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(opencl, "found", lambda: Found((), "there is no OpenCL platform", INSTALL))
    probe = runtime.probe()["opencl"]
    assert (probe.ok, probe.reason, probe.remedy) == (False, "there is no OpenCL platform", INSTALL)
    with pytest.raises(NotApplicable, match=r"opencl cannot run here: there is no OpenCL platform \(apt-get install pocl"):
        runtime.build(nn.Linear(3, 2), RuntimeSpec("opencl"), None, tmp_path)
    with pytest.raises(NotApplicable, match=r"no OpenCL platform \(apt-get install pocl"):
        OpenCL()(Setup.of(tiny_mlp()))
    installed.append("tinygrad")
    probe = runtime.probe()["opencl"]
    assert (probe.ok, probe.reason, probe.remedy) == (
        *(False, "the package tinygrad is not installed"),
        "pip install quadriga[opencl]",
    )
    with pytest.raises(NotApplicable, match=r"tinygrad is not installed \(pip install quadriga\[opencl\]\)"):
        OpenCL()(Setup.of(tiny_mlp()))


def test_the_method_chooses_the_runtime_and_refuses_a_second(installed, monkeypatch):
    monkeypatch.setattr(opencl, "found", lambda: ON_CPU)
    chosen = OpenCL()(Setup.of(tiny_mlp()))
    assert chosen.runtime.name == "opencl" and "RUNTIME" in chosen.traits
    with pytest.raises(NotApplicable, match="the runtime is opencl already"):
        OpenCL()(chosen)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (Found((), "there is no OpenCL platform", INSTALL), "there is no OpenCL device"),
        (ON_CPU, "the OpenCL device here is the CPU, which other runtimes use better"),
        (ON_GPU, ""),
    ],
)
def test_a_search_proposes_it_only_where_the_device_is_not_the_cpu(found, why, monkeypatch):
    """Elsewhere it is neither added to a recipe nor timed as an opponent, which is noted; a recipe that names it is legal."""
    monkeypatch.setattr(opencl, "found", lambda: found)
    searched = {c["name"]: opening._for_search(c, ["hardware"]) for c in cards()}
    space = Space(searched, frozenset({"TRAINED", "FLOAT_WEIGHTS"}), Recipe(), frozenset({"hardware"}))
    proposed = any(s.method == "opencl" for r in space.edits(Recipe((step("threads"),))) for s in r.steps)
    opposed = any(s.method == "opencl" for r in baseline.lossless_recipes(SimpleNamespace(space=space)) for s in r.steps)
    assert proposed == opposed == (not why)
    assert [n for n in opening._left_out(space) if "opencl" in n] == ([f"not searched: opencl, since {why}"] if why else [])
    assert space.illegal(Recipe((step("opencl"),))) is None


def test_no_driver_is_asked_for_families_that_are_not_searched(monkeypatch):
    monkeypatch.setattr(opencl, "found", lambda: pytest.fail("asked"))
    assert not any(opening._for_search(c, ["structure", "optimizer"])["unsearched"] for c in cards())


def test_doctor_lists_the_devices(monkeypatch):
    monkeypatch.setattr(opencl, "found", lambda: ON_GPU)
    assert examine()["opencl"] == list(ON_GPU.devices)
