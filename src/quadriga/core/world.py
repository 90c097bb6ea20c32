"""Which of how many processes this one is, as torchrun or Slurm's srun told it. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from quadriga.core.errors import BadInput, NotApplicable


@dataclass(frozen=True)
class World:
    """The processes that were started to train one model together.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        local: its rank among those of its machine.
        by: who started them: "torchrun", "Slurm" or "" for a process alone.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    by: str = ""

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def found(environ: Mapping[str, str] | None = None) -> World:
    """What the environment says.

    A shell inside a Slurm allocation is no rank, though it sees the allocation's numbers; what srun starts has a step.

    Raises:
        BadInput: the environment says it in part, or something that is no number.

    Example:
        >>> found({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
        World(rank=1, size=4, local=1, by='torchrun')
        >>> found({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}).size
        1
    """
    env = os.environ if environ is None else environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return _read(env, ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "torchrun")
    if int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return _read(env, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"), "Slurm")
    return World()


def _read(env: Mapping[str, str], names: tuple[str, str, str], by: str) -> World:
    try:
        rank, size, local = (int(env[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise BadInput(f"{by} set {names[0]} and {names[1]}, but {error}", "start it by torchrun or srun") from error
    if not 0 <= rank < size:
        raise BadInput(f"{by} set {names[0]}={rank} and {names[1]}={size}", "ranks go from 0 to the number less one")
    return World(rank, size, local, by)


def meeting_place(environ: Mapping[str, str]) -> dict[str, str]:
    """Where Slurm's processes meet: MASTER_ADDR, the step's first machine, and MASTER_PORT, from the job's number.

    Example:
        >>> meeting_place({"SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_JOB_ID": "41234"})
        {'MASTER_ADDR': 'gpu07', 'MASTER_PORT': '16234'}
        >>> meeting_place({"SLURM_STEP_NODELIST": "a1,a2", "SLURM_JOB_ID": "7", "MASTER_PORT": "29500"})
        {'MASTER_ADDR': 'a1', 'MASTER_PORT': '29500'}
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    first = re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", nodes, count=1).split(",")[0]
    port = 15000 + int(environ.get("SLURM_JOB_ID", "0")[-4:])
    return {"MASTER_ADDR": environ.get("MASTER_ADDR", first), "MASTER_PORT": environ.get("MASTER_PORT", str(port))}


def need(ranks: int, what: str) -> None:
    """Raises NotApplicable where there are fewer processes than `ranks`, or they cannot be dealt out evenly."""
    size = found().size
    if size < ranks or size % ranks:
        reason = f"{what} needs {ranks} processes, or a multiple, and there {'is 1' if size == 1 else f'are {size}'}"
        raise NotApplicable(reason, f"quadriga train … --nproc {ranks}, or torchrun --nproc-per-node {ranks}")
