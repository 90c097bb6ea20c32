"""What is announced was loaded: an artifact is scored in a fresh process, and what differs from the announcement is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from quadriga import artifact
from quadriga.artifact.announce import Fresh, announced, apart
from quadriga.core.batch import Batch
from quadriga.core.data import TensorData
from quadriga.core.errors import BadInput
from quadriga.core.metric import METRICS, Metric
from quadriga.core.recipe import Recipe
from quadriga.core.setup import Context
from quadriga.core.slots import RuntimeSpec
from quadriga.measure.quality import score
from quadriga.measure.scores import Scores
from quadriga.runtime.standalone import Damaged

ACCURACY = METRICS["accuracy"]
HEAD = "import os, sys, time\n"


class TwoHeads(nn.Module):
    """A dict in, a dict out, as models of language have it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x, y):
        return {"logits": self.fc(x + y), "pooled": x.mean(1)}


def data(shift=0.0):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=g) + shift
    return TensorData({"x": x, "y": x.roll(1, 0)}, x.argmax(1) % 3)


def model():
    torch.manual_seed(0)
    return TwoHeads().eval()


def write(folder: Path, runtime="onnxruntime") -> Path:
    split = data()
    context = Context(split.batch(torch.arange(2)).inputs, (Batch(split.inputs, None, torch.arange(300)),), ACCURACY)
    kept = {"recipe": Recipe(), "evidence": {}, "probes_inputs": split.inputs}
    return artifact.write(folder, model(), RuntimeSpec(runtime, threads=1), context, **kept)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    return write(tmp_path_factory.mktemp("announce") / "artifact")


def test_an_artifact_that_is_what_was_measured_is_announced_at_each_batch_size(made):
    said = []
    expected = {size: score(model(), data(), ACCURACY, size) for size in (256, 100)}
    found = announced(made, data(), ACCURACY, expected, say=said.append)
    assert found.ok and found.report["ok"] and found.report["files"] == len(list(made.iterdir())) - 1
    assert found.quality == expected[256].value and set(found.scores) == {256, 100}
    assert "fresh process" in said[0] and "300 examples, 256 a call" in said[1]


def test_another_quality_than_the_artifacts_is_no_announcement(made):
    """Scoring that saw other inputs than training did: the fault that reported 11 % for a network of 86 %."""
    expected = {256: score(model(), data(shift=2.0), ACCURACY)}
    found = announced(made, data(), ACCURACY, expected)
    assert not found.ok and found.report["ok"] and found.quality == score(model(), data(), ACCURACY).value
    assert f"against {expected[256].value:.6g}" in found.problem and "predictions differ" in found.problem


def test_a_file_that_changed_is_found_before_anything_of_the_folder_runs(tmp_path):
    folder = write(tmp_path / "artifact")
    (folder / "load.py").write_text("raise SystemExit('never run')\n")
    found = announced(folder, data(), ACCURACY, {})
    assert not found.ok and not found.report["ok"] and "load.py is damaged" in found.problem and found.quality is None


@pytest.mark.parametrize(
    ("body", "timeout", "said"),
    [
        ("raise ImportError('no such runtime')", 60.0, "no such runtime"),
        ("sys.stderr.write('out of luck\\n'); sys.stderr.flush(); os._exit(3)", 60.0, "status 3: out of luck"),
        ("time.sleep(600)", 0.5, "did not end within 0.5 s"),
    ],
)
def test_a_loader_that_fails_dies_or_hangs_says_so(tmp_path, body, timeout, said):
    """With a manifest that fits: what runs is as it was written, and is wrong."""
    folder = write(tmp_path / "artifact")
    (folder / "load.py").write_text(f"{HEAD}{body}\n")
    artifact.store.write_manifest(folder)
    found = announced(folder, data(), ACCURACY, {}, timeout=timeout)
    assert not found.ok and said in found.problem


def test_what_a_model_prints_does_not_mix_with_its_answers_and_a_failing_batch_is_told(tmp_path):
    folder = write(tmp_path / "artifact")
    text = (folder / "load.py").read_text()
    (folder / "load.py").write_text(text + "\nimport os\nos.write(1, b'hello')\nprint('world', flush=True)\n")
    artifact.store.write_manifest(folder)
    batch = data().batch(torch.arange(4))
    with Fresh(folder) as run:
        torch.testing.assert_close(run(batch.inputs)["logits"], model()(**batch.inputs)["logits"].detach())
        with pytest.raises(ValueError, match="expected a dict of x, y"):
            run(batch.inputs["x"])
        with pytest.raises(Damaged, match=r"[Ii]nvalid|dimension"):
            run({"x": torch.zeros(2, 5), "y": torch.zeros(2, 5)})


def test_there_has_to_be_a_folder(tmp_path):
    with pytest.raises(BadInput, match="there is no folder"):
        announced(tmp_path / "nowhere", data(), ACCURACY, {})


def scores(values, predictions=None, outputs=None) -> Scores:
    array = None if values is None else np.asarray(values, float)
    weights = None if values is None else np.ones(len(array))
    found = None if predictions is None else np.asarray(predictions)
    return Scores(array, weights, found, 0.0 if values is None else float(array.mean()), outputs=outputs)


def test_rounding_is_forgiven_and_nothing_else():
    loss = Metric("loss", "nats", False)
    labels = np.arange(2000) % 7
    one, few = labels.copy(), labels.copy()
    one[0], few[:3] = 9, 9
    ones = np.ones(2000)
    assert not apart(scores(ones, labels), scores(ones, one), ACCURACY)
    assert "3 of 2,000 predictions differ" in apart(scores(ones, labels), scores(ones, few), ACCURACY)
    assert not apart(scores(ones), scores(ones * (1 + 5e-4)), loss)
    swapped = np.where(np.arange(2000) % 2, 1.01, 0.99)  # the mean is the same, no value is
    assert "apart" in apart(scores(ones), scores(swapped), loss)
    assert "1,999 examples against 2,000" in apart(scores(ones), scores(ones[1:]), loss)
    outputs = torch.linspace(0, 1, 20)
    assert not apart(scores(None, outputs=outputs), scores(None, outputs=outputs + 1e-5), loss)
    assert "apart" in apart(scores(None, outputs=outputs), scores(None, outputs=outputs + 0.01), loss)


def test_the_worst_batch_size_is_the_quality(made):
    good = score(model(), data(), ACCURACY)
    found = announced(made, data(), replace(ACCURACY, higher_is_better=False), {256: good, 1: good})
    assert found.quality == max(s.value for s in found.scores.values())
