"""The files of the folder, read by plain names and compared with their manifest."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import json
import lzma
import os
import re
import shutil
import tempfile
import types
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"  # a plain file name
PACKED = "model.qdz"  # the model files and what runtime.json says else, in one entropy-coded file
PLACES: list[Path] = []  # folders into which packed files were decoded
RUNTIMES: dict[str, Callable[..., Any]] = {}  # name → (folder, entry, threads) → callable; filled by the parts that follow
# what readers raise where bytes are not what was written
BROKEN = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, EOFError, StopIteration, MemoryError,
    lzma.LZMAError, zlib.error,
)  # fmt: skip


class Damaged(RuntimeError):
    """A file of the folder is missing or changed, or the model does not compute what it did when it was made."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem if len(problem) <= 800 else f"{problem[:800]} …")


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder; a name that could leave it, and a link, are refused."""
    path = folder / name
    if not re.fullmatch(NAME, name) or path.is_symlink():
        raise Damaged(f"{name!r} is not a plain file of this folder")
    if not path.is_file():
        raise Damaged(f"{name} is missing")
    return path


def read_entry(folder: Path) -> dict[str, Any]:
    """What runtime.json says, checked for what this file can run."""
    try:
        entry = json.loads(inside(folder, "runtime.json").read_text(encoding="utf-8"))
        entry = _packed_entry(folder, entry) if "packed" in entry else entry
        format_, used = entry["format"], runtimes(entry)
    except BROKEN as error:
        raise Damaged(f"runtime.json is damaged: {error!r}") from error
    if format_ != FORMAT or not set(used) <= set(RUNTIMES):
        raise Damaged(f"runtime.json has format {format_!r} and runtime {used[-1]!r}, which this load.py cannot run")
    return dict(entry)


def runtimes(entry: Mapping[str, Any]) -> list[str]:
    """The runtimes that execute it, without repetition: that for a batch of one first, where it has another."""
    return list(dict.fromkeys([*([entry["alone"]["runtime"]] if "alone" in entry else []), entry["runtime"]]))


def _packed_entry(folder: Path, short: Mapping[str, Any]) -> dict[str, Any]:
    """The entry that a packed file holds; its own name takes the place of those of the files in it."""
    try:
        entry = _decoder().read_head(inside(folder, short["packed"]).read_bytes())[0]["entry"]
        return {**entry, "packed": entry["files"], "files": [short["packed"]]}
    except BROKEN as error:
        raise Damaged(f"{short['packed']} is damaged: {error!r}") from error


def unpacked(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Decode the packed model files into a private folder, which goes with the process."""
    data, place = inside(folder, entry["files"][0]).read_bytes(), Path(tempfile.mkdtemp(prefix="quadriga-"))
    PLACES.append(place)
    for number, name in enumerate(entry["packed"]):
        if not re.fullmatch(NAME, name):
            raise Damaged(f"{name!r} is not a plain file name")
        try:
            (place / name).write_bytes(_decoder().unpack(data, number))
        except BROKEN as error:
            raise Damaged(f"{entry['files'][0]} is damaged: {error!r}") from error
    return place


@atexit.register
def tidy() -> None:
    """Remove what was unpacked; models that were loaded from there, and called, go on."""
    while PLACES:
        shutil.rmtree(PLACES.pop(), ignore_errors=True)


def _decoder() -> types.ModuleType:
    """_unpack.py, which lies beside this file."""
    path = Path(__file__).resolve().with_name("_unpack.py")
    if not path.is_file():
        raise Damaged("_unpack.py is missing")
    module = types.ModuleType("_unpack")
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module


def check_files(folder: Path) -> int:
    """Compare every file with manifest.json, and return how many there are; 0 when there is no manifest."""
    if not (folder / "manifest.json").exists():
        return 0
    text = inside(folder, "manifest.json").read_bytes()
    try:
        manifest = json.loads(text)
        canonical = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
        files = {name: (row["sha256"], row["bytes"]) for name, row in manifest["files"].items()}
    except BROKEN as error:
        raise Damaged(f"manifest.json is damaged: {error!r}") from error
    if canonical != text or manifest.get("format") != FORMAT:
        raise Damaged("manifest.json is damaged: it is not as it was written")
    for name, (digest, size) in files.items():
        path = inside(folder, name)
        if path.stat().st_size != size or _sha256(path) != digest:
            raise Damaged(f"{name} is damaged: its size or SHA-256 differs from manifest.json")
    for name in ("runtime.json", *read_entry(folder)["files"]):
        if name not in files:
            raise Damaged(f"manifest.json is damaged: it lacks {name}")
    return len(files)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_memory() -> None:
    """Let the C library keep what is freed, where it is glibc: by default it gives large blocks back to the system after each
    call, and the next one waits for fresh pages (a GPT's decoding step with 25 MB of cache took 2.5 times as long)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, another library
        return
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    mallopt(trim, 1 << 30)
    if not mallopt(mmap, 1 << 30):
        mallopt(mmap, 1 << 25)  # the most that an older one allows


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def needs(error: ImportError, entry: Mapping[str, Any]) -> ImportError:
    """The error with the command that installs what is missing."""
    return ImportError(f"{error}; this model needs: pip install {' '.join(entry['needs'])}")
