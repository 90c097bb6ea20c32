"""What is announced was loaded: the artifact as it lies on disk, in a fresh process, scored as its user would score it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from quadriga.artifact import _serve
from quadriga.artifact.check import Report
from quadriga.artifact.store import recover
from quadriga.core.batch import Tree, tensors
from quadriga.core.data import Data
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric
from quadriga.measure.quality import score
from quadriga.measure.scores import Scores
from quadriga.runtime import standalone
from quadriga.runtime.standalone import Damaged

BATCH = 256  # examples a call, as in `Desk`: where int8 ranges are those of a batch, another size gives other outputs
ROUNDING = 1e-3  # the share of predictions, or of the values' sum, by which two processes may differ
PATIENCE = 600.0  # seconds that loading may take, or one batch
Say = Callable[[str], None]


@dataclass(frozen=True)
class Announcement:
    """What an artifact proved to be.

    Args:
        report: as of `artifact.verify`: whether its files and its outputs are as recorded.
        scores: batch size → what it reached on the split, called with so many examples; empty where it could not be loaded.
        quality: the worst of these, in the metric's unit; None where there is none.
        problem: why it must not be announced; "" where all is well.
    """

    report: Report
    scores: Mapping[int, Scores] = field(default_factory=dict)
    quality: float | None = None
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether it may be announced."""
        return not self.problem


def announced(
    folder: str | Path,
    data: Data,
    metric: Metric,
    expected: Mapping[int, Scores],
    *,
    say: Say = lambda text: None,
    timeout: float = PATIENCE,
) -> Announcement:
    """Load an artifact in a fresh process by its own `load.py`, verify it, score it, and compare with what was measured before.

    The process that loads it knows nothing of Quadriga: inputs go there and outputs come back as tensors, batch by batch. So it
    works for every workload, those that no other process can make too.

    Args:
        folder: of the artifact.
        data: the split to score it on.
        metric: of the workload.
        expected: batch size → the scores on this split that are about to be announced, called with so many examples.
        say: called with a line for people.
        timeout: seconds that loading may take, or one batch.

    Returns:
        The scores, and the problem where there is one; it never raises because of what is in the folder.

    Raises:
        BadInput: there is no such folder, or the metric fails.
    """
    start, folder = time.monotonic(), Path(os.path.abspath(folder))
    recover(folder)
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}", "give the folder of an artifact")
    files, scores = 0, {}
    say(f"loading the artifact in a fresh process, by its own load.py (at most {timeout:g} s)")
    try:
        standalone.inside(folder, "manifest.json")
        files = standalone.check_files(folder)
        with Fresh(folder, timeout) as run:
            for size in expected:
                say(f"scoring the artifact on {len(data):,} examples, {size} a call")
                scores[size] = score(run, data, metric, size)
    except (Damaged, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        report = Report(ok=False, message=str(error), files=files, seconds=time.monotonic() - start)
        return Announcement(report, problem=f"the artifact that was written fails its own check: {error}")
    told = f"ok: {files} files as in manifest.json; loaded, verified and scored in a fresh process"
    report = Report(ok=True, message=told, files=files, seconds=time.monotonic() - start)
    quality = min((s.value for s in scores.values()), key=lambda value: metric.gain(value, 0.0))
    gaps = (apart(before, scores[size], metric) for size, before in expected.items())
    problem = next((f"the artifact is not what was measured: {gap}" for gap in gaps if gap), "")
    return Announcement(report, scores, quality, problem)


def apart(before: Scores, after: Scores, metric: Metric) -> str:
    """How two scores of what should be one model differ by more than rounding, for people; "" where they do not.

    Where a metric has predictions, one of a thousand may differ, and one in any case; else the values by a thousandth of
    their sum, added without their signs; for a set metric the outputs by a thousandth of the largest.
    """
    if len(before) != len(after):
        return f"{len(after):,} examples against {len(before):,}"
    told = f"{metric.name} {after.value:.6g} {metric.unit}".rstrip() + f" against {before.value:.6g}"
    if before.predictions is not None and after.predictions is not None:
        other = int((before.predictions != after.predictions).sum())
        return f"{told}; {other:,} of {len(after):,} predictions differ" if other > max(1, ROUNDING * len(after)) else ""
    if before.values is not None and after.values is not None and before.weights is not None:
        gap = float((before.weights * np.abs(before.values - after.values)).sum())
        size = float((before.weights * np.maximum(np.abs(before.values), np.abs(after.values))).sum())
    else:
        pairs = list(zip(tensors(before.outputs), tensors(after.outputs), strict=True))
        gap, size = max((standalone.difference(a, b) for a, b in pairs), default=0.0), 1.0
    return f"{told}; {gap / size:.2g} apart" if gap > ROUNDING * size else ""


class Fresh:
    """An artifact in a process that runs its `load.py` and nothing else; called like the model, inputs tree → outputs tree.

    Args:
        folder: of the artifact.
        timeout: seconds that loading may take, or one call.

    Raises:
        Damaged: it could not be loaded, failed, or did not answer in time.
        ValueError: the inputs have another structure than the model was exported with.
    """

    def __init__(self, folder: Path, timeout: float = PATIENCE) -> None:
        self.folder, self.timeout, self.entry = folder, timeout, standalone.read_entry(folder)
        self._stack = ExitStack()
        self._errors: IO[bytes]
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        command, pipe = [sys.executable, "-P", "-B", _serve.__file__, str(self.folder)], subprocess.PIPE
        with ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, cwd=self.folder)
            stack.callback(self._end)
            self._answer("load.py did not end")
            self._stack = stack.pop_all()  # all is well: what was opened stays open until the end
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was not sent has nobody to go to
                pipe.close()

    def __call__(self, inputs: Tree) -> Tree:
        assert self._process.stdin is not None
        leaves = standalone.flatten(self.entry["inputs"], inputs)
        with suppress(BrokenPipeError):  # it has said why, or died
            _serve.send(self._process.stdin, leaves)
        return standalone.rebuild(self.entry["outputs"], self._answer("a batch was not answered"))

    def _answer(self, late: str) -> list[Any]:
        """The next frame's tensors."""
        assert self._process.stdout is not None
        watch = threading.Timer(self.timeout, self._process.kill)
        watch.start()
        try:
            found = _serve.receive(self._process.stdout)
        finally:
            on_time = watch.is_alive()
            watch.cancel()
        if found is None and not on_time:
            raise Damaged(f"{late} within {self.timeout:g} s")
        if not isinstance(found, list):
            raise Damaged(found.removeprefix("Damaged: ") if found else self._last_words())
        return found

    def _last_words(self) -> str:
        """What a process that died without a word of its own left on its standard error."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the process that loaded it ended with status {status}{f': {lines[-1]}' if lines else ''}"
