"""Checkpoints: complete, hashed, atomic, without pickle; a kill at any moment leaves a state that loads.

A folder holds `model-N.safetensors`, `optimizer-N.safetensors` (with the tensors of hooks and generators) and
`state.json`, which names them with their SHA-256 and is written last. `previous.json` names the state before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
    folder = Path(folder)
    weights, aliases = model_tensors(model)
    other: dict[str, Tensor] = {}
    body: dict[str, Any] = {
        "format": 1,
        "aliases": aliases,
        "extra": pack(dict(extra), other, "extra"),
        "modules": pack(module_states(model), other, "modules"),
        "optimizer": pack(optimizer_state(model, optimizer), other, "optimizer"),
    }
    serial = _next_serial(folder)
    body["files"] = {
        kind: _write_tensors(folder / f"{kind}-{serial}.safetensors", tensors)
        for kind, tensors in (("model", weights), ("optimizer", other))
    }
    if (folder / LATEST).exists():
        atomic_write(folder / PREVIOUS, (folder / LATEST).read_bytes())
    atomic_write(folder / LATEST, json.dumps({"sha256": _digest(body), "body": body}, allow_nan=False) + "\n")
    _clean(folder)


def _next_serial(folder: Path) -> int:
    found = [p.stem.rpartition("-")[2] for p in folder.glob("*-*.safetensors")]
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


def read_state(folder: str | Path, *, fall_back: bool = False) -> State | None:
    """Read and verify the state of a folder; None where there is none.

    Args:
        folder: of the checkpoint.
        fall_back: take the previous state when the latest is damaged, and say so in its note.

    Raises:
        BadInput: it is damaged, naming the file, and so is the previous one, or that may not be used.
    """
    latest, previous = Path(folder) / LATEST, Path(folder) / PREVIOUS
    if not latest.exists():
        return None
    try:
        return _read(latest, "")
    except BadInput as error:
        if not (fall_back and previous.exists()):
            raise
        try:
            state = _read(previous, f"{error.problem}; went back to the state before")
        except BadInput:
            raise error from None
        atomic_write(latest, previous.read_bytes())  # or the next save would keep the damaged one as previous
        return state


def _read(pointer: Path, note: str) -> State:
    content = read_json(pointer)
    if not isinstance(content, dict) or _digest(content.get("body")) != content.get("sha256"):
        raise BadInput(f"{pointer} is damaged: its SHA-256 is not the recorded one", RESTORE)
    body = content["body"]
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


def load_finished(folder: str | Path, model: nn.Module) -> bool:
    """Load the weights of a train step that is finished; False where there is none. Raises BadInput if it is damaged."""
    state = read_state(folder)
    if state is None or not state.extra.get("finished", False):
        return False
    state.load_model(model)
    return True
