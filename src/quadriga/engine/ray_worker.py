"""What runs in Ray's worker processes. Imports no torch by itself: the environment is set before."""

from __future__ import annotations

import gc
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadriga import __version__
from quadriga.core.errors import BadInput


class Worker:
    """A process that does the orders of one study, one after the other; or one rank of those who do an order together.

    Args:
        spec: plain data: workload, folder, seed.
        environment: variables for this process.
    """

    def __init__(self, spec: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        self.spec, self.desk = spec, None

    def ready(self) -> int:
        """PyTorch is there; the process's number."""
        import torch

        torch.set_num_threads(1)
        return os.getpid()

    def do(self, task: str, args: Mapping[str, Any], rank: Mapping[str, str]) -> dict[str, Any]:
        """Carry out a task, as `Desk.do`; `rank` is the environment by which the ranks of an order find one another."""
        os.environ.update(rank)
        from quadriga.core.trial import Status
        from quadriga.engine.tasks import Desk
        from quadriga.workloads import load

        if self.desk is None:
            try:
                self.desk = Desk(load(self.spec["workload"]), Path(self.spec["folder"]), self.spec["seed"])
            except BadInput as error:
                return {"status": str(Status.CRASHED), "reason": str(error), "bad_input": [error.problem, error.remedy]}
            gc.freeze()  # as in `engine.worker`
        if rank:
            from quadriga.engine import together

            return json.loads(json.dumps(together.do(self.desk, task, args)))
        return json.loads(json.dumps(self.desk.do(task, args)))

    def meeting_place(self) -> tuple[str, int]:
        """Address and a free port of this machine."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]


def look(folder: str, name: str, text: str) -> dict[str, Any]:
    """What a machine is, and whether it sees a file of the study's folder as the driver wrote it, and can write there."""
    from quadriga.measure.machine import facts

    file = Path(folder) / name
    try:
        sees = file.read_text() == text
        own = file.with_name(f"{name}.{socket.gethostname()}.{os.getpid()}")
        own.write_text(text)
        own.unlink()
    except OSError:
        sees = False
    return {"sees": sees, "facts": facts(), "version": __version__}
