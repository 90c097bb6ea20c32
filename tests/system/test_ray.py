"""The engine on a real Ray cluster of two nodes: a worker, a rank, a node and the driver are killed, and the work goes on.

Every test sees that its fault fired, and from the steps that were made that nothing finished was done again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from quadriga.testing.studies import acknowledged

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own: sockets and processes that it leaves to the system

SOURCE = Path(__file__).parents[2] / "src"
MODEL = """
import os, signal, time
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
from quadriga import Recipe, Workload, step

G = torch.Generator().manual_seed(0)
X = torch.randn(1200, 16, generator=G)
Y = (X @ torch.randn(16, 3, generator=G)).argmax(1)
HERE = Path(__file__).parent
CALLS = 0  # training steps of this process

class Net(nn.Sequential):
    def forward(self, x):
        global CALLS
        if self.training and torch.is_grad_enabled():
            CALLS += 1
            with open(HERE / "steps", "a") as file:
                file.write(f"{os.getpid()} {os.environ.get('RANK', '-')}\\n")
            time.sleep(0.02)
            if CALLS == 40:
                self.meet_fate(os.environ.get("RANK", "-"))
        return super().forward(x)

    def meet_fate(self, rank):
        told = HERE / "fate"
        if not told.exists():
            return
        what, whom = told.read_text().split()
        if whom == rank:
            told.rename(HERE / "fired")  # once
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raise":
                raise KeyError("a mistake in the model")
            time.sleep(600)

def model():
    return Net(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

def workload():
    return Workload(
        model=model, train=(X[:600], Y[:600]), val=(X[600:900], Y[600:900]), test=(X[900:], Y[900:]), name="two layers",
        batch_size=20, baseline=Recipe((step("optimizer", kind="adam", lr=0.01), *[step("train", epochs=1)] * 2)),
    )

def trained():
    return replace(workload(), trained=True, baseline=Recipe())
"""
STEPS = 30  # of each of the two train steps; the fault is in the tenth of the second one
RECIPE = [
    {"method": "optimizer", "kind": "adam", "lr": 0.01},
    {"method": "train", "epochs": 1},
    {"method": "train", "epochs": 1},
]


@pytest.fixture(scope="module")
def cluster():
    """A head of one core; nodes come and go."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=str(SOURCE))
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "w.py").write_text(MODEL)
    return tmp_path


def opened(cluster, folder, name="workload", **settings):
    """An engine on it."""
    from quadriga.engine.cluster import Cluster
    from quadriga.engine.ray import Ray

    return Ray(Cluster(cluster.address), f"{folder / 'w.py'}:{name}", folder / "out", 0, **settings)


def trained(engine, number, **more):
    """The result of one training, started and waited for."""
    from quadriga.engine.base import Order

    engine.submit(Order(number, "train", {"recipe": RECIPE, "hash": "x", "batches": [1], **more}, limit=250.0))
    return waited(engine, number)


def waited(engine, number, until=lambda: False):
    end = time.monotonic() + 250
    while time.monotonic() < end and not until():
        if (found := engine.wait(0.5)) is not None:
            assert found[0] == number
            return found[1]
    assert until(), "nothing came back"
    return None


def steps(folder, rank="-"):
    """Training steps that each process made of a rank, in order."""
    rows = [line.split() for line in (folder / "steps").read_text().splitlines()]
    return list(Counter(pid for pid, own in rows if own == rank).values())


def test_a_worker_is_killed_and_its_trial_goes_on(cluster, folder):
    (folder / "out").mkdir()
    engine = opened(cluster, folder)
    (folder / "fate").write_text("kill -")
    result = trained(engine, 1)
    (folder / "out" / "checkpoints").rename(folder / "kept")
    again = trained(engine, 2)
    engine.close()
    assert (folder / "fired").exists() and result["status"] == again["status"] == "complete", (result, again)
    assert steps(folder)[0] == STEPS + 10 and sum(steps(folder)[1:]) == STEPS + 2 * STEPS, "the first train step was kept"
    assert result["values"]["quality"] == again["values"]["quality"], "and the outcome is that of an unbroken run"


def test_a_worker_learns_from_a_model_that_comes_trained(cluster, folder):
    """Nothing is handed over: its worker makes the teacher as one process does, and comes to the same quality."""
    from quadriga.engine.tasks import Desk
    from quadriga.workloads import load

    (folder / "out").mkdir()
    recipe = [{"method": "shrink", "features": 0.5}, {"method": "distill", "alpha": 0.9}, *RECIPE]
    engine = opened(cluster, folder, "trained")
    result = trained(engine, 1, recipe=recipe)
    engine.close()
    assert result["status"] == "complete", result
    alone = Desk(load(f"{folder / 'w.py'}:trained"), folder / "alone", 0).do("train", {"recipe": recipe, "hash": "x"})
    assert alone["values"]["quality"] == result["values"]["quality"]


def test_an_error_of_the_work_is_not_tried_again(cluster, folder):
    (folder / "out").mkdir()
    engine = opened(cluster, folder)
    (folder / "fate").write_text("raise -")
    result = trained(engine, 1)
    engine.close()
    assert (folder / "fired").exists() and result["status"] == "failed" and "a mistake in the model" in result["reason"]
    assert steps(folder) == [STEPS + 10]


def test_a_rank_is_killed_and_both_go_on_with_the_losses_of_one_process(cluster, folder):
    (folder / "out").mkdir()
    node = cluster.add_node(num_cpus=1)
    engine = opened(cluster, folder, ranks=2)
    (folder / "fate").write_text("kill 1")
    result = trained(engine, 1)
    engine.close()
    cluster.remove_node(node)
    assert (folder / "fired").exists() and result["status"] == "complete", result
    for rank in ("0", "1"):
        first, second = steps(folder, rank)
        assert STEPS + 8 <= first <= STEPS + 10 and second == STEPS
    alone = subprocess.run([sys.executable, "-c", ALONE, str(folder)], capture_output=True, text=True, timeout=250, check=False)
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert float(alone.stdout) == result["values"]["quality"]


ALONE = f"""
import sys
from pathlib import Path
from quadriga.engine.tasks import Desk
from quadriga.workloads import load
folder = Path(sys.argv[1])
desk = Desk(load(str(folder / "w.py") + ":workload"), folder / "alone", 0)
print(desk.do("train", {{"recipe": {RECIPE!r}, "hash": "x"}})["values"]["quality"])
"""


def test_a_node_is_lost_and_its_trial_goes_on_elsewhere(cluster, folder):
    (folder / "out").mkdir()
    node = cluster.add_node(num_cpus=1)
    engine = opened(cluster, folder)
    (folder / "fate").write_text("sleep -")
    from quadriga.engine.base import Order

    waited(engine, 1, until=lambda: not any(p.starting for p in engine.places))  # so that there is a choice
    engine.submit(Order(1, "train", {"recipe": RECIPE, "hash": "x", "batches": [1]}, limit=250.0))
    waited(engine, 1, until=(folder / "fired").exists)
    place = next(p for p in engine.places if p.order is not None)
    assert place.machine.id == node.node_id, "trainings go to machines where nothing is timed"
    cluster.remove_node(node, allow_graceful=False)
    result = waited(engine, 1)
    engine.close()
    assert result["status"] == "complete", result
    assert steps(folder) == [STEPS + 10, STEPS]


@pytest.mark.slow
def test_the_driver_is_killed_and_the_same_command_goes_on(folder):
    """On a cluster of its own, which ends with it."""
    out = folder / "out"
    options = ["--floor", "-5pt", "--budget", "45s", "--only", "hardware", "--out", str(out), "--json"]
    words = [sys.executable, "-m", "quadriga", "run", "w.py:workload", *options, "--engine", "ray", "--address", "local"]
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "RAY_ADDRESS": ""}
    first = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(acknowledged(out)) < 4:
        assert first.poll() is None
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = acknowledged(out)
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert acknowledged(out)[: len(before)] == before
    assert done.returncode == 0 and json.loads(done.stdout)["status"] == "verified", done.stderr[-3000:]
