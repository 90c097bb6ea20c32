"""Which engine a study runs on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.workload import Workload
from quadriga.engine.base import Engine
from quadriga.engine.local import Inline, Local, cores
from quadriga.workloads.identity import write

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Where:
    """The engine that was asked for, and what it is given.

    Args:
        engine: "local", or "ray".
        address: of the Ray cluster: "auto", "host:port", or "local".
        target: the machine on which latency is measured; the driver's without it.
        live: worker processes at once, at most.
        gpus: of each process on Ray; may be a part of one.
        ranks: processes on Ray that train one trial together.

    Raises:
        BadInput: there is no such engine, or it has no such setting.

    Example:
        >>> Where("ray", target="node-7").target
        'node-7'
    """

    engine: str = "local"
    address: str = "auto"
    target: str | None = None
    live: int | None = None
    gpus: float = 0.0
    ranks: int = 1

    def changed(self) -> dict[str, Any]:
        """The settings that are not the usual ones."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise BadInput(f'there is no engine "{self.engine}"', did_you_mean(self.engine, ENGINES))
        if self.engine != "ray" and (odd := sorted({*self.changed()} - {"engine", "live"})):
            raise BadInput(f"{' and '.join(odd)}: settings of the engine ray", "add --engine ray, or leave them out")
        if (self.live is not None and self.live < 1) or self.gpus < 0 or self.ranks < 1:
            told = f"live is {self.live}, gpus {self.gpus}, ranks {self.ranks}"
            raise BadInput(told, "give at least one live trial and one rank, and no negative GPUs")


def open_engine(workload: Workload, folder: Path, seed: int, where: Where | None = None, *, alike: bool = False) -> Engine:
    """The engine that was asked for. Of the local one: processes when the workload has a reference that they can load, else the
    caller's own process.

    Args:
        workload, folder, seed: of the study.
        where: the local engine by default.
        alike: what trainings cost is compared, so that all have to run on machines like the target.

    Raises:
        BadInput: a cluster cannot be used.
    """
    where = where or Where()
    if where.engine == "ray":
        return _on_ray(workload, folder, seed, where, alike)
    if workload.reference is None:
        return Inline(workload, folder, seed)
    return Local(workload.reference, folder, seed, min(cores(), where.live or cores()), key=write(workload, folder))


def _on_ray(workload: Workload, folder: Path, seed: int, where: Where, alike: bool) -> Engine:
    from quadriga.engine.cluster import Cluster
    from quadriga.engine.ray import LIVE, Ray

    if workload.reference is None:
        raise BadInput("the model is a live object, which other machines cannot rebuild", "give a name or file.py:function")
    if alike and where.ranks > 1:
        raise BadInput("what a training costs is counted in one process", "leave --ranks out, or minimize something else")
    shared = {"target": where.target, "gpus": where.gpus, "ranks": where.ranks}
    given = {**shared, "live": where.live or LIVE, "alike": alike, "key": write(workload, folder)}
    cluster = Cluster(where.address)
    try:
        return Ray(cluster, workload.reference, folder, seed, **given)
    except BaseException:
        cluster.close()
        raise
