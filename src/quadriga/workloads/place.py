"""Where in the user's own code an error arose."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path

import torch

_PATHS = sysconfig.get_paths()
_OURS = Path(__file__).resolve().parents[1]
_FOREIGN = tuple(
    {str(Path(p).resolve()) for p in (_PATHS["stdlib"], _PATHS["purelib"], _PATHS["platlib"], Path(torch.__file__).parent)}
)


def place(error: BaseException) -> str:
    """`file.py:12`, the innermost line of a file that is neither a library's nor Quadriga's own; "" if there is none.

    Example:
        >>> place(ValueError("never raised"))
        ''
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_users(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def here() -> str:
    """`file.py:12`, the innermost line of the user's code that is running now, below Quadriga's own call of it; "" if none."""
    frames = list(reversed(traceback.extract_stack()))
    start = next((k for k, f in enumerate(frames) if not _is_ours(f.filename)), len(frames))
    for frame in frames[start:]:
        if _is_users(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
        if _is_ours(frame.filename):
            return ""
    return ""


def _is_ours(filename: str) -> bool:
    return not filename.startswith("<") and Path(filename).resolve().is_relative_to(_OURS) and not _is_users(filename)


def told(error: BaseException) -> str:
    """The place, the kind and the first line of an error, for a sentence about it."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{at}: {text}" if (at := place(error)) else text


def _is_users(filename: str) -> bool:
    if filename.startswith("<frozen") or filename in ("<string>", "<doctest>"):
        return False
    path = Path(filename).resolve() if not filename.startswith("<") else Path(filename)
    if path.is_relative_to(_OURS):
        return path.is_relative_to(_OURS / "workloads" / "ready")
    return not str(path).startswith(_FOREIGN) and not str(path).startswith(sys.base_prefix + "/lib")
