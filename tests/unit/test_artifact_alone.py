"""An artifact of every runtime loads in a fresh process that has nothing but what it says it needs, and computes."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from quadriga import artifact, runtime
from quadriga.core.batch import Batch
from quadriga.core.errors import NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.recipe import Recipe
from quadriga.core.setup import Context
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.runtime.standalone import RUNTIMES, read_entry, source

ALONE = """
import json, sys
forbidden = set(json.loads(sys.argv[1]))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in forbidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.path.insert(0, sys.argv[2])
import torch
import load
torch.save(load.load()(torch.load(sys.argv[3], weights_only=True)), sys.argv[4])
print("loaded", "quadriga" in sys.modules)
"""
SPECS = {
    "float32": {},
    "int8": {"quant": QuantSpec(8, "static")},
    "bf16": {"weights": "bf16"},
    "entropy": {"storage": "entropy"},
}
COMPILED = pytest.mark.slow  # a compiler's half minute each
CASES = [
    pytest.param(name, kind, marks=COMPILED if name == "inductor" else ())
    for name in sorted(runtime.probe())
    for kind in SPECS
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_load_py_is_the_parts_that_its_runtime_needs(name):
    text, space = source(name), {"__name__": "load", "__file__": "load.py"}
    exec(compile(text, "load.py", "exec"), space)
    assert name in space["RUNTIMES"] and callable(space["load"]) and "quadriga.runtime" not in text
    foreign = {"onnxruntime", "openvino", "executorch", "tinygrad"} - {name, "tinygrad" if name == "opencl" else ""}
    assert not any(f"import {other}" in text or f"from {other}" in text for other in foreign)


def needed(names):
    """Distributions that pip would install for these, by their own metadata."""
    found, left = set(), [plain(n) for n in names]
    while left:
        if (name := left.pop()) in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        left += [plain(r) for r in required if "extra ==" not in r]
    return found


def plain(requirement):
    """The name of a requirement, as pip compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def others(needs):
    """Modules of all installed distributions that are not needed."""
    allowed = needed(needs)
    owners = metadata.packages_distributions()
    if "setuptools" in allowed:  # which PyTorch needs, with what it brings along
        brought = Path(str(metadata.distribution("setuptools").locate_file("setuptools/_vendor")))
        owners = {m: d for m, d in owners.items() if not (brought / m).exists()}
    return sorted({"quadriga", *(m for m, dists in owners.items() if not allowed & {plain(d) for d in dists})})


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_runs_with_its_needs_alone(name, kind, tmp_path):
    if not (state := runtime.probe()[name]).ok:
        pytest.skip(f"{name}: {state.reason}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.randn(70, 1, 8, 8)
    context = Context(x[:2], (Batch(x, None, torch.arange(70)),), accuracy)
    spec = RuntimeSpec(name, threads=1, **SPECS[kind])
    try:
        folder = artifact.write(tmp_path / "a", model, spec, context, recipe=Recipe(()), evidence={"seed": 0}, probes_inputs=x)
    except NotApplicable as refusal:
        pytest.skip(f"{name} has no {kind}: {refusal.reason}")
    forbidden = others(read_entry(folder)["needs"])
    assert {"quadriga", "optuna", "pytest"} <= set(forbidden)
    torch.save(x[:5], tmp_path / "x.pt")
    command = [sys.executable, "-c", ALONE, json.dumps(forbidden), *map(str, (folder, tmp_path / "x.pt", tmp_path / "y.pt"))]
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "PYTHONPATH")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines()[-1:] == ["loaded False"], done.stderr
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    torch.testing.assert_close(found, runtime.open_built(folder).run()(x[:5]), rtol=1e-5, atol=1e-5)
    error = 1e-4 if kind == "float32" else 0.1
    torch.testing.assert_close(found, model(x[:5]).detach(), rtol=error, atol=error)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory as it likes")
def test_large_outputs_do_not_wait_for_fresh_pages(tmp_path):
    """Calls with 42 MB of outputs after the first ones: 10,000 pages each, were they given back to the system."""
    example = torch.randn(4, 64)
    context = Context(example[:2], (Batch(example, None, torch.arange(4)),), accuracy)
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU()).eval()
    runtime.build(model, RuntimeSpec(threads=1), context, tmp_path)
    code = (
        "import sys, resource, torch; sys.path.insert(0, sys.argv[1]); from load import load; m = load();"
        "x = torch.randn(2560, 64); faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "calls = lambda n: any(m(x) is None for _ in range(n)); calls(20); a = faults(); calls(10); print((faults() - a) // 10)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 500
