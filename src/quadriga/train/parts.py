"""Checkpoints of ranks that train together: every rank writes its parts, and takes its parts of what anybody wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quadriga.core.errors import BadInput
from quadriga.core.spread import local
from quadriga.parallel import group, store
from quadriga.parallel.collect import Parts, whole
from quadriga.parallel.place import Place
from quadriga.parallel.team import Team
from quadriga.train.checkpoint import MODEL, OTHER, PARTS, State, commit, next_serial, read_pointer, write_whole
from quadriga.train.checkpoint import _read as read_everything
from quadriga.train.pack import unpack
from quadriga.train.state import REBUILD, load_optimizer_state, parameter_names


def save_parts(folder: Path, body: dict[str, Any], parts: Parts, _: torch.device) -> None:
    """Write every rank's parts, and then the description."""
    name = group.same(lambda: f"parts-{next_serial(folder)}")
    files = store.write(folder / name, {n: (local(t.detach()).cpu(), place) for n, (t, place) in parts.items()})
    if group.rank() == 0:
        commit(folder, body, {PARTS: {"name": name, "files": files}})
    dist.barrier()


def save_whole(folder: Path, body: dict[str, Any], parts: Parts, device: torch.device) -> None:
    """Let the first rank write whole tensors."""
    found: dict[str, dict[str, Tensor]] = {MODEL: {}, OTHER: {}}
    for name, full in whole(parts, device):
        table = MODEL if name.startswith(MODEL) else OTHER
        if group.rank() == 0:
            found[table][name.removeprefix(table)] = full.cpu()
    if group.rank() == 0:
        write_whole(folder, body, found[MODEL], found[OTHER])
    dist.barrier()


def read_spread(team: Team, pointer: Path, note: str) -> State:
    """This rank's parts of a state, whoever wrote it.

    Raises:
        BadInput: it is damaged, as some rank finds, or of another model.
    """
    problem: BadInput | None = None
    try:
        content = read_pointer(pointer)
        if entry := content["body"]["files"].get(PARTS):
            store.check(pointer.parent / entry["name"], entry["files"], dist.get_world_size(), group.rank())
    except BadInput as error:
        problem = error
    if not group.every(problem is None):
        raise problem or BadInput(f"{pointer} is damaged, as another process finds", "restore it, or delete the folder")
    body = content["body"]
    found = _from_parts(team, pointer.parent / entry["name"]) if entry else _from_whole(team, pointer, note)
    model = {n.removeprefix(MODEL): t for n, t in found.items() if n.startswith(MODEL)}
    if set(team.shapes) != set(_names(body, entry, pointer)):
        raise BadInput("the checkpoint is of another model: its tensors have other names", REBUILD)
    other = Rest({n.removeprefix(OTHER): t for n, t in found.items() if n.startswith(OTHER)})
    return SpreadState(content["sha256"], body, model, other, note, team)


def _names(body: Mapping[str, Any], entry: Mapping[str, Any] | None, pointer: Path) -> list[str]:
    if entry:
        return [n.removeprefix(MODEL) for n in store.sizes(pointer.parent / entry["name"]) if n.startswith(MODEL)]
    return list(read_everything(pointer, "").model)


def _from_parts(team: Team, folder: Path) -> dict[str, Tensor]:
    wanted: dict[str, tuple[Tensor, Place]] = {}
    for name, (shape, kind) in store.sizes(folder).items():
        if (place := team.place_of(name, shape)) is not None:
            wanted[name] = torch.empty(place.local_shape, dtype=kind), place
    store.read(folder, wanted)
    return {name: tensor for name, (tensor, _) in wanted.items()}


def _from_whole(team: Team, pointer: Path, note: str) -> dict[str, Tensor]:
    state = read_everything(pointer, note)
    tables = {**{MODEL + n: t for n, t in state.model.items()}, **{OTHER + n: t for n, t in state.other.items()}}
    places = {name: team.place_of(name, tuple(t.shape)) for name, t in tables.items()}
    return {name: place.take(tables[name]) for name, place in places.items() if place is not None}


class Rest(dict[str, Tensor]):
    """Tensors by name; of those that other ranks have, None."""

    def __missing__(self, name: str) -> Any:
        return None


@dataclass(frozen=True)
class SpreadState(State):
    """A state of which this rank has its parts.

    Args:
        team: the ranks.
    """

    team: Team | None = None

    def _unpacked(self, key: str) -> dict[str, Any]:
        """A part of the description with its tensors, those that are spread as DTensors."""
        assert self.team is not None
        own = self.team.tensors()
        placed = Rest({path: spread_like(t, own.get(self.team.owner_of(path) or "")) for path, t in self.other.items()})
        return unpack(self.body[key], placed)

    @property
    def extra(self) -> dict[str, Any]:
        """As `State.extra`."""
        return self._unpacked("extra")

    @torch.no_grad()
    def load_model(self, model: nn.Module) -> None:
        """Copy weights and buffers into this rank's part of the model. Raises BadInput if it is another model."""
        assert self.team is not None
        for name, tensor in self.team.tensors().items():
            mine, value = local(tensor.detach()), self.model.get(name)
            if value is None or value.shape != mine.shape or value.dtype != mine.dtype:
                raise BadInput(f"the checkpoint is of another model: {name} differs", REBUILD)
            mine.copy_(value)
        for name, value in unpack(self.body["modules"], self.other).items():
            model.get_submodule(name).set_extra_state(value)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer of this rank's part its state. Raises BadInput if it is of another kind."""
        saved = self._unpacked("optimizer")
        groups = [_with(names, saved["groups"]) for names in parameter_names(model, optimizer)]
        load_optimizer_state(model, optimizer, {**saved, "groups": groups})


def _with(names: list[str], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The saved group that has these parameters, with these alone."""
    found = next((g for g in groups if set(names) <= set(g["params"])), None)
    if found is None:
        raise BadInput(
            "the checkpoint's optimizer has other groups of parameters", "continue with the optimizer it was made with"
        )
    return {**found, "params": names}


def spread_like(part: Tensor | None, parameter: Tensor | None) -> Any:
    """A part of a tensor as a DTensor, where it is spread as this parameter is; else itself."""
    if part is None or not isinstance(parameter, DTensor) or part.shape != parameter.to_local().shape:
        return part
    mesh, place = parameter.device_mesh, parameter.placements
    there = part.to(parameter.to_local().device)
    return DTensor.from_local(there, mesh, place, run_check=False, shape=parameter.shape, stride=parameter.stride())


def joined_groups(ranks: Sequence[list[dict[str, Any]]], order: Sequence[str]) -> list[dict[str, Any]]:
    """The groups of optimizers of several parts of a model as those of one of the whole: equal but for their parameters.

    Example:
        >>> joined_groups([[{"lr": 1, "params": ["b"]}], [{"lr": 1, "params": ["a"]}, {"lr": 2, "params": ["c"]}]], "abc")
        [{'lr': 1, 'params': ['a', 'b']}, {'lr': 2, 'params': ['c']}]
    """
    found: dict[str, dict[str, Any]] = {}
    place = {name: k for k, name in enumerate(order)}
    for own in ranks:
        for entries in own:
            values = {k: v for k, v in entries.items() if k != "params"}
            whole_group = found.setdefault(repr(sorted(values.items())), {**values, "params": []})
            whole_group["params"] += [n for n in entries["params"] if n not in whole_group["params"]]
    for entries in found.values():
        entries["params"].sort(key=lambda n: place.get(n, len(place)))
    return list(found.values())


def merged(a: Any, b: Any) -> Any:
    """Two descriptions of parts of a model as one: mappings are joined, what both have is alike.

    Example:
        >>> merged({"state": {"a": 1}, "n": 2}, {"state": {"b": 3}, "n": 2})
        {'state': {'a': 1, 'b': 3}, 'n': 2}
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {**a, **{k: merged(a[k], v) if k in a else v for k, v in b.items()}}
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [merged(x, y) for x, y in zip(a, b, strict=True)]
    return a
