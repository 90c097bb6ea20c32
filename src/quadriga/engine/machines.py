"""The machines of a cluster: which is the target, which see the study's folder, and which are like the target."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quadriga import __version__
from quadriga.core.errors import BadInput, did_you_mean
from quadriga.engine.cluster import Cluster, Machine
from quadriga.measure.machine import fingerprint

LOOK = 10.0  # seconds between two looks at which machines there are


class Machines:
    """Knows every machine that is or was in a cluster. One that joins late is looked at before it is used.

    Args:
        cluster: connected.
        folder: of the study, absolute.
        target: host name, address or Ray's id of the machine on which latency is measured; the driver's without it.
        alike: only machines of the target's kind are used.
        clock: seconds.

    Attributes:
        target: that machine.
        facts: machine id → what it is; nothing of one that cannot be used.
        notes: why some are not used.

    Raises:
        BadInput: there is no such target; or a machine that is there does not see the folder, or has another Quadriga or torch.
    """

    def __init__(self, cluster: Cluster, folder: Path, target: str | None, alike: bool, clock: Callable[[], float]) -> None:
        self.cluster, self.folder, self.alike, self.clock = cluster, folder, alike, clock
        self.facts: dict[str, Mapping[str, Any]] = {}
        self.notes: list[str] = []
        self.target = self._find(target)
        self.forget()
        self.look(strict=True)

    def look(self, *, strict: bool = False) -> None:
        """See which machines there are, now and then, and get to know the new ones.

        Raises:
            BadInput: the target is gone; with `strict` also if a new one cannot be used.
        """
        if self.clock() - self._looked < LOOK:
            return
        self._looked, self._alive = self.clock(), self.cluster.machines()
        if not any(m.id == self.target.id for m in self._alive):
            remedy = "run the same command when it is back; on another machine begin in another --out folder"
            raise BadInput(f"{self.target.name}, on which latency is measured, has left the cluster", remedy)
        new = sorted((m for m in self._alive if m.id not in self.facts), key=self._order)
        for machine, answer in zip(new, self._asked(new), strict=True):
            wrong = self._wrong(machine, answer)
            if wrong is not None and strict:
                raise wrong
            if wrong is not None:
                self.notes.append(f"{machine.name} joined and is not used: {wrong.problem}")
            self.facts[machine.id] = {} if wrong is not None else answer["facts"]  # type: ignore[index]

    def forget(self) -> None:
        """The next look is made at once."""
        self._looked = -math.inf

    def usable(self) -> list[Machine]:
        """Machines for workers, the target first."""
        own = fingerprint(self.facts[self.target.id])
        fit = [m for m in self._alive if self.facts.get(m.id) and (not self.alike or fingerprint(self.facts[m.id]) == own)]
        return sorted(fit, key=self._order)

    def _order(self, machine: Machine) -> bool:
        return machine.id != self.target.id

    def _find(self, target: str | None) -> Machine:
        machines = self.cluster.machines()
        wanted = target or self.cluster.here()
        found = next((m for m in machines if wanted in (m.id, *m.names)), None)
        if found is None:
            known = [m.names[1] if len(m.names) > 1 else m.id for m in machines]
            raise BadInput(f'the cluster has no machine "{wanted}"', did_you_mean(wanted, known))
        return found

    def _asked(self, machines: list[Machine]) -> list[dict[str, Any] | str]:
        """What each says when it is shown a file that the driver wrote into the folder."""
        if not machines:
            return []
        mark, text = f".seen-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
        (self.folder / mark).write_text(text)
        try:
            return self.cluster.look(machines, str(self.folder), mark, text)
        finally:
            (self.folder / mark).unlink(missing_ok=True)

    def _wrong(self, machine: Machine, answer: dict[str, Any] | str) -> BadInput | None:
        name, same = machine.name, "install the same one there"
        if isinstance(answer, str):
            return BadInput(f"{name} cannot run Quadriga: {answer}", "install it there, in the environment that Ray uses")
        if answer["version"] != __version__:
            return BadInput(f"{name} has Quadriga {answer['version']}, the driver {__version__}", same)
        torch = (self.facts.get(self.target.id) or answer["facts"])["torch"]
        if answer["facts"]["torch"] != torch:
            return BadInput(f"{name} has torch {answer['facts']['torch']}, the target {torch}", same)
        if not answer["sees"]:
            remedy = "put --out on storage that all machines mount under the same path, such as NFS"
            return BadInput(f"{name} does not see {self.folder}, or cannot write there", remedy)
        return None
