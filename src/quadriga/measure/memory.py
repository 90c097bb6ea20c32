"""Memory of a process. Imports no torch at the top, so that an arm can read its memory before it loads anything."""

from __future__ import annotations

import contextlib
import resource
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def resident() -> int:
    """Bytes that this process holds in memory now; 0 where the system does not tell."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes that this process has held in memory.

    Linux's VmHWM is read, since `ru_maxrss` of a fresh process still holds the peak of the process that started it.
    """
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Let `peak_resident` start again from what is held now (Linux); elsewhere the peak stays as it was."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def peak(arm: Mapping[str, Any], inputs: Mapping[int, Any], *, folder: Path | None = None, timeout: float = 300.0) -> int:
    """Peak memory that loading and running an arm adds to a fresh process that has imported torch, in bytes; of tensors on a
    GPU too, without what CUDA itself takes there.

    Args:
        arm: as in `latency.paired`.
        inputs: for each batch size, the inputs tree.
        folder: for the inputs file; a temporary one if None.
        timeout: seconds until the process is killed.

    Raises:
        ArmFailed: the process ended, hung, or the model could not be run.
    """
    from quadriga.measure.latency import arm_spec, write_inputs
    from quadriga.measure.process import Process

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        process = Process("memory", arm_spec(arm, write_inputs(inputs, place)), place)
        try:
            process.ask({"do": "ready"}, timeout)
            for batch in inputs:
                process.ask({"do": "warm", "batch": batch, "seconds": 0.0}, timeout)
            return int(process.ask({"do": "end"}, timeout)["growth"])
        finally:
            process.close()
