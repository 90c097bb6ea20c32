"""A process that must not outlive the one that started it. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the one that started it is gone (Linux); elsewhere the closed pipe ends it."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def first_to_go() -> None:
    """Where memory runs out, let the kernel end this process before the one that started it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
