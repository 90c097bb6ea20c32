"""How processes that read data may be started: forked from a clean server where that can work, else from this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


def start_methods(data: Any) -> tuple[list[str], str]:
    """Start methods of `multiprocessing` worth a try, best first, and why "forkserver" is not among them, if it is not.

    A process that is forked from one with many threads inherits locks that nobody will open, so "forkserver" comes first.
    It needs data that can be pickled and modules that a fresh process can import, and it runs the main script's top level
    again.
    """
    if (reason := _unimportable(data) or unguarded()) or sys.platform != "linux":
        return ["fork"], reason
    return ["forkserver", "fork"], ""


def _unimportable(data: Any) -> str:
    main = {"__main__"} if getattr(sys.modules["__main__"], "__file__", None) else set()
    needed = {m.partition(".")[0] for m in _modules(data)} - {*sys.builtin_module_names, *main}
    odd = sorted(m for m in needed if PathFinder.find_spec(m) is None)
    return f"a fresh process cannot import {odd[0]}, which defines the data" if odd else ""


def _modules(data: Any, depth: int = 4) -> Iterator[str]:
    """Of the data and what it is made of: `Subset`s, collate functions."""
    yield data.__module__ if isinstance(getattr(data, "__module__", None), str) else type(data).__module__
    if depth and not isinstance(data, type):
        for part in vars(data).values() if hasattr(data, "__dict__") else ():
            if callable(part) or (hasattr(part, "__getitem__") and hasattr(part, "__dict__")):
                yield from _modules(part, depth - 1)


def unguarded() -> str:
    """Why the main script cannot be imported by a fresh process: it trains at its top level; "" if it can."""
    main = sys.modules["__main__"]
    path = Path(getattr(main, "__file__", None) or "")
    if getattr(main, "__spec__", None) is not None or not path.is_file():
        return ""
    guarded = "__name__" in path.read_text(errors="replace")
    return "" if guarded else f"{path.name} would run again in every worker: it has no `if __name__ == '__main__':`"
