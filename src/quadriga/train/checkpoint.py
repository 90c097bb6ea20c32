"""Checkpoints: complete, hashed, atomic, without pickle; a kill at any moment leaves a state that loads.

A folder holds `model-N.safetensors`, `optimizer-N.safetensors` (with the tensors of hooks and generators) and
`state.json`, which names them with their SHA-256 and is written last. `previous.json` names the state before it. Ranks that
train together write their parts of all tensors into `parts-N/` instead (`parallel.store`); any process can read them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from quadriga.core.errors import BadInput
from quadriga.core.files import atomic_write, read_json
from quadriga.train.pack import pack, unpack
from quadriga.train.state import (
    load_model_tensors,
    load_optimizer_state,
    model_tensors,
    module_states,
    optimizer_state,
)

LATEST, PREVIOUS = "state.json", "previous.json"
PARTS, MODEL, OTHER = "parts", "model/", "other/"  # a kind of files, and what names of tensors in them begin with
RESTORE = "restore it, or delete the folder to train again"


@dataclass(frozen=True)
class State:
    """One verified state in memory.

    Args:
        digest: SHA-256 of its description, which includes the hashes of its files.
        body: the description.
        model: the model's tensors by name.
        other: all other tensors.
        note: what happened when it was read, such as a return to the state before.
    """

    digest: str
    body: Mapping[str, Any]
    model: Mapping[str, Tensor] = field(repr=False)
    other: Mapping[str, Tensor] = field(repr=False)
    note: str = ""

    @property
    def extra(self) -> dict[str, Any]:
        """What was given to `save_state`."""
        return unpack(self.body["extra"], self.other)

    @property
    def optimizer(self) -> dict[str, Any]:
        """The optimizer's class, groups and state."""
        return unpack(self.body["optimizer"], self.other)

    def load_model(self, model: nn.Module) -> None:
        """Copy weights, buffers and extra states into a model. Raises BadInput if it is another model."""
        load_model_tensors(model, self.model, self.body["aliases"])
        for name, value in unpack(self.body["modules"], self.other).items():
            model.get_submodule(name).set_extra_state(value)

    def load_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Give an optimizer its state back. Raises BadInput if it is of another class or has other parameters."""
        load_optimizer_state(model, optimizer, self.optimizer)


def save_state(folder: str | Path, model: nn.Module, optimizer: Optimizer | None, extra: Mapping[str, Any]) -> None:
    """Write a complete state; the one before it stays as `previous.json` until the next save.

    Args:
        folder: made if missing.
        model, optimizer: whose tensors and numbers to write; no optimizer for a model alone.
        extra: nested numbers, texts and tensors.

    Raises:
        BadInput: it cannot be written; older states stay whole.
    """
    weights, aliases = model_tensors(model)
    body, other = compose(aliases, module_states(model), optimizer_state(model, optimizer), extra)
    write_whole(folder, body, weights, other)


def compose(
    aliases: Mapping[str, str], modules: Mapping[str, Any], optimizer: Mapping[str, Any], extra: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of a state, without its files, and the tensors that are set apart in it."""
    other: dict[str, Tensor] = {}
    body = {
        "format": 1,
        "aliases": dict(aliases),
        "extra": pack(dict(extra), other, "extra"),
        "modules": pack(dict(modules), other, "modules"),
        "optimizer": pack(dict(optimizer), other, "optimizer"),
    }
    return body, other


def write_whole(folder: str | Path, body: dict[str, Any], weights: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Write a description and all its tensors."""
    folder = Path(folder)
    serial = next_serial(folder)
    files = {
        kind: _write_tensors(folder / f"{kind}-{serial}.safetensors", tensors)
        for kind, tensors in (("model", weights), ("optimizer", other))
    }
    commit(folder, body, files)


def commit(folder: Path, body: dict[str, Any], files: Mapping[str, Any]) -> None:
    """Make a description whose files are written the latest one, and what was the latest the previous."""
    body["files"] = dict(files)
    if (folder / LATEST).exists():
        atomic_write(folder / PREVIOUS, (folder / LATEST).read_bytes())
    atomic_write(folder / LATEST, json.dumps({"sha256": _digest(body), "body": body}, allow_nan=False) + "\n")
    _clean(folder)


def next_serial(folder: Path) -> int:
    """A number that no file of the folder has."""
    found = [p.stem.rpartition("-")[2] for p in (*folder.glob("*-*.safetensors"), *folder.glob("parts-*"))]
    return max((int(s) for s in found if s.isdigit()), default=-1) + 1


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    data = safetensors.torch.save({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()})
    atomic_write(path, data)
    return {"name": path.name, "sha256": hashlib.sha256(data).hexdigest()}


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _clean(folder: Path) -> None:
    """Remove files that no kept state names, and what an interrupted write left."""
    kept = set()
    for pointer in (LATEST, PREVIOUS):
        try:
            kept |= {entry["name"] for entry in read_json(folder / pointer)["body"]["files"].values()}
        except (BadInput, KeyError, TypeError, AttributeError):
            continue  # a missing or damaged pointer keeps nothing alive
    for path in (*folder.glob("*-*.safetensors"), *folder.glob(".*.part")):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    for path in folder.glob("parts-*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def read_state(
    folder: str | Path, *, fall_back: bool = False, reader: Callable[[Path, str], State] | None = None
) -> State | None:
    """Read and verify the state of a folder; None where there is none.

    Args:
        folder: of the checkpoint.
        fall_back: take the previous state when the latest is damaged, and say so in its note.
        reader: (pointer file, note) → state; reads everything by default.

    Raises:
        BadInput: it is damaged, naming the file, and so is the previous one, or that may not be used.
    """
    latest, previous = Path(folder) / LATEST, Path(folder) / PREVIOUS
    if not latest.exists():
        return None
    reader = reader or _read
    try:
        return reader(latest, "")
    except BadInput as error:
        if not (fall_back and previous.exists()):
            raise
        try:
            state = reader(previous, f"{error.problem}; went back to the state before")
        except BadInput:
            raise error from None
        atomic_write(latest, previous.read_bytes())  # or the next save would keep the damaged one as previous
        return state


def read_pointer(pointer: Path) -> Mapping[str, Any]:
    """A verified description and its "sha256". Raises BadInput if it is damaged."""
    content = read_json(pointer)
    if not isinstance(content, dict) or _digest(content.get("body")) != content.get("sha256"):
        raise BadInput(f"{pointer} is damaged: its SHA-256 is not the recorded one", RESTORE)
    return content


def _read(pointer: Path, note: str) -> State:
    content = read_pointer(pointer)
    body = content["body"]
    if PARTS in body["files"]:
        from quadriga.parallel import store  # torch.distributed.checkpoint takes a second to import

        entry = body["files"][PARTS]
        store.check(pointer.parent / entry["name"], entry["files"])
        found = store.read_whole(pointer.parent / entry["name"])
        tables = ({k.removeprefix(p): t for k, t in found.items() if k.startswith(p)} for p in (MODEL, OTHER))
        return State(content["sha256"], body, *tables, note)
    model, other = (_read_tensors(pointer.parent, body["files"][kind]) for kind in ("model", "optimizer"))
    return State(content["sha256"], body, model, other, note)


def _read_tensors(folder: Path, entry: Mapping[str, str]) -> dict[str, Tensor]:
    path = folder / entry["name"]
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise BadInput(f"{path} is damaged: its SHA-256 is not the recorded one", RESTORE)
        return safetensors.torch.load(data)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} is damaged: {error}", RESTORE) from error


def load_state(folder: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Load the latest state into a model and, if given, an optimizer; returns the `extra` that was saved with it.

    Raises:
        BadInput: there is none, it is damaged, or it is of another model or optimizer.
    """
    state = read_state(folder)
    if state is None:
        raise BadInput(f"there is no checkpoint in {folder}", "check the path")
    state.load_model(model)
    if optimizer is not None:
        state.load_optimizer(model, optimizer)
    return state.extra


def load_model(folder: str | Path, model: nn.Module) -> None:
    """Load the weights and buffers of the latest state. Raises BadInput like `load_state`."""
    load_state(folder, model)


def is_finished(folder: str | Path | None) -> bool:
    """Whether the latest state of a folder is that of a train step that is over; nothing else of it is read."""
    try:
        return bool(folder) and bool(read_json(Path(str(folder)) / LATEST)["body"]["extra"]["finished"])
    except (BadInput, KeyError, TypeError):  # none, or damaged, which who reads it will say
        return False


def load_finished(folder: str | Path, model: nn.Module) -> bool:
    """Load the weights of a train step that is finished; False where there is none. Raises BadInput if it is damaged."""
    state = read_state(folder)
    if state is None or not state.extra.get("finished", False):
        return False
    state.load_model(model)
    return True
