"""The engine of a cluster: warm workers on Ray, orders to whom they belong, trials again whose worker or machine died.

The driver is the only one that proposes and writes. Its queue is here and not in Ray, so that there are never more live workers
than allowed, and latency is measured on one machine alone. Files pass between driver and workers by the study's folder, which
every machine has to see under the same path.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput
from quadriga.core.trial import Status
from quadriga.engine.base import ANYWHERE, LOADING, RETRIES, TOGETHER, Order, Resources
from quadriga.engine.cluster import Cluster, Died, Failed, Machine
from quadriga.engine.machines import Machines

LIVE = 64  # workers at once, unless asked otherwise
TICK = 1.0  # seconds, at most, between two looks at the time limits
FALLS = 3  # workers that may fail to start on a machine
PATIENCE = 30.0  # seconds in which a rank says where the others meet
GRACE = 60.0  # seconds after a rank's error in which a death among the others may be heard of that explains it


@dataclass
class Place:
    """A worker, or the ranks of one order; `starting` and `running` are what is waited for."""

    machine: Machine | None
    workers: list[Any]
    room: Any = None
    starting: list[Any] = field(default_factory=list)
    running: list[Any] = field(default_factory=list)
    order: Order | None = None
    tries: int = 0
    began: float = 0.0
    came: float = 0.0  # when its workers were started
    first: Any = None  # the call whose value counts
    value: dict[str, Any] | None = None
    error: str = ""  # of the first rank that raised one
    erred: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether it could begin an order."""
        return self.order is None and not self.starting


class Ray:
    """Runs orders on a Ray cluster.

    Args:
        cluster: connected.
        reference: how workers find the workload.
        folder: the study's folder, on storage that all machines share.
        seed: of every trial.
        target: the machine on which latency is measured, by host name, address or Ray's id; the driver's without it.
        live: workers at once, at most.
        gpus: of each worker.
        ranks: workers that train a trial together.
        alike: use machines like the target alone, since what trainings cost is compared.
        key: of the driver's workload, which a worker compares with its own; "" to compare with nothing.
        loading: seconds in which a worker has to have the workload.
        clock: seconds.

    Raises:
        BadInput: a machine does not see the folder or has another Quadriga, or there is no such target.
    """

    def __init__(
        self, cluster: Cluster, reference: str, folder: Path, seed: int, *, target: str | None = None, live: int = LIVE,
        gpus: float = 0.0, ranks: int = 1, alike: bool = False, key: str = "", loading: float = LOADING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.cluster, self.gpus, self.ranks, self.clock, self.loading = cluster, gpus, ranks, clock, loading
        self.spec = {"workload": reference, "folder": str(folder.resolve()), "seed": seed, "key": key}
        self.machines = Machines(cluster, folder.resolve(), target, alike, clock)
        self.target = self.machines.target
        self.live = min(live, sum(m.cpus for m in self.machines.usable()))
        if self.live < 1 or self.target.cpus < 1:
            remedy = "start Ray there with --num-cpus, or name another --target"
            raise BadInput(f"Ray has no core to give away on {self.target.name}", remedy)
        if ranks > self.live:
            raise BadInput(
                f"{ranks} ranks are wanted, and {self.live} workers may live at once", "raise --live, or add machines"
            )
        self.falls: dict[str, int] = {}
        self._begin()

    def _begin(self) -> None:
        self.queue: deque[tuple[Order, int]] = deque()
        self.done: deque[tuple[int, dict[str, Any]]] = deque()
        self.places: list[Place] = []
        self._fill()

    def submit(self, order: Order) -> None:
        """Queue an order; one of more ranks than the cluster carries is refused at once."""
        if order.task == TOGETHER:
            order = replace(order, ranks=max(order.ranks, self.ranks))
        if order.ranks > self.live:
            reason = f"{order.ranks} ranks are wanted, and {self.live} workers may live at once"
            self._finish(
                order.number, {"status": Status.REFUSED, "reason": reason, "remedy": "raise --live, or use fewer ranks"}
            )
        else:
            self.queue.append((order, 0))

    def wait(self, timeout: float) -> tuple[int, dict[str, Any]] | None:
        """A finished order, or None when none ended within `timeout` seconds.

        Raises:
            BadInput: the target machine is gone, or no machine can start a worker.
        """
        end = self.clock() + max(timeout, 0.001)
        while True:
            self._fill()
            self._hand_out()
            left = end - self.clock()
            if self.done or left <= 0:
                return self.done.popleft() if self.done else None
            self._listen(min(left, TICK))

    def cancel(self, number: int | None = None) -> None:
        """Give up one order, with the worker that is at it; or all that have not begun."""
        self.queue = deque(entry for entry in self.queue if number is not None and entry[0].number != number)
        for place in [p for p in self.places if number is not None and p.order is not None and p.order.number == number]:
            self._drop(place)

    def resources(self) -> Resources:
        """The machines that have workers now."""
        names = [p.machine.name for p in self.places if p.machine is not None]
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        here = self.target.id == self.cluster.here()
        workers = max(1, sum(len(p.workers) for p in self.places) // self.ranks)
        return Resources(workers, self.machines.facts[self.target.id], here, counts)

    def renew(self) -> None:
        """Fresh workers, and nothing to do."""
        self.stop()
        self._begin()

    def stop(self) -> None:
        """End all workers at once."""
        for place in [*self.places]:
            self._drop(place)
        self.queue.clear()

    def close(self) -> None:
        """End all workers and leave the cluster."""
        self.stop()
        self.cluster.close()

    def _fill(self) -> None:
        """Start a worker on each core of each machine, as many as may live; the target's come first."""
        self.machines.look()
        free = self.live - sum(len(p.workers) for p in self.places) - self._wanted()
        for machine in self.machines.usable():
            if self.falls.get(machine.id, 0) >= FALLS:
                continue
            missing = machine.cpus - sum(p.machine is not None and p.machine.id == machine.id for p in self.places)
            for _ in range(min(missing, free)):
                worker = self.cluster.start(self.spec, machine, gpus=self.gpus, firm=True)
                self.places.append(Place(machine, [worker], starting=[self.cluster.call(worker, "ready")], came=self.clock()))
                free -= 1
        if not self.places and not self._wanted():
            raise BadInput(
                f"no machine of the cluster can start a worker: {'; '.join(self.machines.notes[-2:])}", "look at Ray's logs"
            )

    def _wanted(self) -> int:
        """Workers for which room is kept: those of the first group of ranks that waits."""
        return next((order.ranks for order, _ in self.queue if order.ranks > 1), 0)

    def _hand_out(self) -> None:
        """Give orders to those who are idle, the oldest first."""
        waiting, self.queue = self.queue, deque()
        blocked = False  # a group of ranks waits for room: nobody but the target's own orders goes before it
        for order, tries in waiting:
            place = self._group(order) if order.ranks > 1 and not blocked else None
            blocked = blocked or (order.ranks > 1 and place is None)
            if order.ranks == 1 and not (blocked and order.task in ANYWHERE):
                place = self._idle(order)
            if place is None:
                self.queue.append((order, tries))
            else:
                place.order, place.tries, place.began = order, tries, self.clock()
                if not place.starting:
                    self._start(place)

    def _idle(self, order: Order) -> Place | None:
        """Who can take an order: timings belong to the target, and trainings to it only if nobody else is idle."""
        idle = [p for p in self.places if p.idle and p.room is None]
        own = [p for p in idle if p.machine is not None and p.machine.id == self.target.id]
        others = [p for p in idle if p not in own]
        return next(iter([*others, *own] if order.task in ANYWHERE else own), None)

    def _group(self, order: Order) -> Place | None:
        """Ranks for one order, once as many workers as they need are idle, which end for it."""
        missing = order.ranks - (self.live - sum(len(p.workers) for p in self.places))
        idle = [p for p in self.places if p.order is None and p.room is None][::-1]
        if missing > len(idle):
            return None
        for place in idle[: max(missing, 0)]:
            self._drop(place)
        room, workers = self.cluster.group(self.spec, order.ranks, gpus=self.gpus)
        place = Place(None, workers, room, [self.cluster.call(w, "ready") for w in workers], came=self.clock())
        self.places.append(place)
        return place

    def _start(self, place: Place) -> None:
        """Begin the order of a place that is ready."""
        order, ranks = place.order, [dict[str, str]()]
        assert order is not None
        place.began, place.value, place.error = self.clock(), None, ""
        if place.room is not None:
            try:
                host, port = self.cluster.result(self.cluster.call(place.workers[0], "meeting_place"), PATIENCE)
            except (Died, Failed) as error:
                self._lost(place, str(error))
                return
            world = {"WORLD_SIZE": str(order.ranks), "LOCAL_RANK": "0", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
            ranks = [{**world, "RANK": str(rank)} for rank in range(order.ranks)]
        calls = zip(place.workers, ranks, strict=True)
        place.running = [self.cluster.call(w, "do", order.task, dict(order.args), rank) for w, rank in calls]
        place.first = place.running[0]

    def _listen(self, timeout: float) -> None:
        """Hear from whoever ends first, and end whoever is over the time."""
        heard = {ref: place for place in self.places for ref in (*place.starting, *place.running)}
        for ref in self.cluster.wait(list(heard), timeout):
            if heard[ref] in self.places:
                self._heard(heard[ref], ref)
        for place in [p for p in self.places if p.starting and self.clock() - p.came > self.loading]:
            self._lost(place, f"the workload was not loaded within {self.loading:.0f} s")
        for place in [p for p in self.places if p.error and self.clock() - p.erred > GRACE]:
            self._failed(place, place.error)
        for place in [p for p in self.places if p.running and p.order and self.clock() - p.began > p.order.limit]:
            order = place.order
            self._drop(place)
            reason = f"it ran longer than its limit of {order.limit:.0f} s"  # type: ignore[union-attr]
            self._finish(order.number, {"status": Status.TIMED_OUT, "reason": reason})  # type: ignore[union-attr]

    def _heard(self, place: Place, ref: Any) -> None:
        try:
            value = self.cluster.result(ref)
        except Died as error:
            self._lost(place, str(error))
        except Failed as error:
            self._erred(place, ref, str(error))
        else:
            if ref in place.starting:
                place.starting.remove(ref)
                if place.order is not None and not place.starting:
                    self._start(place)
                return
            place.value = value if ref is place.first else place.value
            place.running.remove(ref)
            if not place.running:
                self._ended(place)

    def _erred(self, place: Place, ref: Any, why: str) -> None:
        """An error of the work; but if a rank dies, the others' calls fail too, and may be heard of before its death is."""
        if ref not in place.running or len(place.workers) == 1:
            self._failed(place, why)
            return
        place.running.remove(ref)
        if not place.error:
            place.error, place.erred = why, self.clock()
        if not place.running:
            self._failed(place, place.error)

    def _ended(self, place: Place) -> None:
        order, value = place.order, place.value
        if place.error:
            self._failed(place, place.error)
            return
        assert order is not None and value is not None
        place.order = None
        if place.room is not None:
            self._drop(place)  # ranks are fresh for each order, and so is what they meet by
        self._finish(order.number, value)

    def _lost(self, place: Place, why: str) -> None:
        """A worker or its machine died: its order goes on elsewhere, from its checkpoint; ranks go on together."""
        order, tries, starting = place.order, place.tries + 1, bool(place.starting)
        self._drop(place)
        self.machines.forget()  # it may have been the machine
        if starting and place.machine is not None:
            self._fell(place.machine, why)
        if order is None:
            return
        if tries <= RETRIES:
            self.queue.appendleft((order, tries))
        else:
            reason = f"its worker died {tries} times, at last so: {why}"
            self._finish(order.number, {"status": Status.LOST, "reason": reason})

    def _failed(self, place: Place, why: str) -> None:
        """The work raised an error, which another try would raise again."""
        order, starting = place.order, bool(place.starting)
        self._drop(place)
        if starting and place.machine is not None:
            self._fell(place.machine, why)
        if order is not None:
            self._finish(order.number, {"status": Status.FAILED, "reason": why})

    def _fell(self, machine: Machine, why: str) -> None:
        self.falls[machine.id] = self.falls.get(machine.id, 0) + 1
        if self.falls[machine.id] == FALLS:
            self.machines.notes.append(
                f"{machine.name} is not used any more: {FALLS} workers could not be started there ({why})"
            )

    def _drop(self, place: Place) -> None:
        self.places.remove(place)
        self.cluster.kill(place.workers, place.room)

    def _finish(self, number: int, result: dict[str, Any]) -> None:
        self.done.append((number, result))
