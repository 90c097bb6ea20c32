"""The smaller verbs through the command line: train, profile, compare, verify, report, methods, doctor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from quadriga.artifact import Announcement, Report
from quadriga.measure.latency import paired
from quadriga.stages import compare as comparison
from quadriga.stages import verbs

torch.set_num_threads(1)

MODEL = """
import torch
from torch import nn
from quadriga import Recipe, Workload, step

G = torch.Generator().manual_seed(0)
X = torch.randn(1200, 16, generator=G)
Y = (X @ torch.randn(16, 3, generator=G)).argmax(1)

def model():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

def f1(output, target):
    guess = output.argmax(1) == 0
    return 2 * float((guess & (target == 0)).sum()) / float(guess.sum() + (target == 0).sum())

def with_f1():
    return workload(f1)

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(x) if float(x.sum()) < 1e9 else self.fc(-x)

def not_exported():
    return workload(model=Branch)

def workload(metric="accuracy", model=model):
    return Workload(
        model=model, train=(X[:600], Y[:600]), val=(X[600:900], Y[600:900]), test=(X[900:], Y[900:]),
        metric=metric, name="two layers", batch_size=32,
        baseline=Recipe((step("optimizer", kind="adam", lr=0.01), step("train", epochs=3))),
    )
"""
INT8 = """
[[step]]
method = "optimizer"
kind = "adam"
lr = 0.01
[[step]]
method = "train"
epochs = 3
[[step]]
method = "quantize_int8"
activations = "weights"
[[step]]
method = "onnxruntime"
"""
SPARSE = """
[[step]]
method = "train"
baseline = true
[[step]]
method = "prune_weights"
ratio = 0.8
[[step]]
method = "onnxruntime"
"""
DISTIL = """
[[step]]
method = "shrink"
kernel = 3
features = 0.5
[[step]]
method = "distill"
[[step]]
method = "optimizer"
kind = "adam"
lr = 0.01
[[step]]
method = "train"
epochs = 2
[[step]]
method = "onnxruntime"
"""
EXPORT = INT8.replace('[[step]]\nmethod = "quantize_int8"\nactivations = "weights"\n', "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("verbs")
    (place / "mine.py").write_text(MODEL)
    (place / "int8.toml").write_text(INT8)
    (place / "sparse.toml").write_text(SPARSE)
    (place / "export.toml").write_text(EXPORT)
    return place


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Run the command line in this process; returns the JSON object and checks the status."""
    from quadriga.cli import app
    from quadriga.exits import guarded

    monkeypatch.chdir(folder)
    monkeypatch.setattr(comparison, "paired", lambda *a, **k: paired(*a, **{**k, "restarts": 2, "blocks": 3}))

    def run(*words, status=0):
        found = guarded(app, [*words, "--json"])
        captured = capsys.readouterr()
        assert found == status, captured.err
        return json.loads(captured.out.strip().splitlines()[-1])

    return run


@pytest.fixture
def trained(call, folder):
    """What `train` says of `export.toml`; trained by the first test that needs it."""
    kept = folder / "trained" / "train.json"
    return (
        json.loads(kept.read_text())
        if kept.is_file()
        else call("train", "mine.py", "--recipe", "export.toml", "--out", "trained")
    )


def test_what_train_writes_verifies(call, trained, folder):
    assert trained["status"] == "complete" and trained["metric"] == "accuracy" and trained["unit"] == "pt"
    assert trained["quality"] > 60 and trained["samples"] == 3 * 608  # whole batches of 32
    assert trained["parameters"] == 16 * 32 + 32 + 32 * 3 + 3
    artifact = folder / "trained" / trained["artifact"]
    assert call("verify", str(artifact))["ok"]
    assert (artifact / "recipe.toml").read_text().count("[[step]]") == 3
    assert json.loads((folder / "trained" / "train.json").read_text())["quality"] == trained["quality"]


def test_train_without_an_artifact_has_failed_and_says_why(call, folder):
    found = call("train", "mine.py:not_exported", "--out", "none", status=1)
    assert (found["status"], found["artifact"]) == ("failed", None) and found["quality"] > 60
    assert found["error"]["message"].startswith("there is no artifact: ")
    assert not (folder / "none" / "artifact").exists()
    assert json.loads((folder / "none" / "train.json").read_text()) == found


def test_an_artifact_that_is_not_what_was_trained_is_put_aside(call, trained, folder, monkeypatch):
    wrong = Announcement(Report(ok=True, message="", files=1, seconds=0.0), {}, 12.5, "the artifact is not what was measured")
    shutil.copytree(folder / "trained", folder / "again")
    monkeypatch.setattr(verbs, "announced", lambda *_, **__: wrong)
    found = call("train", "mine.py", "--recipe", "export.toml", "--out", "again", status=1)
    assert (found["status"], found["artifact"], found["quality"]) == ("failed", None, 12.5)
    assert found["error"]["message"] == wrong.problem and "artifact-failed" in found["error"]["remedy"]
    assert not (folder / "again" / "artifact").exists() and (folder / "again" / "artifact-failed" / "load.py").is_file()


def test_a_training_that_breaks_has_failed_and_a_recipe_that_does_not_fit_is_bad_input(call, folder):
    (folder / "high.toml").write_text(EXPORT.replace("lr = 0.01", "lr = 1e30"))
    (folder / "heads.toml").write_text('[[step]]\nmethod = "prune_heads"\n' + EXPORT)
    assert "diverged" in call("train", "mine.py", "--recipe", "high.toml", "--out", "high", status=1)["error"]["message"]
    assert "refused" in call("train", "mine.py", "--recipe", "heads.toml", "--out", "heads", status=2)["error"]["message"]


def test_what_a_recipe_is_refused_for_is_said_before_anything_is_trained(call, folder):
    """By a trait, by a layer, by the export; behind a train step too, and with a remedy each time."""
    bad = {
        "heads": '[[step]]\nmethod = "prune_heads"\n' + EXPORT,
        "flip": '[[step]]\nmethod = "flip"\n' + EXPORT,
        "late": INT8 + '[[step]]\nmethod = "prune_weights"\n',
        "again": EXPORT.replace("epochs = 3", "epochs = 3\ncontinue = true"),
    }
    step = {"heads": "prune_heads()", "flip": "flip()", "late": "prune_weights()", "again": "train(epochs=3, continue=True)"}
    for name in ("heads", "flip", "late", "again"):
        (folder / f"{name}.toml").write_text(bad[name])
        for words in (("train", "mine.py", "--recipe", f"{name}.toml"), ("compare", f"{name}.toml", "mine.py")):
            said = call(*words, "--out", f"refused-{name}-{words[0]}", status=2)["error"]
            assert f"before anything was trained: refused at {step[name]}: " in said["message"] and said["remedy"]
        assert not [p for of in folder.glob(f"refused-{name}-*") for p in of.rglob("*.safetensors")]


def test_who_is_to_learn_from_the_baseline_has_it_trained_first(call, folder):
    """From fresh weights there is no teacher yet: it is trained, kept, and told of; its cost is not the recipe's."""
    (folder / "distil.toml").write_text(DISTIL)
    found = call("train", "mine.py", "--recipe", "distil.toml", "--out", "taught")
    assert found["status"] == "complete" and found["samples"] == 2 * 608
    assert "distill learns from the baseline, so that is trained first" in found["note"]
    assert "shrink(kernel=3, features=0.5) passed over what does not apply: " in found["note"]
    kept = sorted(p.name for p in (folder / "taught" / "checkpoints").iterdir())
    call("train", "mine.py", "--out", "taught")  # the baseline itself: it is there
    assert len(kept) == 2 and sorted(p.name for p in (folder / "taught" / "checkpoints").iterdir()) == kept


def test_a_recipe_for_trained_models_has_the_baseline_trained_first(call, folder):
    """`train` and `run` carry out the same recipe: one that only exports exports the trained baseline."""
    (folder / "only.toml").write_text('[[step]]\nmethod = "onnxruntime"\n')
    found = call("train", "mine.py", "--recipe", "only.toml", "--out", "only")
    assert [s["method"] for s in found["recipe"]] == ["optimizer", "train", "onnxruntime"] and found["quality"] > 60
    assert "the baseline's training is carried out in front of it" in found["note"]


def test_what_was_to_act_only_where_it_pays_is_left_out(call, folder, monkeypatch):
    from quadriga.engine.tasks import Desk

    monkeypatch.setattr(Desk, "_step_seconds", lambda self, setups: [1.0] * len(setups))
    (folder / "half.toml").write_text('[[step]]\nmethod = "mixed_precision"\n' + EXPORT)
    found = call("train", "mine.py", "--recipe", "half.toml", "--out", "half")
    left = {s["method"] for s in found["recipe"]}
    assert found["status"] == "complete" and "mixed_precision" not in left
    assert "mixed_precision() is left out: " in found["note"] and len(list((folder / "half" / "checkpoints").iterdir())) == 1


def test_train_again_trains_nothing(call, trained, folder):
    kept = {p: p.stat().st_mtime_ns for p in (folder / "trained" / "checkpoints").rglob("*") if p.is_file()}
    assert kept and call("train", "mine.py", "--recipe", "export.toml", "--out", "trained") == trained
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_one_changed_byte_is_found(call, trained, folder):
    shutil.copytree(folder / "trained" / "artifact", folder / "damaged")
    model = folder / "damaged" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    found = call("verify", "damaged", status=1)
    assert not found["ok"] and "model.onnx" in found["message"]


def test_verify_needs_a_folder(call):
    assert "nowhere" in call("verify", "nowhere", status=2)["error"]["message"]


def test_the_baseline_against_a_recipe(call):
    found = call("compare", "mine.py", "int8.toml", "--batch", "1", "--batch", "32")
    structure(found, {"1", "32"})
    assert found["bytes_ratio"] == found["bytes"]["b"] / found["bytes"]["a"]
    assert abs(found["quality"]["difference"]) < 2  # int8 weights change little, and it is the very same training
    assert found["quality"]["baseline"] > 60 and found["fakes"] == []


def test_a_metric_of_the_whole_split_is_bootstrapped_and_zeros_are_unmasked(call):
    found = call("compare", "mine.py:with_f1", "sparse.toml", "--batch", "4")
    structure(found, {"4"})
    assert len(found["fakes"]) == 1 and found["fakes"][0].startswith("zeros (") and "in onnxruntime" in found["fakes"][0]
    assert "% smaller" in found["fakes"][0] or "% larger" in found["fakes"][0]
    quality = found["quality"]
    assert quality["metric"] == "f1" and "BCa" in quality["method"] and 0 < quality["value"] <= 1
    assert quality["low"] <= quality["difference"] <= 1


def test_an_artifact_against_itself_and_its_own_onnx_file(call, trained, folder):
    shutil.copytree(folder / "trained" / "artifact", folder / "twin", dirs_exist_ok=True)
    onnx = folder / "trained" / "artifact" / "model.onnx"
    for other in ("twin", str(onnx)):
        found = call("compare", "trained/artifact", other, "--workload", "mine.py", "--batch", "8")
        structure(found, {"8"})
        assert found["quality"]["difference"] == 0 and found["quality"]["disagreement"] == 0
        assert found["quality"]["low"] <= 0 and found["bytes_ratio"] == pytest.approx(1, abs=0.05)


def structure(found, batches):
    """What every comparison holds; the times themselves are the machine's."""
    assert found["status"] == "complete" and found["split"] == "test" and found["quality"]["n"] == 300
    assert set(found["latency_ratio"]) == set(found["latency"]) == batches
    for batch, ratio in found["latency_ratio"].items():
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
        assert ratio["verdict"] in ("faster", "slower", "equivalent", "undecided", "unmeasured")
        assert set(found["latency"][batch]) == {"a", "b"} and min(found["latency"][batch].values()) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mine.py", "nowhere"), "no workload, recipe, artifact"),
        (("trained", "int8.toml"), "--workload"),
        (("mine.py", "none.onnx"), "none.onnx"),
        (("mine.py", "empty"), "empty"),
        (("mine.py", "broken.onnx"), "broken.onnx"),
        (("mine.py", "mine.py", "--batch", "0"), "0"),
    ],
)
def test_sides_that_are_none(call, folder, words, said):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "trained").mkdir(exist_ok=True)
    (folder / "broken.onnx").write_bytes(b"not a protobuf")
    error = call("compare", *words, status=2)["error"]
    assert said in error["message"] + error["remedy"]


def test_profile_accounts_for_the_parameters_and_the_flops(call, folder):
    found = call("profile", "mine.py", "--batch", "4")
    layers = {row["layer"]: row for row in found["layers"]}
    assert found["batch"] == 4 and {"0", "1", "2"} < set(layers)
    assert sum(row["parameters"] for row in layers.values()) == 16 * 32 + 32 + 32 * 3 + 3
    assert layers["0"]["flops"] == 2 * 4 * 16 * 32 and layers["2"]["flops"] == 2 * 4 * 32 * 3
    limits = found["ceilings"]
    assert min(limits["flops"], limits["bytes"]) > 0 and set(limits["products"]) == {"default", "fp32", "bf16", "int8"}
    assert {b["family"] for b in found["bounds"]} == {"structure", "training", "optimizer", "hardware"}
    assert sum(row["share"] for row in layers.values()) == pytest.approx(1, abs=0.2)
    page = call("profile", "mine.py", "--batch", "1", "--out", "where")["report"]
    assert (folder / "where" / page).read_text(encoding="utf-8").count("<figure>") == 1
    assert "0" in call("profile", "mine.py", "--batch", "0", status=2)["error"]["message"]


def test_methods_lists_a_row_a_method(call):
    rows = call("methods")
    assert len({r["name"] for r in rows}) == len(rows) >= 18
    for row in rows:
        assert row["family"] in ("structure", "training", "optimizer", "hardware")
        assert row["numerics"] in ("exact", "close", "changed")
        assert len(row["source"]) > 5 and row["about"]


def test_doctor_finds_what_is_needed(call):
    found = call("doctor")
    checks = {row["check"]: row for row in found["checks"]}
    assert found["ok"] and checks["python"]["ok"] and checks["runtime eager"]["ok"]
    assert all(row["remedy"] for row in checks.values() if not row["ok"])


def test_report_is_written_again_from_the_records(call, folder, records):
    place = folder / "study"
    place.mkdir()
    (place / "records.json").write_text(json.dumps(records))
    written = [Path(p) for p in call("report", "study")["written"]]
    assert {p.suffix for p in written} >= {".html", ".md"}
    pages = {p: p.read_bytes() for p in written}
    assert call("report", "study") and {p: p.read_bytes() for p in written} == pages
    assert "records.json" in call("report", "nowhere", status=2)["error"]["message"]
