"""The command in a process of its own, and one outside that says how it ended. Imports no torch.

User code may do anything to the process that it runs in: end it with status 0, hang, fork, crash. So whoever called the command
talks to a process without user code, which gives a status of ours only where ours was said over a pipe.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from quadriga.core import world
from quadriga.core.parent import die_with_parent

VARIABLE = "QUADRIGA_SUPERVISED"  # "PID FD" of who waits, and where it is told
VERBS = ("run", "train", "profile", "compare")  # those that run code of the user's
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
LOADING = 900.0  # seconds in which a workload has to be loaded, and looked over
Failed = Callable[[str, str, str], int]  # status, problem, remedy → exit status


def wanted(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a command is to be supervised: it runs code of the user's, and nobody waits for it in this way."""
    return bool(words) and words[0] in VERBS and VARIABLE not in environ and not world.found(environ).by


def supervised(words: Sequence[str], failed: Failed) -> int:
    """Run the command in a process of its own, to its end by whatever way.

    Args:
        words: behind the program's name.
        failed: says for people, and in JSON where it is asked for, how it ended; called where the process could not.

    Returns:
        the exit status that the process told, or what `failed` gives.
    """
    ears, mouth = os.pipe()
    command = [sys.executable, "-m", "quadriga", *words]
    env = {**os.environ, VARIABLE: f"{os.getpid()} {mouth}"}
    with _Signals() as signals:
        process = subprocess.Popen(command, env=env, pass_fds=(mouth,), process_group=0)
        os.close(mouth)
        signals.to(process)
        heard = _Heard()
        threading.Thread(target=_listen, args=(ears, heard), daemon=True).start()
        _wait(process, heard)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what user code left behind
    if heard.status is not None:
        return heard.status
    status, problem, remedy = _why(process.returncode, heard)
    return failed(status, problem, remedy) if status == "interrupted" else failed(status, problem, remedy) and 1


@dataclass
class _Heard:
    """What the process told: its status, and what it is at within which limit."""

    status: int | None = None
    doing: str = ""
    until: float = float("inf")
    late: bool = False
    done: queue.Queue[None] = field(default_factory=queue.Queue)


def _listen(ears: int, heard: _Heard) -> None:
    with open(ears, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                told = json.loads(line)
                if "status" in told:
                    heard.status = int(told["status"])
                    heard.done.put(None)
                else:
                    heard.doing, seconds = str(told["doing"]), told["limit"]
                    heard.until = time.monotonic() + float(seconds) if seconds else float("inf")


def _wait(process: subprocess.Popen[bytes], heard: _Heard) -> None:
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        if process.poll() is None and time.monotonic() > heard.until:
            heard.late = True
            process.kill()
            process.wait()
    if heard.status is None:  # the pipe may be read a moment later
        with suppress(queue.Empty):
            heard.done.get(timeout=0.5)


def _why(code: int, heard: _Heard) -> tuple[str, str, str]:
    """Status, problem and remedy of a process that did not say how it ended."""
    during = f" while {heard.doing}" if heard.doing else ""
    if heard.late:
        remedy = "look for what hangs: a download, a lock, a loop; or make it smaller"
        return "failed", f"{heard.doing} took longer than {LOADING:.0f} s, so it was ended", remedy
    if code in (-signal.SIGINT, -signal.SIGTERM):  # asked for twice
        return "interrupted", "interrupted at once", "resume with the same command"
    if code in (-signal.SIGKILL, -signal.SIGHUP):
        name = signal.Signals(-code).name
        return "failed", f"the process was ended by {name}{during}, by another or for its memory", "run the same command again"
    if code < 0:
        return "failed", f"the code that it ran ended the process by {signal.Signals(-code).name}{during}", "correct it there"
    return "failed", f"the code that it ran ended the process with status {code}{during}", "take the exit out of it"


class _Signals:
    """Ctrl-C and a stop by the terminal go on to the process, which has a group of its own."""

    def __enter__(self) -> _Signals:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._before = {n: signal.signal(n, self._pass_on) for n in PASSED_ON}
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._stop)
        return self

    def to(self, process: subprocess.Popen[bytes]) -> None:
        """From now on to this process."""
        self._process = process
        for number in self._early:
            process.send_signal(number)

    def _pass_on(self, number: int, frame: object) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)

    def _stop(self, number: int, frame: object) -> None:
        self._group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # until the shell lets it go on
        self._group(signal.SIGCONT)

    def _group(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if self._process is not None:
                os.killpg(self._process.pid, number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


_mouth: int | None = None  # in the process itself: where it tells who waits for it


def begin() -> None:
    """In the process itself: end with who waits for it. The processes that it starts are not supervised in this way."""
    global _mouth
    if told := os.environ.pop(VARIABLE, ""):
        parent, _mouth = map(int, told.split())
        os.set_inheritable(_mouth, False)
        die_with_parent(parent)


def end(status: int) -> int:
    """Tell who waits how the command ended, and return it."""
    _tell({"status": status})
    return status


@contextmanager
def within(doing: str, limit: float = LOADING) -> Iterator[None]:
    """What is done in the block has so many seconds, if somebody waits for this process; else as long as it takes."""
    _tell({"doing": doing, "limit": limit})
    try:
        yield
    finally:
        _tell({"doing": "", "limit": 0})


def _tell(message: Mapping[str, Any]) -> None:
    if _mouth is not None:
        with suppress(OSError):
            os.write(_mouth, (json.dumps(message) + "\n").encode())
