"""Write an artifact: everything into a sibling folder, the manifest last, then one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from quadriga import runtime
from quadriga.artifact.card import render
from quadriga.core.batch import Tree, resize, tensors
from quadriga.core.errors import BadInput
from quadriga.core.files import atomic_write, fsync_folder, sha256, write_json
from quadriga.core.recipe import Recipe
from quadriga.core.setup import Context
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime import Built, standalone

PROBES = 64


def write(
    folder: str | Path,
    model: nn.Module | None,
    spec: RuntimeSpec,
    context: Context,
    *,
    recipe: Recipe,
    evidence: Mapping[str, Any],
    probes_inputs: Tree,
    built: Built | None = None,
    batches: Sequence[int] = (1, 64),
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write the artifact, whole or not at all, and return its folder; an older one stays until the new is complete.

    Args:
        folder: of the artifact.
        model: finished; not needed when `built` is given.
        spec: the runtime specification to realise.
        context: for export and calibration.
        recipe: that made the model.
        evidence: plain data, without NaN.
        probes_inputs: inputs tree, the first 64 examples are kept; the outputs come from the built runtime itself.
        built: what `runtime.build` gave before, to be copied in place of building again.
        batches: sizes to specialise for.
        card: for the README: "title", "about", "limits" (list), "winner" (as in result.json).

    Raises:
        BadInput: no space, or the place is a file or another folder.
        NotApplicable: as `runtime.build`.
    """
    folder = _place(folder)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        made = _built(model, spec, context, part, built, batches)
        inputs = resize(probes_inputs, min(PROBES, len(tensors(probes_inputs)[0])))
        atomic_write(part / "probes.safetensors", save(_probes(made, inputs)))
        atomic_write(part / "recipe.toml", recipe.to_toml())
        write_json(part / "evidence.json", evidence)
        atomic_write(part / "README.md", render(card or {}, made, recipe))
        write_manifest(part)
        _swap(part, folder)
    except OSError as error:
        problem = f"{folder} could not be written: {error.strerror or error}"
        raise BadInput(problem, "free space or choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _place(folder: str | Path) -> Path:
    """Where to write, whole again after an interrupted swap. Raises BadInput if something else is there."""
    folder = Path(os.path.abspath(folder))
    recover(folder)
    if folder.exists() and not (folder / "manifest.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise BadInput(f"{folder} exists and is not an artifact", "choose another folder")
    return folder


def _built(
    model: nn.Module | None, spec: RuntimeSpec, context: Context, part: Path, built: Built | None, batches: Sequence[int]
) -> Built:
    if built is None:
        assert model is not None, "give a model or what was built of it"
        return runtime.build(model, spec, context, part, batches)
    part.mkdir(parents=True)
    for name in ("load.py", *(["_unpack.py"] if "packed" in built.entry else []), *built.files):
        atomic_write(part / name, standalone.inside(built.folder, name).read_bytes())
    return runtime.open_built(part, built.spec)


def _probes(made: Built, inputs: Tree) -> dict[str, Tensor]:
    outputs = made.run()(inputs)
    given = standalone.flatten(made.entry["inputs"], inputs)
    found = standalone.flatten(made.entry["outputs"], outputs)
    named = {**{f"input.{i}": t for i, t in enumerate(given)}, **{f"output.{i}": t for i, t in enumerate(found)}}
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in named.items()}


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file of a folder in manifest.json."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "manifest.json")
    rows = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in files}
    write_json(folder / "manifest.json", {"format": standalone.FORMAT, "files": rows})


def bytes_of(folder: str | Path) -> int:
    """The bytes of an artifact: of the files that `load.py` reads to run the model, which are runtime.json and the
    files it names (model.onnx, or program.py and weights.safetensors). The card, evidence, recipe, probes and manifest
    are not needed to run, and are not counted.
    """
    return runtime.open_built(folder).bytes


def _swap(part: Path, folder: Path) -> None:
    old = _old(folder)
    fsync_folder(part)
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put the older artifact back when a process died between the two renames of a replacement."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
