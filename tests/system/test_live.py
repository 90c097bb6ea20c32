"""Live models from a script or a notebook: no other process can rebuild them, and the caller's objects are kept as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = """
import json, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import quadriga
from quadriga import Recipe, Workload, step

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
X = torch.randn(6000, 32, generator=G)
Y = (X @ torch.randn(32, 4, generator=G)).argmax(1)
PARTS = [TensorDataset(X[a:b], Y[a:b]) for a, b in ((0, 2000), (2000, 3500), (3500, 6000))]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 256), nn.Linear(256, 256), nn.Linear(256, 4)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

torch.manual_seed(0)
model = Net()
before = {k: v.clone() for k, v in model.state_dict().items()}
baseline = Recipe((step("optimizer", kind="adam", lr=0.001), step("train", epochs=4)))
"""
LOADERS = """
def loss(output, target):  # one number: methods that weigh or soften single examples cannot be used
    return nn.functional.cross_entropy(output, target)

def right(output, target):
    return (output.argmax(1) == target).double()

train, val, test = (DataLoader(p, batch_size=50, shuffle=p is PARTS[0]) for p in PARTS)
workload = Workload(model=model, train=train, val=val, test=test, loss=loss, metric=right, name="live", baseline=baseline)
options = {"budget": "45s", "families": ("training", "hardware"), "quiet": True}
result = quadriga.optimize(workload, floor="-3%rel", out=sys.argv[1], **options)
"""
WHOLE = """
def macro_f1(output, target):
    guess = output.argmax(1)
    scores = []
    for c in range(4):
        hit = float(((guess == c) & (target == c)).sum())
        scores.append(2 * hit / max(float((guess == c).sum() + (target == c).sum()), 1.0))
    return sum(scores) / 4

train, val, test = (p.tensors for p in PARTS)
workload = Workload(model=model, train=train, val=val, test=test, metric=macro_f1, name="live f1", baseline=baseline)
result = quadriga.optimize(workload, floor="-5%rel", budget="45s", families=("hardware",), out=sys.argv[1], quiet=True)
"""
END = """
assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the caller's model was changed"
assert torch.get_num_threads() == 1 and model.training
print(json.dumps(result))
"""


def study(folder: Path, body: str):
    script = folder / "script.py"
    script.write_text(COMMON + body + END)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder / "out")],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), json.loads((folder / "out" / "records.json").read_text()), folder


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    return study(tmp_path_factory.mktemp("loaders"), LOADERS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return study(tmp_path_factory.mktemp("whole"), WHOLE)


def test_a_live_model_is_optimized_in_the_callers_process(loaders):
    result, records, folder = loaders
    assert result["status"] == "verified", result
    assert any("live object" in note for note in records["notes"])
    quality = result["winner"]["quality"]
    assert quality["metric"] == "right" and quality["n"] == 2500
    assert quality["low"] >= -0.03 * quality["baseline"] and 0 < quality["value"] <= 1
    alone = subprocess.run(
        [sys.executable, "-I", str(folder / "out" / result["artifact"] / "load.py")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert alone.returncode == 0 and "ok" in alone.stdout, alone


def test_its_opponents_are_timed_all_the_same(loaders):
    result, records, _ = loaders
    ratios = result["winner"]["latency_ratio"]
    assert set(ratios) >= {"eager", "lossless_export"}
    assert all(set(r) == {"1", "64"} for r in ratios.values())
    assert any(r["verdict"] == "faster" for r in ratios["eager"].values())
    assert {o["name"] for o in records["opponents"]} >= {"eager", "lossless_export"}


def test_a_scalar_loss_loses_the_methods_that_need_more_with_the_reason(loaders):
    _, records, _ = loaders
    notes = records["notes"]
    assert any("PER_EXAMPLE_LOSS" in n and "label_smoothing" in n and "one value per example" in n for n in notes), notes
    assert not any(
        s["method"] == "label_smoothing" for t in records["trials"] for s in t["recipe"] if t["status"] == "complete"
    )
    assert all(t["status"] in ("complete", "refused", "timed_out") for t in records["trials"]), "nothing crashed"


@pytest.mark.slow
def test_a_metric_of_the_whole_split_is_bootstrapped(whole):
    result, records, _ = whole
    assert result["status"] in ("verified", "infeasible")
    assert all(t["status"] in ("complete", "refused", "timed_out") for t in records["trials"]), "nothing crashed"
    shown = result["winner"] or result["nearest_miss"]
    assert shown["quality"]["metric"] == "macro_f1" and shown["quality"]["n"] == 2500
    assert shown["quality"]["low"] <= shown["quality"]["difference"]
    if result["winner"]:
        assert shown["quality"]["low"] >= -0.05 * shown["quality"]["baseline"]
