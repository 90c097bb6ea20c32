"""The main job, end to end, on models that were not written for it: verified, infeasible, killed and resumed, without data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from quadriga.testing.studies import acknowledged

MODEL = """
import torch
from torch import nn
from quadriga import Recipe, Workload, step

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 256), nn.Linear(256, 256)
        self.last = nn.Linear(256, 4)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

def splits():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9000, 32, generator=g)
    y = (x @ torch.randn(32, 4, generator=g)).argmax(1)
    return [(x[a:b], y[a:b]) for a, b in ((0, 3000), (3000, 5000), (5000, 9000))]

def workload():
    train, val, test = splits()
    baseline = Recipe((step("optimizer", kind="adam", lr=0.001), step("train", epochs=4)))
    return Workload(model=Net, train=train, val=val, test=test, name="three layers", baseline=baseline)

def finished():
    train, val, test = splits()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
    return Workload(model=model, val=val, test=test, trained=True, name="trained only")

class Branching(Net):
    def forward(self, x):
        if float(x.abs().max()) >= 0:
            return super().forward(x)
        return super().forward(-x)

def branching():
    train, val, test = splits()
    return Workload(model=Branching(), train=train, val=val, test=test, name="branching")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    (place / "mine.py").write_text(MODEL)
    return place


def command(reference, out, floor="-2pt", budget="60s"):
    return [
        sys.executable,
        "-m",
        "quadriga",
        "run",
        reference,
        "--floor",
        floor,
        "--budget",
        budget,
        "--out",
        str(out),
        "--json",
    ]


def run(folder, *words, **options):
    done = subprocess.run(command(*words, **options), cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip(), done.stderr
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def verified(folder):
    status, result, errors = run(folder, "mine.py", folder / "out", budget="90s")
    assert (status, result["status"]) == (0, "verified"), (result, errors[-2000:])
    return result


def test_the_winner_is_faster_with_an_interval_and_holds_the_floor(verified):
    winner = verified["winner"]
    assert winner["quality"]["low"] >= -2 and winner["quality"]["n"] == 4000
    eager = winner["latency_ratio"]["eager"]
    assert set(eager) == {"1", "64"} and any(r["low"] > 1 and r["verdict"] == "faster" for r in eager.values())
    assert set(winner["families"]) <= {"structure", "training", "optimizer", "hardware"} and winner["families"]
    assert verified["baseline"]["latency"]["1"] > 0 and verified["baseline"]["parameters"] == 75_268


def test_what_is_claimed_is_what_is_shipped(verified, folder):
    out = folder / "out"
    assert json.loads((out / "result.json").read_text()) == verified
    artifact = out / verified["artifact"]
    alone = subprocess.run([sys.executable, "-I", str(artifact / "load.py")], capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0 and "ok" in alone.stdout, alone
    manifest = json.loads((artifact / "manifest.json").read_text())["files"]
    entry = json.loads((artifact / "runtime.json").read_text())
    read = sum(manifest[name]["bytes"] for name in ("runtime.json", *entry["files"]))
    assert verified["winner"]["bytes_ratio"] == pytest.approx(read / verified["baseline"]["bytes"])
    evidence = json.loads((artifact / "evidence.json").read_text())
    assert evidence["winner"]["quality"] == verified["winner"]["quality"]


def test_the_record_says_that_test_was_opened_once_after_the_freeze(verified, folder):
    records = json.loads((folder / "out" / "records.json").read_text())
    assert [row["split"] for row in records["splits_opened"]] == ["test"]
    stages = [t["stage"] for t in records["trials"]]
    assert "test" not in stages[: stages.index("final")]
    assert {o["name"] for o in records["opponents"]} >= {"eager", "lossless_export"}
    page = (folder / "out" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "src=" not in page


def test_the_same_command_again_shows_the_same_result_at_once(verified, folder):
    status, again, errors = run(folder, "mine.py", folder / "out", budget="90s")
    assert (status, again) == (0, verified), errors


def test_nothing_qualifies_then_the_baseline_comes_back(folder):
    status, result, errors = run(folder, "mine.py", folder / "high", floor="+30pt", budget="40s")
    assert (status, result["status"]) == (1, "infeasible"), errors
    assert result["winner"] is None and result["artifact"] == "artifact"
    recipe = (folder / "high" / "artifact" / "recipe.toml").read_text()
    assert "adam" in recipe and "quantize" not in recipe


def test_killed_and_called_again_nothing_acknowledged_is_lost(folder):
    out = folder / "killed"
    process = subprocess.Popen(
        command("mine.py", out, budget="90s"), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(before := acknowledged(out)) < 6:
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = acknowledged(out)
    status, result, errors = run(folder, "mine.py", out, budget="90s")
    assert acknowledged(out)[: len(before)] == before
    assert (status, result["status"]) == (0, "verified"), errors[-2000:]


def test_a_trained_model_without_training_data_gets_methods_that_need_none(folder):
    status, result, errors = run(folder, "mine.py:finished", folder / "trained", budget="90s")
    assert (status, result["status"]) == (0, "verified"), errors[-2000:]
    assert result["winner"]["families"] == ["hardware"]
    records = json.loads((folder / "trained" / "records.json").read_text())
    assert any("no training data" in note for note in records["notes"])
    assert not any(s["method"] == "train" for t in records["trials"] for s in t["recipe"] if t["status"] == "complete")


def test_a_model_that_no_runtime_can_execute_ends_the_study_at_once(folder):
    """Eight minutes of search once ended as "infeasible", with the remedy in row 22 of a table."""
    status, result, errors = run(folder, "mine.py:branching", folder / "branching", budget="600s")
    assert (status, result["status"]) == (1, "infeasible"), errors[-2000:]
    assert "no runtime can execute the model" in result["reason"]
    assert "torch.where" in result["remedy"]
    assert result["artifact"] is None
    assert result["no_artifact"] == result["reason"]
    assert not (folder / "branching" / "artifact").exists()
    records = json.loads((folder / "branching" / "records.json").read_text())
    assert not [t for t in records["trials"] if t["stage"] == "search"]
    told = (folder / "branching" / "report.md").read_text()
    assert "There is no artifact" in told
