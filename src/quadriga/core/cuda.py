"""NVIDIA GPUs: what this machine has, asked once a process, and waiting for what runs there. Imports torch only when asked."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

INSTALL = "install a PyTorch with CUDA, as pytorch.org/get-started says"
DRIVER = "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Found:
    """What there is.

    Args:
        devices: rows of plain data: name, capability such as "9.0", memory in bytes, and whether bf16, fp16 and tf32 are
            multiplied natively.
        toolkit: the CUDA version that PyTorch was built with, "" for none.
        driver: the version of NVIDIA's driver, "" where the system does not tell.
        reason: why none can be used, "" if one can.
        remedy: a command or a step that changes it.
    """

    devices: tuple[dict[str, Any], ...] = ()
    toolkit: str = ""
    driver: str = ""
    reason: str = ""
    remedy: str = ""

    @property
    def used(self) -> dict[str, Any] | None:
        """The device that models go to: the first that CUDA shows to this process."""
        return self.devices[0] if self.devices else None


@cache
def found() -> Found:
    """The GPUs of this machine. Never raises; the answer is kept for the process, and no memory of a GPU is taken for it."""
    import torch

    if not torch.backends.cuda.is_built():
        return Found(driver=driver(), reason="this PyTorch is built without CUDA", remedy=INSTALL)
    facts = {"toolkit": str(torch.version.cuda or ""), "driver": driver()}
    with warnings.catch_warnings(record=True) as told:  # of a driver that is absent or too old
        warnings.simplefilter("always")
        try:
            there = torch.cuda.is_available()
            rows = tuple(_row(torch, i) for i in range(torch.cuda.device_count())) if there else ()
        except RuntimeError as error:
            return Found((), **facts, reason=f"CUDA does not start: {_line(error)}", remedy=DRIVER)
    if not rows:
        why = f": {_line(told[0].message)}" if told else ""
        return Found((), **facts, reason=f"there is no NVIDIA GPU{why}", remedy=DRIVER)
    if not runs(rows[0]["capability"], torch.cuda.get_arch_list()):
        reason = f"this PyTorch has no kernels for {rows[0]['name']} (capability {rows[0]['capability']})"
        return Found((), **facts, reason=reason, remedy="install a PyTorch build that still supports it")
    return Found(rows, **facts)


def _row(torch: Any, index: int) -> dict[str, Any]:
    facts, amd = torch.cuda.get_device_properties(index), torch.version.hip is not None
    ampere, volta = (8, 0) <= (facts.major, facts.minor), (7, 0) <= (facts.major, facts.minor)
    native = {"bf16": amd or ampere, "fp16": amd or volta, "tf32": ampere and not amd}
    return {"name": facts.name, "capability": f"{facts.major}.{facts.minor}", "memory": int(facts.total_memory), **native}


def runs(capability: str, built: Iterable[str]) -> bool:
    """Whether a build of PyTorch has kernels for a device.

    Args:
        capability: of the device.
        built: such as "sm_80", machine code for this and later minor versions, or "compute_90", compiled when loaded for
            any later device; names of another form, and none at all, say nothing.

    Example:
        >>> runs("8.6", ["sm_75", "sm_80"]), runs("6.1", ["sm_75", "sm_80"]), runs("12.1", ["sm_80", "compute_90"])
        (True, False, True)
    """
    major, minor = map(int, capability.split("."))
    known = [m for name in built if (m := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name))]
    codes = [(m[1], int(m[2]), int(m[3])) for m in known]
    return not codes or any(
        (kind == "sm" and a == major and b <= minor) or (kind == "compute" and (a, b) <= (major, minor)) for kind, a, b in codes
    )


def driver(path: str | Path = "/proc/driver/nvidia/version") -> str:
    """The version of NVIDIA's driver, as Linux tells it; "" without one."""
    try:
        told = re.search(r"Kernel Module\D*?(?:x86_64|aarch64)?\s+(\d+\.[\d.]+)", Path(path).read_text())
    except OSError:
        return ""
    return told[1] if told else ""


def _line(error: object) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def settle(tree: Any) -> None:
    """Wait until the values of outputs are there: a GPU computes while the caller goes on. Those in main memory are.

    Example:
        >>> settle(({"y": None}, 3))
    """
    if getattr(tree, "is_cuda", False):
        sys.modules["torch"].cuda.synchronize(tree.device)
    elif isinstance(tree, Mapping):
        settle(tuple(tree.values()))
    elif isinstance(tree, tuple | list):
        for part in tree:
            settle(part)


def synchronize(device: str) -> None:
    """Wait for all that was started on a device; on the CPU it is done."""
    if device != "cpu":
        sys.modules["torch"].cuda.synchronize()


def peak_allocated() -> int:
    """The most bytes that tensors of this process held on the GPU; 0 where it used none."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.max_memory_allocated()) if torch is not None and torch.cuda.is_initialized() else 0
