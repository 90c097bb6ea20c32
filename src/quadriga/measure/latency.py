"""Latency: paired, every arm in its own process and timed in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quadriga.core.batch import Tree
from quadriga.measure.machine import Busy, busy, others
from quadriga.measure.process import Arm, ArmFailed, Process
from quadriga.measure.timings import Blocks, Timings
from quadriga.measure.tree import save_tree

Launch = Callable[[str, Mapping[str, Any], Path], Arm]
AGAIN = 2  # times as many restarts as were asked for, at the most, where other processes disturb them
LEAST_RESTARTS = 4  # with fewer, a 99 % interval over restarts is seldom narrow enough to be a result


def write_inputs(inputs: Mapping[int, Tree], folder: Path) -> dict[str, str]:
    """Write each batch's inputs once, for all arms to read; batch → file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for batch, tree in inputs.items():
        path = folder / f"inputs_{batch}.safetensors"
        save_tree(path, tree)
        files[str(batch)] = str(path)
    return files


def arm_spec(arm: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """What an arm's process is told first."""
    return {"arm": dict(arm), "inputs": dict(files)}


def paired(
    arms: Mapping[str, Mapping[str, Any]],
    inputs: Mapping[int, Tree],
    *,
    restarts: int = 8,
    blocks: int = 10,
    block_seconds: float = 0.1,
    folder: Path,
    launch: Launch = Process,
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
    timeout: float = 300.0,
    look: Callable[[], Busy] = busy,
    told: Callable[[str], None] = lambda text: None,
    enough: Callable[[Timings], bool] = lambda timings: True,
) -> Timings:
    """Time arms against each other so that they do not disturb each other.

    In each restart every arm gets a fresh process with the user's own environment; all load, then wait blocked on a
    pipe. Block by block each arm is timed alone while the others sleep, in an order that rotates, so that the machine's
    slow changes fall on all alike. Restarts are the unit that `Timings.ratio` takes its interval over; one during which other
    processes took more than a tenth of the cores is made again while the budget lasts. (Calls interleaved in one process
    doubled eager's time here: the runtimes' threads spin against each other.)

    Args:
        arms: by name, {"kind": "folder", "path"} or {"kind": "eager", "workload", "checkpoint", "recipe", "spec"}.
        inputs: for each batch size, the inputs tree.
        restarts: fresh processes per arm; 6 to 12, and as many again where others disturb.
        blocks: per restart, arm and batch size.
        block_seconds: a block has as many calls as last this long, counted once per arm and batch after warm-up.
        folder: for the inputs and the arms' standard error.
        launch: (name, spec, folder) → Arm; tests inject simulated ones.
        budget: seconds; no restart is begun that would overrun it, once four are done and they are `enough`.
        clock: in seconds, for the budget.
        seed: of the order.
        timeout: seconds that an arm may take to answer; then it is killed.
        look: what the machine's cores have done so far; it tells what others did meanwhile.
        told: called with a line for people before each restart.
        enough: whether the timings so far are a result; until they are, restarts go on beyond the budget.

    Returns:
        Timings; an arm that crashed or hung has an entry in `errors`, and the others went on.
    """
    files = write_inputs(inputs, folder)
    specs = {name: arm_spec(arm, files) for name, arm in arms.items()}
    session = _Session(Timings.empty(list(inputs), list(arms), restarts), launch, folder, blocks, block_seconds, timeout, look)
    order, start, longest = random.Random(seed), clock(), 0.0
    for number in range(AGAIN * restarts):
        began, alive = clock(), [name for name in specs if name not in session.timings.errors]
        if session.timings.calm >= restarts:
            break
        late = budget is not None and number >= LEAST_RESTARTS and began - start + longest > budget
        if not alive or (late and enough(session.timings)):
            break
        again = ", again, since other processes disturbed" if number >= restarts else ""
        told(f"restart {min(number, restarts - 1) + 1} of {restarts}{again}")
        order.shuffle(alive)
        session.restart({name: specs[name] for name in alive})
        longest = max(longest, clock() - began)
    return session.timings.calmest(restarts, min(restarts, LEAST_RESTARTS))


@dataclass
class _Session:
    """What stays the same over the restarts of one `paired`, and the processes of the present one."""

    timings: Timings
    launch: Launch
    folder: Path
    blocks: int
    block_seconds: float
    timeout: float
    look: Callable[[], Busy]
    calls: dict[tuple[str, int], int] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)

    def restart(self, specs: Mapping[str, Mapping[str, Any]]) -> None:
        """Start all arms, time all blocks, keep the times of the arms that came through, end all arms."""
        self.arms, before, own = {}, self.look(), time.process_time()
        try:
            for name, spec in specs.items():  # all load at the same time
                self.arms[name] = self.launch(name, spec, self.folder)
            times = self._time()
            used = 0.0
            for name in list(self.arms):
                if facts := self._ask(name, {"do": "end"}):
                    self.timings.add(name, times[name], facts)
                    used += float(facts.get("cpu", 0.0))
            self.timings.restarts += 1
            self.timings.others.append(others(before, self.look(), used + time.process_time() - own))
        finally:
            for arm in self.arms.values():
                arm.close()

    def _time(self) -> dict[str, dict[int, Blocks]]:
        batches = self.timings.batches
        for name in list(self.arms):
            self._ask(name, {"do": "ready"})
        for name, batch in [(name, batch) for name in self.arms for batch in batches]:
            if answer := self._ask(name, {"do": "warm", "batch": batch, "seconds": self.block_seconds}):
                self.calls.setdefault((name, batch), int(answer["calls"]))
        times: dict[str, dict[int, Blocks]] = {name: {batch: [] for batch in batches} for name in self.arms}
        names = list(self.arms)
        for number in range(self.blocks):
            turn = number % max(len(names), 1)
            for batch in batches:
                for name in names[turn:] + names[:turn]:
                    self._block(name, batch, times)
        return times

    def _block(self, name: str, batch: int, times: dict[str, dict[int, Blocks]]) -> None:
        if name not in self.arms:  # it failed earlier in this restart
            return
        if answer := self._ask(name, {"do": "block", "batch": batch, "calls": self.calls[name, batch]}):
            times[name][batch].append((float(answer["wall"]), float(answer["cpu"])))

    def _ask(self, name: str, command: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The answer; or None, and the arm is out, with the reason recorded."""
        if name not in self.arms:
            return None
        try:
            return self.arms[name].ask(command, self.timeout)
        except ArmFailed as error:
            self.timings.errors[name] = str(error)
            self.arms.pop(name).close()
            return None
