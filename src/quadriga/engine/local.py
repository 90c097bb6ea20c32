"""The engine of one machine: warm worker processes with pinned threads and time limits; and its stand-in for live models."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput
from quadriga.core.trial import Status
from quadriga.core.workload import Workload
from quadriga.engine.admission import fatal
from quadriga.engine.base import LOADING, RETRIES, Order, Resources
from quadriga.engine.process import Process
from quadriga.measure.machine import facts

BY_OTHERS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)  # ends that come from outside, not from the code that ran


class Local:
    """Workers are separate processes: a crash, an exhausted memory or a time limit ends one trial alone.

    Args:
        reference: how workers find the workload.
        folder: the study's folder.
        seed: of every trial.
        size: number of workers; each computes with one thread.
        key: of the driver's workload, which a worker compares with its own; "" to compare with nothing.
        loading: seconds in which a worker has to have the workload. The limits of orders begin when it has.
    """

    def __init__(self, reference: str, folder: Path, seed: int, size: int, *, key: str = "", loading: float = LOADING) -> None:
        self._resources = Resources(size, facts(), machines={"here": size})
        given = {"workload": reference, "folder": str(folder), "seed": seed, "key": key}
        self._spec, self._loading = json.dumps({"parent": os.getpid(), **given, "threads": 1}), loading
        self._start()

    def _start(self) -> None:
        self._waiting: deque[Order] = deque()
        self._given_up: set[int] = set()
        self._tries: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._results: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        self._workers = [_Worker(self._spec, self._loading) for _ in range(self._resources.workers)]
        self._stopping = False
        self._threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, order: Order) -> None:
        """Queue an order for the next free worker."""
        with self._changed:
            self._waiting.append(order)
            self._changed.notify()

    def wait(self, timeout: float) -> tuple[int, dict[str, Any]] | None:
        """A finished order, or None when none came within `timeout` seconds."""
        try:
            found = self._results.get(timeout=max(timeout, 0.001))
        except queue.Empty:
            return None
        return found if found[0] not in self._given_up else None

    def cancel(self, number: int | None = None) -> None:
        """Give up one order, and the process that is at it; or all that no worker has begun."""
        with self._changed:
            self._waiting = deque(o for o in self._waiting if number is not None and o.number != number)
            if number is not None:
                self._given_up.add(number)
                for worker in self._workers:
                    if worker.number == number:
                        worker.kill()

    def resources(self) -> Resources:
        """This machine; its `startup` is what the workers took, once they are there."""
        known = [w.startup for w in self._workers if w.startup is not None]
        return replace(self._resources, startup=max(known)) if known else self._resources

    def renew(self) -> None:
        """Fresh processes, and nothing to do."""
        self.stop()
        self._start()

    def stop(self) -> None:
        """Kill the workers at once; checkpoints on disk are whole at any moment."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        while any(thread.is_alive() for thread in self._threads):
            for worker, thread in zip(self._workers, self._threads, strict=True):
                worker.kill()
                thread.join(timeout=0.1)  # it may just have started its worker again
        for worker in self._workers:
            worker.kill()
            worker.close()

    def close(self) -> None:
        """As `stop`."""
        self.stop()

    def _serve(self, worker: _Worker) -> None:
        while (order := self._take(worker)) is not None:
            try:
                result = worker.do(order)
            except Exception as error:  # of ours; the study would wait for this order for ever
                result = {"status": Status.FAILED, "reason": f"an error inside Quadriga: {type(error).__name__}: {error}"}
            worker.number = None
            if not self._stopping and not self._again(order, result):
                self._results.put((order.number, result))

    def _again(self, order: Order, result: dict[str, Any]) -> bool:
        """Put an order back that was lost by no fault of its own; it goes on from its checkpoint."""
        self._tries[order.number] += 1
        tries, status = self._tries[order.number], Status(result["status"])
        if not status.mishap or order.number in self._given_up:
            return False
        if tries > (RETRIES if status is Status.LOST else 1):  # memory that is lacking twice is mostly lacking for good
            result["reason"] = f"{result['reason']}; it was the last of {tries} tries"
            return False
        with self._changed:
            self._waiting.appendleft(order)
            self._changed.notify()
        return True

    def _take(self, worker: _Worker) -> Order | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if self._stopping:
                return None
            order = self._waiting.popleft()
            worker.number = order.number
            return order


class _Worker:
    """One process, started ahead of its first task and again after it died.

    Args:
        spec: what it is told.
        loading: seconds until it has to have the workload.
    """

    def __init__(self, spec: str, loading: float) -> None:
        self._spec, self._loading = spec, loading
        self.number: int | None = None  # of the order that it is at
        self.startup: float | None = None  # seconds that its process took until the workload was in memory
        self._start()

    def _start(self) -> None:
        self._process, self._ready = Process(self._spec), False

    def do(self, order: Order) -> dict[str, Any]:
        if not self._process.alive:
            self.close()
            self._start()
        return self._loaded() or self._answer(order)

    def _loaded(self) -> dict[str, Any] | None:
        """Wait until it has the workload; what happened, if it did not get there."""
        if self._ready:
            return None
        until = self._process.began + self._loading
        told = self._process.hear(until - time.monotonic())
        if told is None:
            return self._slow() if time.monotonic() >= until else self._obituary(" while it loaded the workload")
        self.startup, self._ready = float(told["ready"]), True
        return None

    def _answer(self, order: Order) -> dict[str, Any]:
        until = time.monotonic() + order.limit
        if self._process.tell({"number": order.number, "task": order.task, "args": order.args}):
            while (told := self._process.hear(until - time.monotonic())) is not None:
                if "result" in told and told.get("number") == order.number:
                    return dict(told["result"])
        if time.monotonic() < until:
            return self._obituary()
        self._process.kill()
        return {"status": Status.TIMED_OUT, "reason": f"it ran longer than its limit of {order.limit:.0f} s"}

    def _slow(self) -> dict[str, Any]:
        """The next try would take as long."""
        self._process.kill()
        problem = f"loading the workload took longer than {self._loading:.0f} s in a worker"
        return fatal(
            BadInput(problem, "keep what is prepared in a file, or read examples when they are asked for, by a Dataset")
        )

    def _obituary(self, when: str = "") -> dict[str, Any]:
        code, peak = self._process.ended(), f"it had {self._process.peak / 2**30:.1f} GiB at most"
        tail = f": {words}" if (words := self._process.last_words) else ""
        if code == -signal.SIGKILL and self._process.starved:
            return {"status": Status.OUT_OF_MEMORY, "reason": f"the worker was killed for its memory{when}; {peak}"}
        if code in BY_OTHERS:
            return {"status": Status.LOST, "reason": f"the worker was ended by {signal.Signals(-code).name}{when}; {peak}"}
        by = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return {"status": Status.FAILED, "reason": f"the code that it ran ended the worker {by}{when}{tail}"}

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.close()


class Inline:
    """Runs orders in the caller's process, for a live model that no other process can rebuild.

    No time limit can be enforced and a crash of the interpreter ends the study; the report says so.
    """

    def __init__(self, workload: Workload, folder: Path, seed: int) -> None:
        from quadriga.engine.tasks import Desk

        self._desk, self._orders = Desk(workload, folder, seed), list[Order]()
        self._resources = Resources(1, facts(), machines={"here": 1})

    def submit(self, order: Order) -> None:
        """Queue an order; it runs when `wait` is called."""
        self._orders.append(order)

    def wait(self, timeout: float) -> tuple[int, dict[str, Any]] | None:
        """Run the oldest order to its end; the caller's threads, precision and random generators stay as they were."""
        from quadriga.core import rng
        from quadriga.core.slots import RuntimeSpec
        from quadriga.train.step import settings

        if not self._orders:
            return None
        order = self._orders.pop(0)
        with rng.isolated(), settings(RuntimeSpec()):
            return order.number, self._desk.do(order.task, order.args)

    def cancel(self, number: int | None = None) -> None:
        """Give up one order, or all: none has begun."""
        self._orders = [o for o in self._orders if number is not None and o.number != number]

    def resources(self) -> Resources:
        """This process."""
        return self._resources

    def renew(self) -> None:
        """The process is the caller's, and stays as it is."""
        self.cancel()

    def stop(self) -> None:
        """Nothing runs between two calls of `wait`."""
        self.cancel()

    def close(self) -> None:
        """As `stop`."""
        self.cancel()


def cores() -> int:
    """How many workers this machine carries: the cores that this process may use, at most eight."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, usable))
