"""Processes that help with one train step: started together, watched, and never left behind."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

import torch.multiprocessing

from quadriga.core.errors import BadInput, Diverged, NotApplicable
from quadriga.core.parent import die_with_parent

LAST = 30.0  # seconds that a worker which has said its last word may take to end
PATIENCE = 1800.0  # seconds that a worker may be in one step; then it is taken for one that hangs
Work = Callable[[int, Any], None]  # (rank, job); in a process of its own
OURS = {kind.__name__: kind for kind in (BadInput, Diverged, NotApplicable, MemoryError)}


class WorkerFailed(RuntimeError):
    """A worker of a train step raised something, or its process ended. A checkpoint of the step stands as it was saved."""


class Crew:
    """Ranks 1 to `workers` - 1, each a fresh process; rank 0 is the caller.

    Args:
        workers: with the caller.
        work: what each does; a function of a module, since its name crosses the border.
        job: given to each. Tensors in it are shared, not copied.

    Raises:
        NotApplicable: the job cannot cross the border of a process.
    """

    def __init__(self, workers: int, work: Work, job: Any) -> None:
        context = torch.multiprocessing.get_context("spawn")  # a fork would inherit locks of threads that it does not have
        self.workers = workers
        self.processes: dict[Any, tuple[int, Any]] = {}  # what to listen at → rank, process
        try:
            for rank in range(1, workers):
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=begin, args=(os.getpid(), there, work, rank, job), daemon=True)
                try:
                    process.start()
                finally:
                    there.close()
                self.processes[here] = (rank, process)
        except Exception as error:
            self.kill()
            raise NotApplicable(f"a worker process cannot be given the train step: {error}", REMEDY) from error

    def check(self, timeout: float = 0.0) -> None:
        """Listen to the workers for so many seconds; one that is through is not listened to any more.

        Raises:
            WorkerFailed: a worker raised an error or was killed.
            BadInput, NotApplicable, Diverged, MemoryError: as a worker raised it.
        """
        ready: list[Any] = connection.wait(list(self.processes), timeout)
        for pipe in ready:
            rank, process = self.processes.pop(pipe)
            try:
                told: dict[str, Any] | None = pipe.recv()
            except EOFError:
                told = None
            pipe.close()
            process.join(LAST)
            if told is None:
                raise WorkerFailed(self._obituary(rank, process.exitcode))
            if told["error"]:
                raise self._raised(rank, **told)

    def finish(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Wait until all are through. Raises like `check`, and WorkerFailed for one that hangs."""
        end = clock() + PATIENCE
        while self.processes:
            self.check(1.0)
            if self.processes and clock() > end:
                raise WorkerFailed(hanging([rank for rank, _ in self.processes.values()], self.workers))

    def kill(self) -> None:
        """End all that are left, at once."""
        for pipe, (_, process) in self.processes.items():
            process.kill()
            process.join()
            pipe.close()
        self.processes.clear()

    def _obituary(self, rank: int, code: int | None) -> str:
        killed = code is not None and code < 0
        how = f"was killed by {signal.Signals(-code).name}" if killed else f"ended with status {code}"  # type: ignore[operator]
        why = ", most likely for its memory" if code == -signal.SIGKILL else ""
        return f"worker {rank} of {self.workers} {how}{why}; {AGAIN}"

    def _raised(self, rank: int, error: str, args: tuple[Any, ...], text: str) -> Exception:
        if error in OURS:
            return OURS[error](*args)
        found = WorkerFailed(f"worker {rank} of {self.workers} raised {error}: {args[0]}")
        found.add_note(f"in worker {rank} of {self.workers}:\n{text}")
        return found


def hanging(ranks: Sequence[int], workers: int) -> str:
    """What is said of workers that live and do nothing.

    Example:
        >>> hanging([2, 3], 4)
        'worker 2, 3 of 4: no end of a step for 30 minutes; the train step ended with it: run it again to go on'
    """
    which = ", ".join(map(str, ranks))
    return f"worker {which} of {workers}: no end of a step for {PATIENCE / 60:.0f} minutes; {AGAIN}"


AGAIN = "the train step ended with it: run it again to go on"
REMEDY = "train through `quadriga` or a study, whose workers build it anew; or define what it uses at the top of a module"


def begin(parent: int, pipe: Any, work: Work, rank: int, job: Any) -> None:
    """A worker's life: it dies with its parent, leaves Ctrl-C to it, and says how it ended."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(rank, job)
        pipe.send({"error": "", "args": (), "text": ""})
    except Exception as error:
        pipe.send({"error": type(error).__name__, "args": spelled(error), "text": traceback.format_exc()})
    finally:
        pipe.close()


def spelled(error: Exception) -> tuple[Any, ...]:
    """What to make an error of ours from again; of others, their text."""
    if isinstance(error, BadInput):
        return error.problem, error.remedy
    if isinstance(error, NotApplicable):
        return error.reason, error.remedy
    if isinstance(error, Diverged):
        return error.step, error.rate, error.loss
    return (str(error) or "(no message)",)
