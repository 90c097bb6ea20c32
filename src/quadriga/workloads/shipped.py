"""The data inside the package, each file checked against SHA256SUMS when it is read."""

from __future__ import annotations

import hashlib
import lzma
import os
import sys
from functools import cache
from pathlib import Path

from quadriga.core.errors import BadInput

FOLDER = Path(__file__).parent / "data"


def digest(raw: bytes) -> str:
    """The SHA-256 of bytes, as hexadecimal digits."""
    return hashlib.sha256(raw).hexdigest()


@cache
def checksums(folder: Path = FOLDER) -> dict[str, str]:
    """File name → SHA-256, as `SHA256SUMS` says.

    Raises:
        BadInput: the list is missing.
    """
    try:
        lines = (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise BadInput(f"{folder / 'SHA256SUMS'} cannot be read: {error.strerror}", "reinstall quadriga") from error
    return {name: value for value, name in (line.split(maxsplit=1) for line in lines)}


def read(name: str, folder: Path = FOLDER) -> bytes:
    """The decompressed content of a shipped `.xz` file.

    Raises:
        BadInput: it is missing, or its SHA-256 is not the listed one.
    """
    try:
        packed = (folder / name).read_bytes()
    except OSError as error:
        raise BadInput(f"the shipped data file {name} cannot be read: {error.strerror}", "reinstall quadriga") from error
    if digest(packed) != checksums(folder).get(name):
        raise BadInput(
            f"the shipped data file {folder / name} is damaged: its SHA-256 is not the listed one", "reinstall quadriga"
        )
    return lzma.decompress(packed)


def cache_folder() -> Path:
    """Where downloaded data is kept: `$QUADRIGA_CACHE`, else `quadriga` in the platform's cache folder."""
    if given := os.environ.get("QUADRIGA_CACHE"):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quadriga"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "quadriga" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quadriga"
