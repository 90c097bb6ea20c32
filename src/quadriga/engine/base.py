"""What every engine is: submit, wait, cancel, resources. The driver alone proposes and writes; engines run orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

# what a process of one trial computes with; set before torch is imported. What user code may load is as in the driver.
SINGLE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
RETRIES = 2  # of an order whose worker or machine was lost

LOADING = 900.0  # seconds in which a worker has to have the workload; whole data sets may have to be read over a network
ANYWHERE = frozenset({"train", "hello"})  # tasks that any machine may do; what is timed, or built to be timed, is the target's
TOGETHER = "train"  # the task that several ranks can do as one


@dataclass
class Order:
    """A task to be done: its number, name, plain arguments and time limit in seconds; and how many ranks do it together."""

    number: int
    task: str
    args: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 3600.0
    ranks: int = 1


@dataclass(frozen=True)
class Resources:
    """What an engine runs on.

    Args:
        workers: orders that it runs at once.
        target: facts of the one machine on which latency is measured, as `measure.machine.facts`.
        here: whether that is the driver's machine.
        machines: for every machine, its name in the engine and how many workers it has.
        startup: seconds from the start of a process to its having PyTorch and the workload in memory.
    """

    workers: int
    target: Mapping[str, Any]
    here: bool = True
    machines: Mapping[str, int] = field(default_factory=dict)
    startup: float = 5.0


class Engine(Protocol):
    """Takes orders and gives back results in the order in which they finish."""

    def submit(self, order: Order) -> None:
        """Queue an order."""

    def wait(self, timeout: float) -> tuple[int, dict[str, Any]] | None:
        """A finished order's number and result, or None when none ended within `timeout` seconds."""

    def cancel(self, number: int | None = None) -> None:
        """Give up an order, wherever it stands, so that no result of it comes; without a number those that have not begun."""

    def resources(self) -> Resources:
        """What it runs on now."""

    def renew(self) -> None:
        """Give up everything and begin again with fresh processes, which know nothing of what was done before."""

    def stop(self) -> None:
        """End all processes at once; checkpoints on disk are whole at any moment."""

    def close(self) -> None:
        """Stop, and leave whatever it was connected to."""
