"""Trackers: where the course of a training is written for others to watch. One that fails is switched off, never the run."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quadriga.core.errors import BadInput, did_you_mean

if TYPE_CHECKING:
    from quadriga.train.run import Run

STEPS = 20  # between entries, at least: they are made when losses have been read anyway


class Tracker(Protocol):
    """Takes numbers by name, step after step. Whatever it raises switches it off."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracked:
    """A tracker that cannot do harm, or none; the steps of train steps that follow one another are counted on.

    Attributes:
        note: why the tracker was switched off, for people.
    """

    def __init__(self, tracker: Tracker | None) -> None:
        self.tracker, self.note = tracker, ""
        self._before = self._told = 0  # steps of earlier train steps; step of this one that was told of last

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on the values of a step of this train step."""
        if self.tracker is not None:
            self._guarded("log", self._before + step, {k: float(v) for k, v in values.items()})

    def tell(self, run: Run) -> None:
        """Loss, rate and progress, if `STEPS` steps are over and their losses were read, or all are over."""
        if self.tracker is None or run.watch.pending:
            return
        self._told = min(self._told, run.done)  # a run that went back is told of again
        new = run.done - self._told
        if new >= STEPS or (new and run.finished):
            losses = list(run.watch.recent)[-new:]
            self.log(run.done, {"loss": sum(losses) / len(losses), "learning_rate": run.rate, "progress": run.progress})
            self._told = run.done

    def passed(self, steps: int) -> None:
        """A train step of so many steps is over."""
        self._before, self._told = self._before + steps, 0

    def close(self) -> None:
        """Let the tracker finish; after that it is gone."""
        if self.tracker is not None:
            self._guarded("close")
            self.tracker = None

    def _guarded(self, name: str, *given: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other people's packages about one another
                getattr(self.tracker, name)(*given)
        except Exception as error:  # a full disk or a missing server is no reason to stop training
            self.note = f"the tracker {type(self.tracker).__name__} was switched off: {type(error).__name__}: {error}"
            self.tracker = None


_ambient: ContextVar[Tracked | None] = ContextVar("tracked", default=None)


@contextmanager
def tracking(tracker: Tracker | None) -> Iterator[Tracked]:
    """Every `fit` inside that has no tracker of its own writes to this one, which is closed afterwards."""
    tracked = Tracked(tracker)
    token = _ambient.set(tracked)
    try:
        yield tracked
    finally:
        _ambient.reset(token)
        tracked.close()


def current(tracker: Tracker | None) -> Tracked:
    """The tracker of a train step: its own, else that of `tracking`, else none."""
    return Tracked(tracker) if tracker is not None else _ambient.get() or Tracked(None)


def open_tracker(kind: str, folder: Path, name: str) -> Tracker:
    """A tracker by name; it makes its files, or reaches its server, with the first entry.

    Args:
        kind: "jsonl", "tensorboard" or "mlflow".
        folder: for its files.
        name: of the training.

    Raises:
        BadInput: there is no such tracker, or its package is not installed.
    """
    if kind not in TRACKERS:
        raise BadInput(f'there is no tracker "{kind}"', did_you_mean(kind, TRACKERS))
    return TRACKERS[kind](folder, name)


class Jsonl:
    """Lines of JSON, appended to track.jsonl; of two lines for one step, after a resumption, the later one counts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / "track.jsonl", name
        self._file: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        kept = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"name": self.name, "step": step, **kept})
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
                line = "\n" + line  # a line that a power cut tore stays alone
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoard:
    """Event files for `tensorboard --logdir`, in the folder tensorboard."""

    def __init__(self, folder: Path, name: str) -> None:
        self._make = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.folder, self.name = folder / "tensorboard" / name, name
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make(str(self.folder), flush_secs=10)
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """A run in an MLflow store: the SQLite file mlflow.db, or the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, folder: Path, name: str) -> None:
        for key, value in QUIET.items():
            os.environ.setdefault(key, value)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._mlflow, self.folder, self.name = _package("mlflow", "mlflow"), folder, name
        self._client: Any = None
        self._run = ""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._client is None:
            self._begin()
        metric, now = self._mlflow.entities.Metric, int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[metric(key, value, now, step) for key, value in values.items()])

    def _begin(self) -> None:
        uri = None if os.environ.get("MLFLOW_TRACKING_URI") else f"sqlite:///{self.folder.resolve() / 'mlflow.db'}"
        if uri:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._client = client = self._mlflow.MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name("quadriga")
        place = (self.folder.resolve() / "mlflow").as_uri() if uri else None
        number = known.experiment_id if known else client.create_experiment("quadriga", artifact_location=place)
        self._run = client.create_run(number, run_name=self.name).info.run_id

    def close(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run)


# no reports to MLflow's makers; a server that does not answer holds a training up for seconds, not for minutes
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
TRACKERS: dict[str, type[Jsonl] | type[TensorBoard] | type[MLflow]] = {
    "jsonl": Jsonl, "tensorboard": TensorBoard, "mlflow": MLflow,
}  # fmt: skip


def _package(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise BadInput(f"{extra} cannot be imported: {error}", f"pip install 'quadriga[{extra}]'") from error
