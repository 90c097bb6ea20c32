"""A worker's process as its driver sees it: a session of its own, lines in and out, a bounded log, its memory, and its end.

What user code starts belongs to the session and ends with it. Nothing here waits for a pipe that a child of the worker might
hold open, or keeps more of what is printed than its end.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from quadriga.engine.base import SINGLE

SAID = 1 << 16  # bytes that are kept of what was printed
LOOK = 0.5  # seconds between two looks at the memory and at whether it lives
END = None  # in the queue of lines: the pipe was closed
KILLS = (Path("/proc/vmstat"), "oom_kill")  # where the kernel counts the processes that it killed for memory


class Process:
    """A running worker.

    Args:
        spec: what it is told, as JSON.

    Attributes:
        peak: bytes of memory that it and its children had at most, as far as they were looked at.
    """

    def __init__(self, spec: str) -> None:
        self._kills, self.peak, self.began = kills(), 0, time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "quadriga.engine.worker", spec],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **SINGLE}, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: deque[bytes] = deque()
        self._size = 0
        self._brood: dict[int, psutil.Process] = {}  # what it started, as far as it was seen
        for pipe, keep, most in ((self._process.stdout, self._heard, -1), (self._process.stderr, self._printed, SAID)):
            threading.Thread(target=_read, args=(pipe, keep, most), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def tell(self, message: Mapping[str, Any]) -> bool:
        """Send a line; False where it does not listen any more."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """The next line that it sends, or None when it ends or the time is over."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=min(left, LOOK))
            except queue.Empty:
                self._look()
                if not self.alive and self._lines.empty():  # a child of its own may hold the pipe open
                    return None
                continue
            if line is END:
                return None
            with suppress(ValueError):  # a line that user code wrote into our pipe
                if isinstance(message := json.loads(line), dict):
                    return message
        return None

    def _heard(self, line: bytes | None) -> None:
        self._lines.put(END if line is None else line.decode(errors="replace"))

    def _printed(self, line: bytes | None) -> None:
        if line is not None:
            self._said.append(line)
            self._size += len(line)
            while self._size > SAID and len(self._said) > 1:
                self._size -= len(self._said.popleft())

    @property
    def last_words(self) -> str:
        """The last line that it printed, or ""."""
        said = b"".join(self._said).decode(errors="replace").strip().splitlines()
        return said[-1][:300] if said else ""

    def _look(self) -> None:
        """Its children, and the memory of all of them."""
        with suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            self._brood = {**self._brood, **{p.pid: p for p in own.children(recursive=True)}}
            self.peak = max(self.peak, own.memory_info().rss + sum(map(_memory, self._brood.values())))

    def ended(self, patience: float = 2.0) -> int:
        """How it ended, as `subprocess` counts: its status, or minus the signal. What it started is ended too."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self.kill()
        return int(self._process.returncode)

    @property
    def starved(self) -> bool:
        """Whether the kernel has killed a process for memory since it began."""
        return kills() > self._kills

    def kill(self) -> None:
        """End it, its session, and what left its session."""
        self._look()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for child in self._brood.values():
            with suppress(psutil.Error):  # also where its number has become another process's
                child.kill()
        self._process.wait()

    def close(self) -> None:
        """Let go of the pipes; those that are read close when their readers come to the end."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


def _read(pipe: IO[bytes], keep: Callable[[bytes | None], None], most: int) -> None:
    """Lines of a pipe to its end; those that are longer than `most` bytes come in pieces."""
    with pipe, suppress(ValueError):
        while piece := pipe.readline(most):
            keep(piece)
    keep(None)


def _memory(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def kills() -> int:
    """How many processes the kernel has killed for memory since it was started; 0 where it does not say."""
    file, name = KILLS
    with suppress(OSError, ValueError):
        return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name), 0)
    return 0
