"""Both ends of an arm's pipe: one JSON line asks, one JSON line answers. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class ArmFailed(Exception):
    """An arm's process ended, hung, or could not run its model; the text is for people."""


class Arm(Protocol):
    """What `latency.paired` needs of an arm; tests put simulated ones in its place."""

    def ask(self, command: Mapping[str, Any], timeout: float) -> Mapping[str, Any]:
        """Send a command and wait for its answer. Raises ArmFailed."""

    def close(self) -> None:
        """End it, however it stands."""


PAUSE = 0.005  # seconds before a block: threads of the arm before it that still spin (some milliseconds) then sleep


def user_environment() -> dict[str, str]:
    """The environment of an arm: the user's own, so that an opponent is as fast as its user knows it.

    Forbidding OpenMP threads to spin (OMP_WAIT_POLICY=PASSIVE) made eager PyTorch with two threads 2.6 times slower at
    batch 1 on a LeNet and 1.6 times at batch 64, which would have flattered whatever it is compared with.
    """
    here = Path(__file__).resolve().parents[2]
    paths = [str(here), *(p or os.getcwd() for p in sys.path)]
    return {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


class Process:
    """An arm in a process of its own, started at once and answering when asked.

    Args:
        name: of the arm, for messages.
        spec: plain data, its first line of input.
        folder: takes its standard error as `<name>.log`.
    """

    def __init__(self, name: str, spec: Mapping[str, Any], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"
        command = [sys.executable, "-P", "-m", "quadriga.measure.arm", str(os.getpid())]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=user_environment(),
                start_new_session=True,  # so that its own children can be ended with it
            )
        self.buffer, self.closed = b"", False
        self._send({**spec, "launched": time.monotonic()})

    def ask(self, command: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            ArmFailed: no answer within `timeout` seconds (it is killed), the process ended, or it answers with an error.
        """
        if command.get("do") == "block":
            time.sleep(PAUSE)
        self._send(command)
        answer: dict[str, Any] = json.loads(self._line(timeout))
        if "error" in answer:
            raise ArmFailed(answer["error"])
        return answer

    def close(self) -> None:
        """Kill the process and what it started, and collect it."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        self.process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # its last words, or its end, are then read by `_line`
            self.process.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def _line(self, timeout: float) -> bytes:
        deadline, poll = time.monotonic() + timeout, select.poll()
        handle = self.process.stdout.fileno()  # type: ignore[union-attr]
        poll.register(handle, select.POLLIN | select.POLLHUP)
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                self.close()
                raise ArmFailed(f"no answer within {timeout:g} s; killed{self._tail()}")
            part = os.read(handle, 65536)
            if not part:
                raise self._ended()
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def _ended(self) -> ArmFailed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        return ArmFailed(f"the process ended with status {self.process.poll()}{self._tail()}")

    def _tail(self) -> str:
        text = self.log.read_bytes()[-2000:].decode(errors="replace").strip() if self.log.exists() else ""
        return f": {text}" if text else ""
