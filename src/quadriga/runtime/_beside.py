"""What executes a batch of one, beside what executes larger ones: two parts in one folder and one runtime.json."""

from __future__ import annotations

import filecmp
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quadriga.core.errors import NotApplicable
from quadriga.core.slots import RuntimeSpec

Entry = dict[str, Any]
SHARED = ("format", "inputs", "names", "outputs", "rank", "needs", "tolerance", "computes")  # said once for both parts


def same_process(more: RuntimeSpec, one: RuntimeSpec) -> None:
    """Refuse two parts that set one thing of the process differently."""
    if more.by_torch and one.by_torch and (more.threads, more.matmul) != (one.threads, one.matmul):
        raise NotApplicable(
            f"{one.name} and {more.name} share PyTorch's number of threads and precision of products",
            "give both parts of batch_of_one the same",
        )


def add(entry: Entry, folder: Path, write: Callable[[Path], Entry]) -> None:
    """Write the part for a batch of one, and put what runtime.json is to say of it into the entry of the other.

    Args:
        entry: of larger batches, whose files are in the folder.
        folder: files get names of their own there, except those that are there with the same content.
        write: folder → entry of the part, whose files it writes there.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".one-") as made:
        alone = write(Path(made))
        names = {name: name if _equal(Path(made) / name, folder / name) else f"one-{name}" for name in alone["files"]}
        for name, new in names.items():
            os.replace(Path(made) / name, folder / new)
    for key, found in (("files", names.values()), ("needs", alone["needs"])):
        entry[key] = list(dict.fromkeys([*entry[key], *found]))
    entry["tolerance"] = max(entry["tolerance"], alone["tolerance"])
    entry["alone"] = {**{k: v for k, v in alone.items() if k not in SHARED}, "files": list(names.values())}


def _equal(new: Path, old: Path) -> bool:
    return old.is_file() and filecmp.cmp(new, old, shallow=False)
