"""Each shipped recipe through `quadriga train`, on few examples: it ends with an artifact, or is refused before it trains."""

from __future__ import annotations

import gc
import json
from functools import cache
from pathlib import Path

import pytest
import torch

from quadriga import Recipe
from quadriga.artifact import Announcement, Report
from quadriga.cli import app
from quadriga.engine import tasks
from quadriga.exits import guarded
from quadriga.runtime import open_built
from quadriga.stages import verbs
from quadriga.testing.setups import fake_time
from quadriga.workloads import load, shipped

RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))}
LENET = "lenet_fashion?examples=128&held_out=64"
VIT = """
import torch
from torch import nn
from quadriga import Recipe, Workload, step
from quadriga.testing.workloads import TinyBlock

class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 7, 7)
        self.blocks = nn.ModuleList(TinyBlock(16, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(256, 1, 28, 28, generator=G), torch.randint(4, (256,), generator=G)

def workload():
    return Workload(
        model=Vit, train=(X[:128], Y[:128]), val=(X[128:192], Y[128:192]), test=(X[192:], Y[192:]), name="vit",
        invariances=frozenset({"horizontal_flip"}),
        baseline=Recipe((step("optimizer", kind="adamw", lr=0.003), step("train", epochs=2))),
    )
"""
RESIDUAL = """
import torch
from torch import nn
from quadriga import Recipe, Workload, step

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return x + self.two(torch.relu(self.norm(self.one(x))))

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 16, 4, 4), nn.Linear(16, 4)
        self.blocks = nn.Sequential(*[Block() for _ in range(3)])

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(256, 1, 28, 28, generator=G), torch.randint(4, (256,), generator=G)

def workload():
    return Workload(
        model=Residual, train=(X[:128], Y[:128]), val=(X[128:192], Y[128:192]), test=(X[192:], Y[192:]), name="residual",
        invariances=frozenset({"horizontal_flip"}),
        baseline=Recipe((step("optimizer", kind="adamw", lr=0.003), step("train", epochs=2))),
    )
"""
TEXT = """
import torch
from quadriga import Workload
from quadriga.testing.workloads import TinyTransformer

X = torch.randint(20, (256, 13), generator=torch.Generator().manual_seed(0))

def workload():
    train, val, test = ((x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in X.split([128, 64, 64]))
    return Workload(model=TinyTransformer, train=train, val=val, test=test, metric="bits_per_byte", name="text")
"""
VIT_OF, RESIDUAL_OF, TEXT_OF = "vit.py", "residual.py", "text.py"
FEW_BLOCKS, HALF_BLOCKS = "05-channels-half-few-blocks", "05-channels-half-half-blocks"
NO_STACK = "no stack (ModuleList or Sequential) holds two blocks"
# (workload, recipe) → the step that is refused, and the reason.
REFUSED = {
    (LENET, FEW_BLOCKS): ("prune_blocks(ratio=0.67)", NO_STACK),
    (LENET, HALF_BLOCKS): ("prune_blocks(ratio=0.5)", NO_STACK),
    (LENET, "05-hidden-half-fewer-blocks"): ("prune_blocks(ratio=0.34)", NO_STACK),
    (LENET, "05-hidden-half-half-blocks"): ("prune_blocks(ratio=0.5)", NO_STACK),
    (LENET, "14-thin-blocks"): ("prune_heads(ratio=0.5)", "no layer that matches is cut into heads"),
    (LENET, "15-fewer-blocks"): ("prune_blocks(ratio=0.5)", NO_STACK),
    (LENET, "train-04-growing-images"): ("progressive_size(start=0.5)", "the layer fc1 does not take images of 16×16"),
    (TEXT_OF, "14-thin-blocks"): ("flip()", "flip requires IMAGES"),
    (TEXT_OF, "07-two-thirds"): ("shrink(kernel=3)", "kernel"),
}
OF_BLOCKS = [
    *((VIT_OF, n) for n in ("05-hidden-half-fewer-blocks", "05-hidden-half-half-blocks", "14-thin-blocks", "15-fewer-blocks")),
    *((RESIDUAL_OF, n) for n in (FEW_BLOCKS, HALF_BLOCKS)),
]
LENET_PARAMETERS = 61_706
CUTS = {"shrink", "prune_channels", "low_rank", "to_latency"}


@pytest.fixture(scope="module")
def warm():
    """What each run would do again is done once: the images unpacked; and the garbage collector does not look at what was there
    before."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "read", cache(shipped.read))
        yield
    gc.unfreeze()


@pytest.fixture
def train(tmp_path, monkeypatch, capsys, warm):
    """Run `quadriga train` in this process; gives the JSON object with the exit status.

    What takes long and is tested elsewhere is left out: the export of the rehearsal, the fresh process that loads the artifact,
    and the clock of `to_latency`.
    """
    monkeypatch.setenv("QUADRIGA_DATA", "shipped")
    monkeypatch.chdir(tmp_path)
    (tmp_path / VIT_OF).write_text(VIT)
    (tmp_path / RESIDUAL_OF).write_text(RESIDUAL)
    (tmp_path / TEXT_OF).write_text(TEXT)
    monkeypatch.setattr(tasks, "PATIENCE", 0.2)
    monkeypatch.setattr(tasks.Desk, "_time", lambda self, arms, spec: fake_time(arms, spec))
    fine = Announcement(Report(ok=True, message="", files=1, seconds=0.0), {}, None, "")
    whole = tasks.Desk._executable
    skip = lambda self, walked, name, **how: name.startswith("rehearsal-") or whole(self, walked, name, **how)  # noqa: E731
    monkeypatch.setattr(tasks.Desk, "_executable", skip)
    monkeypatch.setattr(verbs, "announced", lambda *_, **__: fine)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(workload, name):
        status = guarded(app, ["train", workload, "--recipe", str(RECIPES[name]), "--json"])
        return {**json.loads(capsys.readouterr().out.strip().splitlines()[-1]), "exit status": status}

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [n for n in RECIPES if (LENET, n) not in REFUSED])
def test_a_shipped_recipe_ends_with_an_artifact(train, name):
    found = train(LENET, name)
    assert (found["exit status"], found["status"], found.get("artifact")) == (0, "complete", "artifact"), found
    last = Recipe.load(RECIPES[name]).steps[-1].method
    assert open_built(Path("train-out/artifact")).spec.name == (last if last in ("onnxruntime", "openvino") else "eager")
    assert found["parameters"] < LENET_PARAMETERS or not CUTS & {s["method"] for s in found["recipe"]}


@pytest.mark.parametrize(("workload", "name"), REFUSED)
def test_a_recipe_that_cannot_be_is_refused_before_anything_is_trained(train, workload, name):
    found = train(workload, name)
    step, reason = REFUSED[workload, name]
    said = found["error"]
    assert found["exit status"] == 2 and said["remedy"]
    assert f"before anything was trained: refused at {step}: " in said["message"] and reason in said["message"]
    assert not list(Path("train-out").rglob("*.safetensors"))


@pytest.mark.parametrize(("workload", "name"), OF_BLOCKS)
def test_what_is_for_networks_of_blocks_cuts_one(train, workload, name):
    found = train(workload, name)
    assert (found["exit status"], found["status"], found.get("artifact")) == (0, "complete", "artifact"), found
    assert found["parameters"] < sum(p.numel() for p in load(workload).build().parameters())
