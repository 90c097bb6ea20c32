"""An artifact is written whole, checks itself, names what is damaged, and runs where Quadriga is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quadriga import artifact, runtime
from quadriga.artifact import store
from quadriga.artifact.card import escape
from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput
from quadriga.core.metric import accuracy
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Context
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime.standalone import Damaged

RECIPE = Recipe((step("shrink", kernel=3), step("train", epochs=2), step("onnxruntime")), "small")
EVIL = '</script><script>alert(1)</script> | "x": {y} \n# `z`'
WINNER = {
    "quality": {
        "metric": "accuracy",
        "unit": "pt",
        "value": 88.1,
        "baseline": 87.9,
        "difference": 0.2,
        "low": -0.1,
        "n": 10000,
        "disagreement": 0.05,
    },
    "latency_ratio": {"eager": {"1": {"value": 7.123, "low": 6.9, "high": 7.4, "verdict": "faster"}}},
    "bytes_ratio": 0.155,
}
BLOCKER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "quadriga":
            raise ImportError("quadriga is blocked")
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
import torch
import load
torch.save(load.load()(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
try:
    import quadriga
except ImportError:
    print("blocked")
"""


def model_and_context():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.randn(70, 1, 8, 8)
    return model, Context(x[:2], (Batch(x, None, torch.arange(70)),), accuracy), x


def make(folder, name="onnxruntime", **extra):
    model, context, x = model_and_context()
    spec = RuntimeSpec(name, threads=1)
    rest = {"recipe": RECIPE, "evidence": {"seed": 0}, "probes_inputs": x, "card": {"title": EVIL, "winner": WINNER}, **extra}
    return artifact.write(folder, model, spec, context, **rest)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name) / "artifact", name) for name in ("eager", "onnxruntime")}


@pytest.fixture(params=["eager", "onnxruntime"])
def folder(request, made, tmp_path):
    return Path(shutil.copytree(made[request.param], tmp_path / "artifact"))


def test_the_folder_is_complete_and_verifies_in_a_fresh_process(folder):
    names = {p.name for p in folder.iterdir()}
    models = {"model.onnx"} if (folder / "model.onnx").exists() else {"program.py", "weights.safetensors"}
    assert names == models | {
        "load.py",
        "runtime.json",
        "recipe.toml",
        "evidence.json",
        "probes.safetensors",
        "manifest.json",
        "README.md",
    }
    report = artifact.verify(folder)
    assert report["ok"], report["message"]
    assert report["message"].startswith("ok: ")
    assert report["files"] == len(names) - 1
    assert Recipe.load(folder / "recipe.toml") == RECIPE


def test_it_runs_where_quadriga_cannot_be_imported(folder, tmp_path):
    model, _, x = model_and_context()
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", BLOCKER, str(folder), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=False)
    assert done.stdout.split() == ["blocked"], done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_one_wrong_byte_in_any_file_is_found_and_the_file_is_named(folder):
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for place in {0, len(good) // 2, len(good) - 1}:
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bytes(bad))
            with pytest.raises(Damaged, match=r"is damaged|not a plain file|is missing") as error:
                artifact.load(folder)
            if path.name != "manifest.json":  # a manifest that was changed may name another file
                assert path.name in str(error.value)
            report = artifact.verify(folder)
            assert not report["ok"]
        path.write_bytes(good)
    artifact.load(folder)


def test_a_damaged_artifact_ends_its_own_check_with_status_1(folder):
    path = folder / ("model.onnx" if (folder / "model.onnx").exists() else "weights.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))
    done = subprocess.run([sys.executable, folder / "load.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (
        1,
        f"FAILED: {path.name} is damaged: its size or SHA-256 differs from manifest.json\n",
    )


def test_changed_weights_with_a_fitting_manifest_are_found_by_the_probes(folder):
    if (folder / "model.onnx").exists():
        import onnx
        from onnx import numpy_helper

        proto = onnx.load(folder / "model.onnx")
        weight = next(t for t in proto.graph.initializer if t.name == "3.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
        onnx.save(proto, folder / "model.onnx")
    else:
        from safetensors.torch import save_file

        weights = load_file(folder / "weights.safetensors")
        save_file({**weights, "3.weight": weights["3.weight"] * 1.01}, folder / "weights.safetensors")
    store.write_manifest(folder)
    report = artifact.verify(folder)
    assert not report["ok"]
    assert "probes.safetensors differ" in report["message"]


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "", ".hidden", "x\n", "a\0b"])
def test_names_that_leave_the_folder_are_refused(name, folder):
    (folder.parent / "secret").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    report = artifact.verify(folder)
    assert not report["ok"]
    assert "not a plain file of this folder" in report["message"]


def test_links_and_missing_files_are_refused(folder):
    target = folder.parent / "elsewhere"
    (folder / "recipe.toml").rename(target)
    assert "recipe.toml is missing" in artifact.verify(folder)["message"]
    (folder / "recipe.toml").symlink_to(target)
    assert "not a plain file" in artifact.verify(folder)["message"]
    (folder / "manifest.json").unlink()
    assert "manifest.json is missing" in artifact.verify(folder)["message"]


def test_probes_hold_64_inputs_and_what_the_runtime_gave(folder):
    probes = load_file(folder / "probes.safetensors")
    _, _, x = model_and_context()
    assert torch.equal(probes["input.0"], x[:64])
    assert torch.equal(probes["output.0"], artifact.load(folder)(x[:64]))


def test_bytes_are_those_of_the_files_that_run(folder):
    entry = json.loads((folder / "runtime.json").read_text())
    assert artifact.bytes_of(folder) == sum((folder / name).stat().st_size for name in ("runtime.json", *entry["files"]))


def test_an_older_artifact_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    folder = make(tmp_path / "a", "eager")
    before = (folder / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_manifest", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(BadInput, match="No space left on device"):
            make(folder, "eager", evidence={"seed": 1})
    assert (folder / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # nothing is left over
    os.rename(folder, tmp_path / ".a.old")  # as after a death between the two renames
    assert artifact.verify(folder)["ok"]
    make(folder, "eager", evidence={"seed": 1})
    assert json.loads((folder / "evidence.json").read_text()) == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_another_folder_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(BadInput, match="is not an artifact"):
        make(tmp_path / "mine", "eager")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_what_was_built_before_is_copied(tmp_path):
    model, context, x = model_and_context()
    built = runtime.build(model, RuntimeSpec("eager", threads=1), context, tmp_path / "built")
    folder = make(tmp_path / "a", "eager", built=built)
    for name in built.files:
        assert (folder / name).read_bytes() == (built.folder / name).read_bytes()
    torch.testing.assert_close(artifact.load(folder)(x), model(x).detach())


def test_the_card_is_escaped_and_complete(folder):
    card = (folder / "README.md").read_text()
    head, body = card.split("---\n")[1:3]
    assert "<script" not in body
    assert json.loads(head.splitlines()[1].partition(": ")[2]) == EVIL  # JSON strings are YAML strings
    for words in ("7.123", "6.9 to 7.4", "faster", "88.1", "0.155 of the baseline", "from load import load", "not a signature"):
        assert words in body
    assert escape(EVIL).count("\n") == 0


def test_the_card_tells_machine_command_memory_and_training(tmp_path):
    costs = {"memory_ratio": 0.81, "train_cost": {"samples": 0.67, "seconds": 0.5, "flops": 0.21}}
    winner = {**WINNER, **costs, "quality": {**WINNER["quality"], "certificate": 5.52}}
    told = {"command": "quadriga run x\n```\n# out", "seed": 3, "machine": {"processor": "AMD EPYC", "cores": 2}}
    card = {"title": "lenet", "winner": winner, "baseline": {"bytes": 249258}, "limits": ["known for 10,000 images"], **told}
    body = (make(tmp_path / "a", "eager", card=card) / "README.md").read_text()
    for words in ("AMD EPYC, 2 cores", "0.81 of the baseline", "training FLOPs: 0.21", "5 %", "at most 5.52 pt", "249258"):
        assert words in body
    assert "eager PyTorch" in body and "- known for 10,000 images" in body
    assert "````\nquadriga run x ``` # out\n````" in body  # what was typed cannot end its block
