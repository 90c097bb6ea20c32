"""One temporary folder for a command and all that it starts, gone with it; those of dead commands go at the next start.

Imports no torch.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX, LOCK, VARIABLE = "quadriga-scratch-", ".alive", "TMPDIR"


@contextmanager
def scratch() -> Iterator[Path]:
    """Make it the place for temporary files of this process and its children, while the block runs; one inside another is one.

    Example:
        >>> with scratch() as place:
        ...     Path(tempfile.gettempdir()) == place
        True
        >>> place.exists()
        False
    """
    if (Path(tempfile.gettempdir()) / LOCK).is_file():
        yield Path(tempfile.gettempdir())
        return
    sweep(Path(tempfile.gettempdir()))
    before, place = os.environ.get(VARIABLE), Path(tempfile.mkdtemp(prefix=PREFIX))
    with open(place / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.environ[VARIABLE], tempfile.tempdir = str(place), None
        try:
            yield place
        finally:
            tempfile.tempdir = None
            if before is None:
                os.environ.pop(VARIABLE, None)
            else:
                os.environ[VARIABLE] = before
            shutil.rmtree(place, ignore_errors=True)


def sweep(folder: Path) -> int:
    """Remove what dead commands left; a living one holds its lock. Returns how many there were."""
    gone = 0
    for place in folder.glob(f"{PREFIX}*"):
        with suppress(OSError), open(place / LOCK, "r+") as lock:  # of another user, or just being made
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)
            gone += 1
    return gone
