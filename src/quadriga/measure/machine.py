"""Facts about the machine that every record carries; nothing that names the host, its user or its folders."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
