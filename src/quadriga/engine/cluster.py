"""Ray, as much of it as the engine needs: machines, workers, groups of ranks, and how each call ended."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quadriga.core.errors import BadInput
from quadriga.engine.base import SINGLE
from quadriga.engine.ray_worker import Worker, look

REMEDY = "start one by `ray start --head`, name it as host:port, or give --address local for one on this machine"
PASSED_ON = ("QUADRIGA_", "PYTHONPATH")  # variables of the driver that workers get


class Died(Exception):
    """The process, or its machine, is gone; the work itself is not known to be at fault."""


class Failed(Exception):
    """The work itself raised an error."""


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster.

    Args:
        id: Ray's.
        name: its host's name and address.
        cpus, gpus: that Ray may give away in all.
    """

    id: str
    name: str
    cpus: int
    gpus: float = 0.0
    names: tuple[str, ...] = field(default=(), compare=False)


class Cluster:
    """A connection to a Ray cluster, or a cluster of this machine alone; without Ray's usage reports.

    A cluster that is there is joined with the token that Ray finds (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token) and
    in the mode that RAY_AUTH_MODE says. Its own cluster uses tokens, as Ray does by default.

    Args:
        address: "auto" for the one that runs here, "host:port", or "local" for a new one that ends with the study.

    Raises:
        BadInput: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
        except ImportError as error:
            raise BadInput(f"the engine ray cannot be imported: {error}", "pip install 'quadriga[ray]'") from error
        if address.startswith("ray://"):
            raise BadInput(
                f"{address} is a Ray client's address", "start quadriga on a machine of the cluster, with --address auto"
            )
        self.ray, self.ours = ray, not ray.is_initialized()
        if self.ours:
            own = {"include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise BadInput(f"no Ray cluster at {address}: {_brief(error)}", REMEDY) from error

    def machines(self) -> list[Machine]:
        """Those that are alive."""
        return [_machine(n) for n in self.ray.nodes() if n["Alive"]]

    def here(self) -> str:
        """The id of the driver's machine."""
        return self.ray.get_runtime_context().get_node_id()

    def look(self, machines: Sequence[Machine], *given: Any, timeout: float = 60.0) -> list[dict[str, Any] | str]:
        """What `ray_worker.look` says on each machine, or why nothing came back."""
        task = self.ray.remote(look)
        refs = [
            task.options(num_cpus=0, max_retries=0, scheduling_strategy=self._on(m, False)).remote(*given) for m in machines
        ]
        self.ray.wait(refs, num_returns=len(refs), timeout=timeout)
        return [self._looked(ref) for ref in refs]

    def _looked(self, ref: Any) -> dict[str, Any] | str:
        try:
            return self.ray.get(ref, timeout=0)
        except self.ray.exceptions.GetTimeoutError:
            return "it did not answer"
        except self.ray.exceptions.RayError as error:
            return _brief(error)

    def start(self, spec: Mapping[str, Any], machine: Machine, *, gpus: float = 0.0, firm: bool = True) -> Any:
        """A worker on a machine; one that is not `firm` may begin elsewhere if that machine is gone."""
        made = self.ray.remote(Worker).options(
            num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy=self._on(machine, not firm)
        )
        return made.remote(dict(spec), environment())

    def group(self, spec: Mapping[str, Any], ranks: int, *, gpus: float = 0.0) -> tuple[Any, list[Any]]:
        """Room for so many ranks, near one another and all at once or not at all; and a worker in each place."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Inside

        room = self.ray.util.placement_group([{"CPU": 1, **({"GPU": gpus} if gpus else {})}] * ranks, strategy="PACK")
        made, places = self.ray.remote(Worker), [Inside(room, placement_group_bundle_index=index) for index in range(ranks)]
        how = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        return room, [made.options(**how, scheduling_strategy=p).remote(dict(spec), environment()) for p in places]

    def call(self, worker: Any, name: str, *given: Any) -> Any:
        """A reference to what a method of a worker will return."""
        return getattr(worker, name).remote(*given)

    def wait(self, refs: Sequence[Any], timeout: float) -> list[Any]:
        """Those that have ended by then, at least one if any."""
        if not refs:
            time.sleep(timeout)
            return []
        done, _ = self.ray.wait(list(refs), num_returns=1, timeout=max(timeout, 0.0))
        return done

    def result(self, ref: Any, timeout: float | None = None) -> Any:
        """What came back.

        Raises:
            Died, Failed: nothing did.
        """
        errors = self.ray.exceptions
        try:
            return self.ray.get(ref, timeout=timeout)
        except errors.RayTaskError as error:
            raise Failed(_brief(error)) from error
        except errors.RayActorError as error:
            raise (Failed if error.actor_init_failed else Died)(_brief(error)) from error
        except errors.RayError as error:
            raise Died(_brief(error)) from error

    def kill(self, workers: Sequence[Any], room: Any = None) -> None:
        """End workers at once, and give their room back."""
        for worker in workers:
            self.ray.kill(worker, no_restart=True)
        if room is not None:
            self.ray.util.remove_placement_group(room)

    def close(self) -> None:
        """Leave the cluster, unless the caller was in it before; its own one ends."""
        if self.ours:
            self.ray.shutdown()

    @staticmethod
    def _on(machine: Machine, soft: bool) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(machine.id, soft=soft)


def environment() -> dict[str, str]:
    """Variables of every worker: one thread each, and those of the driver that say where data and code are."""
    return {**{k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}, **SINGLE}


def _machine(node: Mapping[str, Any]) -> Machine:
    host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
    given, names = node["Resources"], (node["NodeID"], host, address, node.get("NodeName", ""))
    return Machine(node["NodeID"], f"{host} ({address})", int(given.get("CPU", 0)), float(given.get("GPU", 0)), names)


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1][:300] if isinstance(error, Exception) and "Traceback" in lines[0] else lines[0][:300]
