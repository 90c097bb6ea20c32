"""How examples reach the loop: tensors that stay on the device, or a data set read ahead by processes that may die."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils import worker

from quadriga.core import rng
from quadriga.core.batch import Batch, tensors, to_device, tree_map
from quadriga.core.data import Data, TensorData
from quadriga.core.errors import BadInput
from quadriga.parallel.share import Share
from quadriga.train.starting import start_methods

AHEAD = 2  # batches that are read ahead, per worker
RESTARTS = 3  # of the workers, without a batch between; then the loop reads by itself
PATIENCE = 5.0  # seconds in which a worker may finish its batch when a train step ends
Upcoming = Callable[[int], Tensor]  # position of the stream → indices of the batch that will start there; none at the end


def resident(data: Data, device: torch.device) -> Data:
    """The split on the device, where that is not the CPU and half of its free memory holds it; else the split itself."""
    if device.type == "cpu" or type(data) is not TensorData:
        return data
    size = sum(t.numel() * t.element_size() for t in tensors((data.inputs, data.target)))
    if 2 * size > torch.cuda.mem_get_info(device)[0]:
        return data
    return TensorData(to_device(data.inputs, device), to_device(data.target, device))


def home_of(data: Data) -> torch.device:
    """Where indices into a split have to be."""
    return tensors(data.inputs)[0].device if isinstance(data, TensorData) and data.plain else torch.device("cpu")


def read(data: Data, seed: int, position: int, index: Tensor) -> Batch:
    """The examples at `index`; what they draw from the global generators depends on (seed, position) alone.

    Raises:
        BadInput: one of them cannot be read; the text names it, and the error's notes hold the original traceback.
    """
    rng.seed_all(rng.derive("read", seed, position))
    try:
        return data.batch(index)
    except (BadInput, MemoryError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        which = next((n for n in getattr(error, "__notes__", ()) if n.startswith("example ")), named(index))
        problem = f"{which} cannot be read: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        told = BadInput(problem, "correct the data set there")
        told.add_note("".join(traceback.format_exception(error)))
        raise told from error


def named(index: Tensor) -> str:
    """The indices for people.

    Example:
        >>> named(torch.tensor([3, 1]))
        'one of the examples 3, 1'
    """
    return "one of the examples " + ", ".join(str(i) for i in index.tolist())


@dataclass
class Ordered:
    """A batch that a worker was told to read."""

    position: int
    index: Tensor
    future: Future[Batch]
    pinned: Batch | None = None

    def pin(self, done: Future[Batch]) -> None:
        """Copy to pinned memory, in the pool's own thread, so that the loop's copy to the device need not wait."""
        if not done.cancelled() and done.exception() is None:
            got = done.result()
            inputs, target = (tree_map(Tensor.pin_memory, tree) for tree in (got.inputs, got.target))
            self.pinned = replace(got, inputs=inputs, target=target)


class Feed:
    """Batches of a split that is not resident, each a function of (seed, position, indices) however it is read.

    With workers, batches are read ahead in the order of the stream. When other indices are asked for than those expected,
    reading starts anew from there. Workers that die are replaced and read the same examples again; after `RESTARTS` deaths
    in a row the loop reads by itself. torch's `DataLoader` cannot be used for this: it reports a dead worker by an exception
    in whatever line of the loop the signal arrives, even in the middle of an optimizer step.

    Args:
        data: the split; its `workers` and `timeout`, if it has them, are kept to.
        seed: of what examples draw.
        upcoming: tells the order; without it (the order depends on what is not known yet) the loop reads by itself.
        device: where batches go.
        share: the part of each batch that is read.

    Attributes:
        note: what happened to workers, for people.
        reason: why workers are started by another method than the safest.
    """

    def __init__(
        self, data: Data, seed: int, upcoming: Upcoming | None, device: torch.device, share: Share | None = None
    ) -> None:
        self.share = Share() if share is None else share
        self.data, self.seed, self.upcoming, self.pins = data, seed, upcoming, device.type == "cuda"
        wanted = getattr(data, "workers", 0) if upcoming else 0
        self.workers = min(wanted, len(os.sched_getaffinity(0)))
        self.timeout: float = getattr(data, "timeout", 300.0)
        self.note, self.reason = "", ""
        self.pool: ProcessPoolExecutor | None = None
        self.line: deque[Ordered] = deque()
        self.methods: list[str] = []
        self.deaths = self.replaced = self.delivered = 0

    def batch(self, index: Tensor, position: int) -> Batch:
        """The examples at `index` [n] int64, which stand in the stream from `position` on; the share of them.

        Raises:
            BadInput: an example cannot be read, or takes longer than the timeout, twice.
        """
        while self.workers:
            try:
                self._order(index, position)
                first = self.line[0]
                batch = first.future.result(self.timeout)
            except (BadInput, MemoryError):
                raise
            except Exception as error:  # a killed worker shows itself in many ways
                self._replace(error, index)
                continue
            self.line.popleft()
            self.deaths, self.delivered = 0, self.delivered + 1
            return replace(first.pinned or batch, index=self.share.mine(index))
        with rng.isolated():
            return read(self.data, self.seed, position + self.share.of(len(index)).start, self.share.mine(index))

    def close(self, patience: float = PATIENCE) -> None:
        """End the workers, in good order where they can; whoever hangs is killed."""
        self.line.clear()
        pool, self.pool = self.pool, None
        if pool is None:
            return
        manager = pool._executor_manager_thread  # of a broken pool it is this thread that still ends the workers
        left = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + patience
        while (waiting := [p for p in left if p.is_alive()]) and (now := time.monotonic()) < end:
            connection.wait([p.sentinel for p in waiting], end - now)
        for process in left:
            process.kill()
            process.join()
        if manager is not None:
            manager.join(PATIENCE)

    def _order(self, index: Tensor, position: int) -> None:
        """Have this batch read first, and those that will follow it."""
        if self.line and not (self.line[0].position == position and torch.equal(self.line[0].index, index)):
            while self.line:
                self.line.pop().future.cancel()
        if not self.line:
            self._submit(index, position)
        while len(self.line) <= AHEAD * self.workers:
            position = self.line[-1].position + len(self.line[-1].index)
            assert self.upcoming is not None
            index = self.upcoming(position)
            if not len(index):
                break
            self._submit(index, position)

    def _submit(self, index: Tensor, position: int) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # where it has to fork
            first, mine = position + self.share.of(len(index)).start, self.share.mine(index).tolist()
            future = self._started().submit(_read, first, mine)
        order = Ordered(position, index, future)
        if self.pins:
            future.add_done_callback(order.pin)
        self.line.append(order)

    def _started(self) -> ProcessPoolExecutor:
        if self.pool is None:
            if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that runs its parent's script again
                raise BadInput("the script trains while it is imported", "put it under `if __name__ == '__main__':`")
            if not self.methods and (asked := getattr(self.data, "method", None)):
                self.methods = [asked]
            elif not self.methods:
                self.methods, self.reason = start_methods(self.data)
            context: Any = multiprocessing.get_context(self.methods[0])
            if self.methods[0] == "forkserver":
                context.set_forkserver_preload([__name__])
            given = (self.data, self.seed, self.workers, context.Value("i", 0))
            self.pool = ProcessPoolExecutor(self.workers, context, _begin, given)
        return self.pool

    def _replace(self, error: Exception, index: Tensor) -> None:
        """Workers are gone or hang: the same batches are read by others, or at last by the loop."""
        hangs = isinstance(error, TimeoutError)
        if hangs and self.pool is not None:
            _show_stacks(self.pool)
        self.close(patience=0)
        if not self.delivered and len(self.methods) > 1:  # it may be this way to start them that does not work here
            self.reason = f"{self.methods.pop(0)} failed: {type(error).__name__}: {error}"
            return
        self.deaths, self.replaced = self.deaths + 1, self.replaced + 1
        if hangs and self.deaths > 1:
            problem = f"{named(index)} took longer than {self.timeout:g} s to read, twice"
            raise BadInput(problem, "look for a deadlock in the data set, or raise its timeout") from error
        times = "once" if self.replaced == 1 else f"{self.replaced} times"
        self.note = f"workers that read data {'hung' if hangs else 'died'} and were replaced {times}; no example was lost"
        if self.deaths > RESTARTS:
            self.workers = 0
            self.note = f"workers that read data died {self.replaced} times; the loop read by itself then ({error})"


_here: dict[str, Any] = {}  # in a worker: what it reads


def _begin(data: Data, seed: int, workers: int, counted: Any) -> None:
    """A worker's first deed: one thread, Ctrl-C is its parent's affair, and no life after the parent's; then the user's own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(Exception):
        faulthandler.register(signal.SIGUSR1, sys.__stderr__ or sys.stderr)
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _here.update(data=data, seed=seed)
    with counted.get_lock():
        number, counted.value = counted.value, counted.value + 1
    own = rng.derive("worker", seed, number)
    rng.seed_all(own)
    info = worker.WorkerInfo(id=number, num_workers=workers, seed=own, dataset=getattr(data, "dataset", data))
    worker._worker_info = info  # what `get_worker_info()` gives
    if (begin := getattr(data, "begin", None)) is not None:
        begin(number)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _read(position: int, index: Sequence[int]) -> Batch:
    return read(_here["data"], _here["seed"], position, torch.tensor(index, dtype=torch.int64))


def _show_stacks(pool: ProcessPoolExecutor) -> None:
    """Let workers that hang print where they are, on stderr."""
    for process in list((pool._processes or {}).values()):
        with contextlib.suppress(Exception):
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)
