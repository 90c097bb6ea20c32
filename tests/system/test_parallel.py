"""`quadriga train --nproc`: ranks that torchrun starts, one that is killed, and one voice for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
MODEL = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from quadriga import Recipe, Workload, step

G = torch.Generator().manual_seed(0)
X = torch.randn(1200, 16, generator=G)
Y = (X @ torch.randn(16, 3, generator=G)).argmax(1)
MARK = Path(__file__).with_name("killed")

class Net(nn.Sequential):
    calls = 0

    def forward(self, x):
        Net.calls += self.training
        if Net.calls > 30 and os.environ.get("RANK") == "1" and Path(__file__).with_name("kill").exists() and not MARK.exists():
            MARK.write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def model():
    return Net(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

def workload():
    return Workload(
        model=model, train=(X[:600], Y[:600]), val=(X[600:900], Y[600:900]), test=(X[900:], Y[900:]), name="two layers",
        batch_size=32, baseline=Recipe((step("optimizer", kind="adam", lr=0.01), step("train", epochs=3))),
    )
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "w.py").write_text(MODEL)
    return tmp_path


def quadriga(folder, *words):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "quadriga", *words]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=280, check=False)


def test_a_rank_is_killed_and_the_training_ends_as_in_one_process(folder):
    """The same quality and nearly the same weights, one artifact, one JSON object; the kill took place."""
    import safetensors.torch

    alone = quadriga(folder, "train", "w.py", "--out", "alone", "--json")
    (folder / "kill").touch()
    both = quadriga(folder, "train", "w.py", "--out", "both", "--nproc", "2", "--json")
    assert both.returncode == alone.returncode == 0, both.stderr[-3000:]
    assert (folder / "killed").read_text() == "0"
    one, two = (json.loads(done.stdout.strip().splitlines()[-1]) for done in (alone, both))
    assert len(both.stdout.strip().splitlines()) == 1
    assert two["quality"] == one["quality"] and two["samples"] == one["samples"] and two["artifact"] == "artifact"
    assert [s["method"] for s in two["recipe"]] == ["data_parallel", "optimizer", "train"]
    models = [safetensors.torch.load_file(next((folder / out / "checkpoints").rglob("model-*"))) for out in ("alone", "both")]
    assert all((models[0][name] - models[1][name]).abs().max() < 1e-5 for name in models[0])
    again = quadriga(folder, "train", "w.py", "--out", "both", "--json")  # the same run, without ranks: nothing is left to do
    assert json.loads(again.stdout.strip().splitlines()[-1])["seconds"] == two["seconds"]


def test_ranks_come_to_one_teacher(folder):
    """They train the baseline together, and then learn from it: the outcome is that of one process."""
    recipe = ['method = "distill"', 'method = "optimizer"\nkind = "adam"\nlr = 0.01', 'method = "train"\nepochs = 2']
    (folder / "r.toml").write_text("".join(f"[[step]]\n{one}\n" for one in recipe))
    words = ("train", "w.py", "--recipe", "r.toml", "--json")
    done = [quadriga(folder, *words, "--out", "alone"), quadriga(folder, *words, "--out", "both", "--nproc", "2")]
    assert [d.returncode for d in done] == [0, 0], done[1].stderr[-3000:]
    one, two = (json.loads(d.stdout.strip().splitlines()[-1]) for d in done)
    assert one["quality"] == two["quality"] and "trained first" in one["note"] and "trained first" in two["note"]
    kept = [sorted(p.name for p in (folder / out / "checkpoints").iterdir()) for out in ("alone", "both")]
    assert kept[0] == kept[1] and len(kept[0]) == 2, "the baseline and the recipe"


def test_bad_input_is_said_once_and_not_tried_again(folder):
    (folder / "r.toml").write_text('[[step]]\nmethod = "tensor_parallel"\n[[step]]\nmethod = "train"\nepochs = 1\n')
    done = quadriga(folder, "train", "w.py", "--recipe", "r.toml", "--nproc", "3", "--json")
    assert done.returncode == 2, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("quadriga: ")]
    assert len(said) == 1 and "needs 2 processes, or a multiple, and there are 3" in said[0]
    assert len(done.stdout.strip().splitlines()) == 1 and "3" in json.loads(done.stdout)["error"]["message"]


def test_ranks_that_made_different_workloads_do_not_train(folder):
    """The user's file goes by something that differs in each process; one voice says so, and nothing was trained."""
    (folder / "w.py").write_text(MODEL.replace("MARK =", 'Y = Y.roll(int(os.environ.get("RANK", "0")))\nMARK ='))
    done = quadriga(folder, "train", "w.py", "--out", "both", "--nproc", "2")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("another process made another workload") == 1 and "Traceback" not in done.stderr
    assert not list((folder / "both").glob("checkpoints/*"))
