"""The OpenCL platforms and devices of this machine, asked of libOpenCL in a process of its own: a driver may crash or hang.

Run as a program it prints what it finds as JSON, so it imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

INSTALL = "apt-get install pocl-opencl-icd ocl-icd-libopencl1 (the CPU), or the OpenCL driver of your GPU's vendor"
KINDS = {2: "cpu", 4: "gpu", 8: "accelerator", 16: "custom"}  # CL_DEVICE_TYPE_*
GPU, DEFAULT, ALL = 4, 1, 0xFFFFFFFF
NO_DEVICE, NO_PLATFORM = -1, -1001  # CL_DEVICE_NOT_FOUND, CL_PLATFORM_NOT_FOUND_KHR
PLATFORM_NAME, DEVICE_NAME, DEVICE_TYPE, DEVICE_VERSION = 0x0902, 0x102B, 0x1000, 0x102F
TIMEOUT = 60  # seconds


class Absent(Exception):
    """Why there is no OpenCL device, and what would change it."""

    def __init__(self, reason: str, remedy: str = INSTALL) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class Found:
    """What there is.

    Args:
        devices: rows of plain data: platform, device, kind ("gpu", "cpu", ...), version, and whether it is the one used.
        reason: why none can be used, "" if one can.
        remedy: a command or a step that changes it.
    """

    devices: tuple[dict[str, Any], ...] = ()
    reason: str = ""
    remedy: str = ""

    @property
    def used(self) -> dict[str, Any] | None:
        """The device that models run on: the first GPU of the first platform, or that platform's default device."""
        return next((row for row in self.devices if row["used"]), None)


@cache
def found() -> Found:
    """The OpenCL devices of this machine. Never raises, whatever the drivers do; the answer is kept for the process."""
    try:
        done = subprocess.run([sys.executable, "-I", __file__], capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found((), f"the OpenCL drivers gave no answer ({type(error).__name__})", "clinfo -l shows which one hangs")
    try:
        row = json.loads(done.stdout.splitlines()[-1])
        return Found(tuple(row["devices"]), row["reason"], row["remedy"])
    except (IndexError, ValueError, KeyError, TypeError):
        return Found(
            (), f"an OpenCL driver ended the process that asked it (status {done.returncode})", "clinfo -l shows which"
        )


def ask(load: Callable[[], Any] | None = None) -> Found:
    """Ask in this process.

    Args:
        load: gives the library; by default the one that tinygrad would load.
    """
    try:
        rows = devices((load or library)())
    except Absent as none:
        return Found((), none.reason, none.remedy)
    if not rows:
        return Found((), "no OpenCL platform has a device", INSTALL)
    if not any(row["used"] for row in rows):
        remedy = f"OCL_ICD_VENDORS=<the .icd file of {rows[0]['platform']}> names the platform to use"
        return Found(tuple(rows), "the first OpenCL platform has no device, and tinygrad asks no other", remedy)
    return Found(tuple(rows))


def library() -> Any:
    """libOpenCL from the folders where tinygrad looks for it, or from OPENCL_PATH.

    Raises:
        Absent: there is none, or it does not load.
    """
    named = os.environ.get("OPENCL_PATH", "")
    folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep), "/usr/lib64", "/usr/lib", "/usr/local/lib"]
    folders += ["/usr/lib/wsl/lib", "/lib", "/lib64", f"/lib/{sysconfig.get_config_var('MULTIARCH')}"]
    paths = [Path(named)] if named and Path(named).is_file() else []
    for folder in (Path(f) for f in folders if f and Path(f).is_dir()):
        paths += [p for p in sorted(folder.iterdir()) if re.fullmatch(r"libOpenCL\.so\.?[0-9]*", p.name) and p.is_file()]
    if not paths:
        raise Absent("there is no libOpenCL.so")
    try:
        return ctypes.CDLL(str(paths[0]))
    except OSError as error:
        raise Absent(f"{paths[0]} does not load: {error}") from error


def devices(cl: Any) -> list[dict[str, Any]]:
    """Every device of every platform, as rows of `Found`.

    Raises:
        Absent: the library knows no platform, or fails.
    """
    rows = []
    for number, platform in enumerate(_ids(cl.clGetPlatformIDs)):
        name = _text(cl.clGetPlatformInfo, platform, PLATFORM_NAME)
        used = None if number else _first(cl, platform)
        for device in _ids(cl.clGetDeviceIDs, platform, ALL):
            kind = ctypes.c_uint64()
            cl.clGetDeviceInfo(device, DEVICE_TYPE, ctypes.c_size_t(8), ctypes.byref(kind), None)
            rows.append({
                "platform": name, "device": _text(cl.clGetDeviceInfo, device, DEVICE_NAME),
                "kind": next((v for k, v in KINDS.items() if kind.value & k), "other"),
                "version": _text(cl.clGetDeviceInfo, device, DEVICE_VERSION), "used": device.value == used,
            })  # fmt: skip
            used = None if rows[-1]["used"] else used
    return rows


def _first(cl: Any, platform: ctypes.c_void_p) -> int | None:
    """The device that tinygrad takes of a platform: its first GPU, or else the first of its default devices."""
    for kind in (GPU, DEFAULT):
        if ids := _ids(cl.clGetDeviceIDs, platform, kind):
            return ids[0].value
    return None


def _ids(function: Any, *arguments: Any) -> list[ctypes.c_void_p]:
    """What a function of the form (..., count, ids*, count*) lists.

    Raises:
        Absent: there is no platform, or it fails.
    """
    given = [a if isinstance(a, ctypes.c_void_p) else ctypes.c_uint64(a) for a in arguments]
    count = ctypes.c_uint32()
    status = function(*given, ctypes.c_uint32(0), None, ctypes.byref(count))
    if status == NO_PLATFORM or not (arguments or status or count.value):
        raise Absent("there is no OpenCL platform: no driver is installed")
    if status not in (0, NO_DEVICE):
        raise Absent(f"OpenCL answers with error {status}", "clinfo -l shows which driver fails")
    ids = (ctypes.c_void_p * count.value)()
    if not status and count.value:
        status = function(*given, count, ids, None)
    return [ctypes.c_void_p(i) for i in ids] if not status else []


def _text(function: Any, thing: ctypes.c_void_p, what: int) -> str:
    text = ctypes.create_string_buffer(1024)
    function(thing, ctypes.c_uint32(what), ctypes.c_size_t(1024), text, None)
    return text.value.decode(errors="replace")


if __name__ == "__main__":
    answer = ask()
    print(json.dumps({"devices": answer.devices, "reason": answer.reason, "remedy": answer.remedy}))
