"""`load`, and the check of the folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quadriga.runtime.standalone.folder import (
    RUNTIMES,
    Damaged,
    check_files,
    inside,
    keep_memory,
    read_entry,
    runtimes,
    unpacked,
)
from quadriga.runtime.standalone.trees import Tree, difference, flatten, rebuild, single_tensor


def load(folder: str | os.PathLike[str] | None = None, check: bool = True, threads: int | None = None) -> Callable[..., Tree]:
    """Load the model.

    Args:
        folder: where the files are; by default beside this file.
        check: compare the files with manifest.json and the outputs with probes.safetensors, where there are such files.
        threads: of the CPU, in place of the recorded numbers; PyTorch's number holds for the whole process. So does what
            `keep_memory` sets: freed memory is kept for the next call.

    Returns:
        inputs tree of tensors (batch first) → outputs tree of new tensors. A dict may be given as keywords, a tuple as
        arguments.

    Raises:
        Damaged: a file is missing or changed, or the outputs differ.
        ImportError: the runtime is not installed; the text says what to install.
    """
    place = Path(folder) if folder is not None else Path(__file__).resolve().parent
    if check:
        check_files(place)
    entry = read_entry(place)
    model = unpacked(place, entry) if "packed" in entry else place
    read = {**entry, "files": entry["packed"]} if "packed" in entry else entry
    if threads is not None:
        read = {**read, "threads": threads, **({"alone": {**read["alone"], "threads": threads}} if "alone" in read else {})}
    run = started(model, read)
    if check and (place / "probes.safetensors").exists():
        check_probes(place, entry, run)
    return run


def started(folder: Path, entry: Mapping[str, Any]) -> Callable[..., Tree]:
    """The model in its runtime; where a batch of one has a runtime of its own, both, and each call goes by its batch size."""
    keep_memory()
    more = RUNTIMES[entry["runtime"]](folder, entry, entry["threads"])
    if "alone" not in entry:
        return more
    one = RUNTIMES[entry["alone"]["runtime"]](folder, {**entry, **entry["alone"]}, entry["alone"]["threads"])

    def single(x: Tree) -> Tree:
        return one(x) if x.size(0) == 1 else more(x)

    def run(tree: Tree = None, *rest: Tree, **named: Tree) -> Tree:
        tree = named if tree is None else (tree, *rest) if rest else tree
        return one(tree) if flatten(entry["inputs"], tree)[0].size(0) == 1 else more(tree)

    return single if single_tensor(entry) else run


def check_probes(folder: Path, entry: Mapping[str, Any], run: Callable[..., Tree]) -> float:
    """Run the probe inputs and return the largest difference relative to the largest recorded output."""
    from safetensors.torch import load_file

    probes = load_file(inside(folder, "probes.safetensors"))
    leaves = [probes[f"input.{i}"] for i in range(len(entry["names"]))]
    found = flatten(entry["outputs"], run(rebuild(entry["inputs"], leaves)))
    worst = max([difference(probes[f"output.{i}"], y) for i, y in enumerate(found)], default=0.0)
    if not worst <= entry["tolerance"]:
        raise Damaged(
            f"the outputs for probes.safetensors differ by {worst:.2g} on this machine, allowed {entry['tolerance']:g}"
        )
    return worst


def main(folder: str | None = None) -> int:
    """Check the folder, print the result, and return 0, or 1 when something is wrong."""
    place = Path(folder) if folder else Path(__file__).resolve().parent
    try:
        files = check_files(place)
        entry = read_entry(place)
        run = load(place, check=False)
        worst = check_probes(place, entry, run) if (place / "probes.safetensors").exists() else None
    except (Damaged, ImportError, RuntimeError, ValueError) as error:
        print(f"FAILED: {error}")
        return 1
    probes = (
        "no probes" if worst is None else f"probe outputs within {worst:.2g} of the recorded (allowed {entry['tolerance']:g})"
    )
    print(f"ok: {' and '.join(runtimes(entry))}, {files} files as in manifest.json, {probes}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
