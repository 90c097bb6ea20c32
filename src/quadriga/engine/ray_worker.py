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
        spec: plain data: workload, folder, seed, key.
        environment: variables for this process.
    """

    def __init__(self, spec: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        self.spec, self.desk, self.refused = spec, None, dict[str, Any]()

    def ready(self) -> int:
        """PyTorch and the workload are there, so that an order's time begins with its work; the process's number."""
        import torch

        from quadriga.engine.admission import admitted, fatal

        torch.set_num_threads(1)
        try:
            self.desk = admitted(self.spec)
        except BadInput as error:
            self.refused = fatal(error)
        gc.freeze()  # as in `engine.worker`
        return os.getpid()

    def do(self, task: str, args: Mapping[str, Any], rank: Mapping[str, str]) -> dict[str, Any]:
        """Carry out a task, as `Desk.do`; `rank` is the environment by which the ranks of an order find one another."""
        os.environ.update(rank)
        if self.desk is None:
            return json.loads(json.dumps(self.refused))
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
