"""Atomic writes: a temporary file, fsync, rename, fsync of the folder. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput, Mishap
from quadriga.core.secrets import redacted

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # no room, no quota, an error of the disk
DEPTH = 16  # errors that an error may stand on
MOST_TEXT = 1 << 28  # bytes of a text file that is read


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all; an older file of that name stays until the new one is safe. Text goes without secrets.

    Raises:
        Mishap: no space is left, or the folder cannot be written; nothing of the old file is lost.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(redacted(data).encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        fsync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # where there is a file in place of the folder, there is nothing to remove either
            part.unlink(missing_ok=True)
        problem = f"{path} could not be written: {error.strerror or error}"
        raise Mishap(problem, "free space or choose another folder") from error


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that a disk has no room, or fails.

    Example:
        >>> disk_is_full(OSError(errno.ENOSPC, "No space left on device")), disk_is_full(OSError(errno.ENOENT, "no file"))
        (True, False)
    """
    seen = 0
    while error is not None and seen < DEPTH:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(os.strerror(number) in str(error) for number in FULL):  # libraries that write by themselves say it in words
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def fsync_folder(folder: str | Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain data as indented JSON, atomically; NaN and infinities are refused."""
    atomic_write(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """Read a text file in UTF-8.

    Args:
        most: bytes; a larger one is refused before it is read.

    Raises:
        BadInput: it is missing, no file, too large, or not UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path} is no file", "check the path")
        if (size := path.stat().st_size) > most:
            raise BadInput(f"{path} has {size:,} bytes, and {most:,} are read at most", "check the path")
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist", "check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is damaged, or not in UTF-8: {error}", "save it in UTF-8") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}", "check the path and its permissions") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        BadInput: it is missing or damaged.
    """
    try:
        return parse_json(read_text(path))
    except BadInput as error:
        remedy = error.remedy or "restore it, or delete it to start again"
        raise BadInput(
            error.problem if str(path) in error.problem else f"{path} is damaged: {error.problem}", remedy
        ) from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        BadInput: it is none, is nested too deeply, or has a number that no computer keeps.

    Example:
        >>> parse_json('{"a": [1, 2]}')
        {'a': [1, 2]}
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise BadInput("it is nested too deeply") from error
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from error


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
