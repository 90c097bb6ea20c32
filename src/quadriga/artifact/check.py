"""Verify an artifact: its files by the manifest, then what it computes, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from quadriga.artifact.store import recover
from quadriga.core.errors import BadInput
from quadriga.runtime import standalone
from quadriga.runtime.standalone import Damaged


class Report(TypedDict):
    """What a verification found, as plain data.

    Keys:
        ok: files and outputs are as recorded.
        message: the last line that `load.py` printed, or what is damaged.
        files: how many were compared.
        seconds: it took, with the start of the process.
    """

    ok: bool
    message: str
    files: int
    seconds: float


def verify(folder: str | Path, timeout: float = 600.0) -> Report:
    """Compare the files with the manifest here, then run `load.py` in a fresh process, which runs the probes.

    Nothing of the folder is executed before its files are found to be as recorded. That shows damage, not malice:
    a manifest is not a signature.

    Raises:
        BadInput: there is no such folder.
    """
    start, folder = time.monotonic(), Path(os.path.abspath(folder))
    recover(folder)
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}", "give the folder of an artifact")
    try:
        standalone.inside(folder, "manifest.json")
        files = standalone.check_files(folder)
        standalone.inside(folder, "load.py")
    except Damaged as error:
        return Report(ok=False, message=str(error), files=0, seconds=time.monotonic() - start)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-B", str(folder / "load.py")], capture_output=True, text=True, timeout=timeout, cwd=folder
        )
    except subprocess.TimeoutExpired:
        return Report(
            ok=False, message=f"load.py did not end within {timeout:g} s", files=files, seconds=time.monotonic() - start
        )
    lines = (done.stdout.strip() or done.stderr.strip() or f"load.py ended with status {done.returncode}").splitlines()
    return Report(ok=done.returncode == 0, message=lines[-1], files=files, seconds=time.monotonic() - start)


def load(folder: str | Path, threads: int | None = None) -> Callable[..., Any]:
    """Load an artifact in this process, files and probes checked: inputs tree → outputs tree of torch tensors.

    Raises:
        quadriga.runtime.standalone.Damaged: a file is missing or changed, or outputs differ on this machine.
    """
    folder = Path(os.path.abspath(folder))
    recover(folder)
    standalone.inside(folder, "manifest.json")
    return standalone.load(folder, check=True, threads=threads)
