"""Trackers: what they are told, and that nothing they do can harm a run."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from quadriga.core.errors import BadInput
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors, Hook
from quadriga.stages.verbs import train
from quadriga.testing import fingerprint, tiny_mlp
from quadriga.train.loop import fit
from quadriga.train.track import STEPS, Jsonl, Tracked, open_tracker, tracking

torch.set_num_threads(1)


class Kept:
    """Remembers what it is told; raises at some step, or at the end."""

    def __init__(self, fails_at=None, fails_to_close=False):
        self.told, self.fails_at, self.fails_to_close, self.closed = [], fails_at, fails_to_close, False

    def log(self, step, values):
        if self.fails_at is not None and step >= self.fails_at:
            raise OSError(28, "No space left on device")
        self.told.append((step, dict(values)))

    def close(self):
        self.closed = True
        if self.fails_to_close:
            raise RuntimeError("the server is gone")


class Looking(Hook):
    """Looks at the quality half-way."""

    interval = 0.5

    def look(self, model, look):
        look.quality()


def trained(tracker=None, **options):
    workload = tiny_mlp()
    setup = Setup.of(workload, evaluate=lambda model: 0.75)
    ramp = lambda progress: Factors(lr=1 - progress)  # noqa: E731
    setup = replace(setup, training=replace(setup.training, schedules=(ramp,), make_hooks=(lambda model: Looking(),)))
    options = {"epochs": 10, "seed": 0, **options}
    return fingerprint(setup.model), fit(setup, workload.train, tracker=tracker, **options), fingerprint(setup.model)


def test_is_told_means_of_losses_rates_and_qualities():
    """Every `STEPS` steps and at the end; the losses told of are those of the run, and the run is not another one for it."""
    tracker = Kept()
    _, outcome, mark = trained(tracker)
    assert mark == trained()[2]
    losses = [(step, v) for step, v in tracker.told if "loss" in v]
    assert [step for step, _ in losses] == [*range(STEPS, 61, STEPS)]
    assert sum(v["loss"] for _, v in losses) / 3 == pytest.approx(outcome.loss)
    assert losses[0][1]["progress"] == pytest.approx(STEPS / 60)
    assert losses[0][1]["learning_rate"] == pytest.approx(0.1 * (1 - (STEPS - 1) / 60))
    assert [(s, v) for s, v in tracker.told if "quality" in v] == [(30, {"quality": 0.75}), (60, {"quality": 0.75})]


def test_steps_of_train_steps_that_follow_one_another_are_counted_on():
    tracker = Kept()
    with tracking(tracker) as tracked:
        trained(epochs=5)
        trained(epochs=5)
        tracked.log(0, {"quality": 1.0})
    assert [s for s, v in tracker.told if "loss" in v] == [20, 30, 50, 60]
    assert tracker.told[-1] == (60, {"quality": 1.0}) and tracker.closed
    trained()
    assert len(tracker.told) == 9, "outside, nobody is told"


@pytest.mark.parametrize("tracker", [Kept(fails_at=25), Kept(fails_to_close=True), object()])
def test_a_tracker_that_fails_is_switched_off(tracker):
    with tracking(tracker) as tracked:
        _, outcome, mark = trained()
    assert mark == trained()[2] and outcome.exact
    assert "switched off" in tracked.note
    if isinstance(tracker, Kept) and tracker.fails_at:
        assert outcome.note == "the tracker Kept was switched off: OSError: [Errno 28] No space left on device"
        assert [s for s, v in tracker.told if "loss" in v] == [20]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    _, outcome, _ = trained(open_tracker("jsonl", tmp_path / "file", "a"))
    assert "Jsonl was switched off" in outcome.note


def test_lines_of_json_survive_a_torn_one(tmp_path):
    """Numbers that JSON does not know are null; a line that was cut short stays alone."""
    for step in (1, 2):
        tracker = Jsonl(tmp_path, "a")
        tracker.log(step, {"loss": 0.5 * step, "quality": float("nan")})
        tracker.close()
        with tracker.path.open("a") as file:
            file.write('{"name": "a", "st')
    lines = (tmp_path / "track.jsonl").read_text().splitlines()
    assert [json.loads(lines[k]) for k in (0, 2)] == [
        {"name": "a", "step": s, "loss": 0.5 * s, "quality": None} for s in (1, 2)
    ]
    assert lines[1] == lines[3] == '{"name": "a", "st'


def test_a_resumed_run_appends(tmp_path):
    """A run that is finished already tells nothing again."""
    for _ in range(2):
        with tracking(Jsonl(tmp_path / "track", "a")):
            trained(checkpoint=tmp_path / "checkpoint")
    steps = [json.loads(line)["step"] for line in (tmp_path / "track/track.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len(steps) == 5


def test_tensorboard_gets_the_scalars(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracking(open_tracker("tensorboard", tmp_path, "run")):
        _, outcome, _ = trained()
    read = loader.EventAccumulator(str(tmp_path / "tensorboard" / "run")).Reload()
    assert not outcome.note and sorted(read.Tags()["scalars"]) == ["learning_rate", "loss", "progress", "quality"]
    assert [e.step for e in read.Scalars("loss")] == [20, 40, 60]
    assert sum(e.value for e in read.Scalars("loss")) / 3 == pytest.approx(outcome.loss)


def test_mlflow_gets_the_metrics_without_a_network(tmp_path, monkeypatch):
    """A file of its own, unless the user names a server; no connection is made."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("socket.socket.connect", lambda *given: pytest.fail(f"connects to {given[1:]}"))
    with tracking(open_tracker("mlflow", tmp_path, "run")) as tracked:
        _, outcome, _ = trained()
    assert not outcome.note and not tracked.note
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("quadriga").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [m.step for m in history] == [20, 40, 60]
    assert sum(m.value for m in history) / 3 == pytest.approx(outcome.loss)


def test_an_mlflow_server_that_is_not_there_fails_no_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    _, outcome, mark = trained(open_tracker("mlflow", tmp_path, "run"))
    assert "MLflow was switched off" in outcome.note and mark == trained()[2]


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_a_package_that_is_absent_is_named_with_its_remedy(tmp_path, monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match=rf"pip install 'quadriga\[{kind}\]'"):
        open_tracker(kind, tmp_path, "run")


def test_the_verb_train_writes_below_its_folder(tmp_path):
    """The losses of the baseline's training, then what came out."""
    result = train(tiny_mlp(), out=tmp_path, track="jsonl")
    lines = [json.loads(line) for line in (tmp_path / "track" / "track.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [20, 40, 60, 60]
    assert result["note"] == "val has only 48 examples: candidates that differ by less than 2.1 % look alike"
    assert lines[-1]["quality"] == result["quality"] and lines[-1]["bytes"] == result["bytes"]


def test_an_unknown_tracker():
    with pytest.raises(BadInput, match="tensorboard"):
        open_tracker("tensorbord", None, "run")


def test_none_costs_nothing():
    tracked = Tracked(None)
    tracked.log(1, {"loss": 1.0})
    tracked.close()
    assert not tracked.note
