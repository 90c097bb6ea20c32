"""Whose an output folder is: a marker says that it is ours and what for, and a lock that nobody else is at it. No torch."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from quadriga.core.errors import BadInput, Mishap
from quadriga.core.files import atomic_write

MARK, LOCK = ".quadriga.json", ".lock"
WORK = "work"  # subfolder of what only serves on the way: nothing else is ever deleted
BUILT, TIMING = f"{WORK}/built", f"{WORK}/timing"
KINDS = {"study": "quadriga run", "training": "quadriga train", "comparison": "quadriga compare", "profile": "quadriga profile"}
OLDER = {"study.sqlite": "study", "records.json": "study", "train.json": "training"}  # in folders without a marker
FEW = 3  # files that are named
PATIENCE, TICK = 3.0, 0.1  # seconds that a lock is waited for, and between two tries


def claim(folder: str | Path, kind: str) -> IO[str]:
    """Make a folder ours, or find it so, and lock it; closing the handle gives the lock back, as does the process's end.

    Args:
        folder: made where it is missing.
        kind: one of KINDS.

    Raises:
        BadInput: there is something else in it, or of another kind, or another process is at it.
        Mishap: it cannot be written.

    Example:
        >>> import tempfile
        >>> with claim(Path(tempfile.mkdtemp()) / "out", "training") as lock:
        ...     lock.writable()
        True
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check(folder, kind)
        handle = open(folder / LOCK, "a+")  # noqa: SIM115 (held until it is closed)
    except OSError as error:
        raise Mishap(f"{folder} cannot be written: {error.strerror}", "choose another --out folder") from error
    try:
        _lock(handle)
        if _kind(folder) is None:
            atomic_write(folder / MARK, json.dumps({"format": 1, "kind": kind, "by": KINDS[kind]}) + "\n")
    except BlockingIOError:
        handle.close()
        raise BadInput(f"another run has {folder} open", "wait for it, or choose another --out folder") from None
    except BaseException:
        handle.close()
        raise
    return handle


def _lock(handle: IO[str], patience: float = PATIENCE, sleep: Callable[[float], None] = time.sleep) -> None:
    """Take the lock; the processes of a command that was just killed may hold it for a moment."""
    for _ in range(max(1, round(patience / TICK))):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sleep(TICK)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def claimed(folder: str | Path, kind: str) -> Iterator[Path]:
    """A folder that is ours while the block runs. As `claim`."""
    with claim(folder, kind):
        yield Path(folder)


def _check(folder: Path, kind: str) -> None:
    known = _kind(folder)
    if known == kind:
        return
    if known is not None:
        by = KINDS.get(known, "another version of Quadriga")
        raise BadInput(f"{folder} holds a {known}, written by {by}", f"choose another --out folder for {KINDS[kind]}")
    strangers = sorted(p.name for p in folder.iterdir() if p.name != LOCK and not p.name.endswith(".part"))
    if strangers:
        told = ", ".join(strangers[:FEW]) + (f" and {len(strangers) - FEW} more" if len(strangers) > FEW else "")
        raise BadInput(f"{folder} is not empty, and is not ours: it holds {told}", "choose a new or an empty --out folder")


def _kind(folder: Path) -> str | None:
    """What a folder is for; None where it is not ours."""
    try:
        told: Any = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return str(told["kind"])
    except FileNotFoundError:
        return next((kind for name, kind in OLDER.items() if (folder / name).is_file()), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / MARK} is damaged: {error}", "choose another --out folder") from error
