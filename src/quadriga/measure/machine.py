"""Facts about the machine that every record carries; nothing that names the host, its user or its folders."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch


def facts() -> dict[str, Any]:
    """Processor, cores, memory, versions, thread count and accelerator, as JSON data.

    Example:
        >>> sorted(facts())[:4]
        ['accelerator', 'architecture', 'cores', 'instructions']
    """
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "accelerator": torch.cuda.get_device_name() if cuda else None,
    }


def fingerprint(of: Mapping[str, Any] | None = None) -> str:
    """Eight digits that machines share whose timings may be compared: processor, instructions, accelerator, system.

    Args:
        of: facts; this machine's by default.

    Example:
        >>> fingerprint() == fingerprint(facts()) != fingerprint({**facts(), "processor": "another"})
        True
    """
    known = (facts() if of is None else of).get
    kind = [known(name) for name in ("processor", "architecture", "instructions", "accelerator", "system")]
    return hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:8]


def load() -> float | None:
    """How many processes wanted a core in the last minute, per core; None where unknown. Above 1, timings are noisy."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


class Busy(NamedTuple):
    """What all cores have done since the machine started, in seconds of one core: at work for anyone, and in all."""

    work: float
    total: float


def busy() -> Busy:
    """What the cores have done so far; time that a virtual machine's host took away counts as work for others."""
    times = psutil.cpu_times()
    rest = times.idle + getattr(times, "iowait", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # already in user and nice
    return Busy(sum(times) - rest - guest, sum(times) - guest)


def others(before: Busy, after: Busy, own: float) -> float:
    """The share of all cores' time that others took between two looks.

    Args:
        before, after: of `busy`.
        own: seconds of processor time that are not theirs.

    Example:
        >>> others(Busy(100.0, 400.0), Busy(112.0, 420.0), own=8.0)
        0.2
    """
    passed = after.total - before.total
    return min(1.0, max(0.0, (after.work - before.work - own) / passed)) if passed > 0 else 0.0


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
