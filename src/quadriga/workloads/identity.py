"""What a workload is, by its content: the same in every process, or no two of their results belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quadriga.core import rng
from quadriga.core.batch import tensors
from quadriga.core.data import Data
from quadriga.core.errors import BadInput
from quadriga.core.files import write_json
from quadriga.core.workload import Workload
from quadriga.workloads.origin import Array, Origin, dense, digest, digests, numbers, origin, table
from quadriga.workloads.splits import take
from quadriga.workloads.suspects import suspect

FILE = "workload.json"  # in a study's folder: the driver's identity, with which every worker compares its own
MARKS = 1024  # examples of a split by which it is told how many differ
READ = 32  # examples that are read, where a split is more than what is stored of it
CHUNK = 1 << 20  # numbers that are summed at once
CLOSE = 1e-6  # of their size, by which the sums of a tensor may differ on another processor
AGAIN = 8  # times that an example is read again where two processes read it differently
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Content:
    """What is in a split.

    Args:
        rows: number of examples.
        stored: digest of what is stored of them, and of the places they are read from.
        whole: whether every value is in `stored`.
        marks: of up to MARKS examples, evenly spaced: their digests, or their places.
        read: of up to READ examples, evenly spaced: what `look` says of each tensor of the inputs and of the target.
        steady: of each of these tensors, whether reading it twice under one seed gave the same.
    """

    rows: int
    stored: str
    whole: bool
    marks: tuple[str, ...]
    read: tuple[tuple[str, ...], ...]
    steady: tuple[bool, ...]

    def facts(self) -> list[Any]:
        """What has to be equal in two processes."""
        read = [[exact(text) for text, steady in zip(row, self.steady, strict=True) if steady] for row in self.read]
        return [self.rows, self.stored, read]


@dataclass(frozen=True)
class Identity:
    """A workload's content.

    Args:
        key: a digest of all of it, which names checkpoints too.
        splits: by name.
        weights: what `look` says of each tensor of the untrained model.
    """

    key: str
    splits: Mapping[str, Content]
    weights: Mapping[str, str]

    @property
    def notes(self) -> list[str]:
        """Which splits were not hashed whole."""
        sampled = [f"{len(c.read)} of {c.rows} of {name}" for name, c in self.splits.items() if not c.whole]
        told = "between processes, values were compared for examples read evenly spaced, and places for all: "
        return [told + ", ".join(sampled)] if sampled else []


def identity(workload: Workload) -> Identity:
    """The content of a workload; it is looked at once."""
    known = vars(workload).get("_identity")
    if known is None:
        known = _identity(workload)
        adopt(workload, known)
    return known


def adopt(workload: Workload, known: Identity) -> None:
    """Take this identity for the workload's."""
    object.__setattr__(workload, "_identity", known)


def _identity(workload: Workload) -> Identity:
    splits = {name: content(name, data) for name in SPLITS if (data := getattr(workload, name)) is not None}
    weights = _weights(workload)
    exactly = {name: exact(text) for name, text in weights.items()}
    facts = [workload.name, workload.batch_size, workload.metric.name, exactly]  # type: ignore[union-attr]
    text = json.dumps([facts, {name: c.facts() for name, c in splits.items()}])
    return Identity(hashlib.sha256(text.encode()).hexdigest()[:16], splits, weights)


def content(name: str, data: Data) -> Content:
    """Look at every example of a split as it is stored, and read some of those that are more than that."""
    found = origin(data)
    tables = [table(base, targets=True) for base in found.bases]
    plain = len(found.bases) == 1 and getattr(found.bases[0], "plain", False) and found.bases[0] is data
    places = np.arange(min(len(data), READ)) * len(data) // max(1, min(len(data), READ))
    read, steady = ((), ()) if plain else _read(name, data, places)
    whole = all(t is not None for t in tables) and not any(isinstance(t[0], list) for t in tables if t)
    marks = _marks(data, found, tables, _evenly(len(data)))
    return Content(len(data), _stored(found, tables), whole, tuple(marks), read, steady)


def _evenly(count: int) -> Array:
    few = min(count, MARKS)
    return np.arange(few) * count // max(few, 1)


def _stored(found: Origin, tables: Sequence[list[Any] | None]) -> str:
    """Digest of all tables, whole, and of which of their rows the split has."""
    total = hashlib.sha256()
    for base, parts in zip(found.bases, tables, strict=True):
        total.update(type(base).__qualname__.encode())
        for part in parts or ():
            total.update("\n".join(part).encode() if isinstance(part, list) else _form(part) + numbers(part).data)
    if not np.array_equal(found.rows, np.arange(len(found.rows))) or len(found.bases) > 1:
        total.update(np.ascontiguousarray(found.which))
        total.update(np.ascontiguousarray(found.rows))
    return total.hexdigest()[:32]


def _form(part: Any) -> bytes:
    return f"{part.dtype}{tuple(part.shape)}".encode()


def _marks(data: Data, found: Origin, tables: Sequence[list[Any] | None], places: Array) -> list[str]:
    """A name for each of some examples: its content, or its place where the content is not at hand."""
    if len(found.bases) == 1 and tables[0] is not None:
        return [d.hex() for d in digests(tables[0], found.rows[places])]
    return [f"{w}:{r}" for w, r in zip(found.which[places].tolist(), found.rows[places].tolist(), strict=True)]


def _read(name: str, data: Data, places: Array) -> tuple[tuple[tuple[str, ...], ...], tuple[bool, ...]]:
    """Digests of each tensor of some examples, and which of these tensors are the same when they are read again."""
    once, again = (_once(name, data, places) for _ in range(2))
    width = min((len(row) for row in once), default=0)
    return once, tuple(all(a[k : k + 1] == b[k : k + 1] for a, b in zip(once, again, strict=True)) for k in range(width))


def _once(name: str, data: Data, places: Array) -> tuple[tuple[str, ...], ...]:
    found = []
    with rng.isolated():
        for place in places.tolist():
            rng.seed_all(rng.derive("identity", place))
            batch = take(name, data, torch.tensor([place]))
            found.append([look(t) for t in tensors(batch.inputs) + tensors(batch.target)])
    width = min((len(row) for row in found), default=0)
    return tuple(tuple(row[:width]) for row in found)


def _weights(workload: Workload) -> dict[str, str]:
    found = {}
    for name, value in workload.build(0).state_dict().items():
        lazy = isinstance(value, torch.nn.parameter.UninitializedTensorMixin)
        parts = [] if lazy else tensors(value)
        found[name] = " ".join(map(look, parts)) if parts or lazy else str(value)[:200]
    return found


def look(t: Tensor) -> str:
    """A tensor's digest, and three sums by which one that differs by rounding alone can be told.

    Example:
        >>> close(look(torch.tensor([1.0, 2.0])), look(torch.tensor([1.0, 2.0000002])))
        True
        >>> close(look(torch.tensor([1.0, 2.0])), look(torch.tensor([2.0, 1.0])))
        False
    """
    flat, sums = dense(t.detach().cpu()).reshape(-1), torch.zeros(3, dtype=torch.float64)
    for number, part in enumerate(flat.split(CHUNK)):  # no second copy of a large tensor is made
        values = part.double()
        ramp = 1 + (torch.arange(len(part), dtype=torch.float64) + number * CHUNK) / len(flat)
        sums += torch.stack([values.abs().sum(), values.sum(), values @ ramp])
    return ":".join([digest(t).hex(), *(f"{float(s):.9e}" for s in sums)])


def exact(text: str) -> str:
    """A look without its sums, which depend on the number of threads."""
    return " ".join(part.split(":")[0] for part in text.split())


def close(one: str, other: str) -> bool:
    """Whether two looks are of tensors that are equal but for rounding."""
    if exact(one) == exact(other):
        return True
    parts = list(zip(one.split(), other.split(), strict=False))
    if len(one.split()) != len(other.split()) or any(":" not in text for pair in parts for text in pair):
        return False
    rows = [[list(map(float, text.split(":")[1:])) for text in pair] for pair in parts]
    return all(abs(x - y) <= CLOSE * (1e-12 + max(a[0], b[0])) for a, b in rows for x, y in zip(a, b, strict=True))


def write(workload: Workload, folder: Path) -> str:
    """Put the identity where workers find it; returns its key."""
    known = identity(workload)
    write_json(folder / FILE, {"reference": workload.reference, **asdict(known)})
    return known.key


def same(workload: Workload, folder: Path, key: str) -> None:
    """Compare the workload of this process with the driver's, whose key it then has.

    Raises:
        BadInput: it is another one, so that nothing that is computed here would count.
    """
    mine = identity(workload)
    if mine.key == key:
        return
    told = json.loads((folder / FILE).read_text())
    splits = {name: _content(row) for name, row in told["splits"].items()}
    theirs = Identity(key, splits, told["weights"])
    if problem := differs(workload, mine, theirs):
        raise BadInput(f"another process made another workload from the same file: {problem}", suspect(workload.reference))
    adopt(workload, theirs)  # they differ in nothing but what changes whenever it is read


def _content(row: Mapping[str, Any]) -> Content:
    read = tuple(tuple(r) for r in row["read"])
    return Content(row["rows"], row["stored"], row["whole"], tuple(row["marks"]), read, tuple(row["steady"]))


def differs(workload: Workload, mine: Identity, theirs: Identity) -> str:
    """What is not the same in this process, for people; "" where it is only what changes at every reading."""
    if mine.splits.keys() != theirs.splits.keys():
        return f"it has the splits {', '.join(mine.splits)} in one and {', '.join(theirs.splits)} in the other"
    for name, own in mine.splits.items():
        other = theirs.splits[name]
        if own.rows != other.rows:
            return f"{name} has {own.rows} examples in one and {other.rows} in the other"
        if own.stored != other.stored:
            return _counted(name, getattr(workload, name), other)
        if _read_otherwise(name, getattr(workload, name), own, other):
            return f"examples of {name} are read with other values in one than in the other, by equal seeds"
    odd = [n for n in {**mine.weights, **theirs.weights} if not close(mine.weights.get(n, ""), theirs.weights.get(n, ""))]
    return f"the untrained weights differ, {odd[0]} first" if odd else ""


def _counted(name: str, data: Data, other: Content) -> str:
    """How many of the other process's examples this split does not have."""
    found = origin(data)
    tables = [table(base, targets=True) for base in found.bases]
    here = set(_marks(data, found, tables, np.arange(len(data))))
    missing = sum(mark not in here for mark in other.marks)
    if not missing:
        return f"{name} has the same examples in another order, or other values in the same places"
    about = "" if len(other.marks) == other.rows else "about "
    return f"{about}{round(missing / len(other.marks) * other.rows)} of {other.rows} examples of {name} differ"


def _read_otherwise(name: str, data: Data, own: Content, other: Content) -> bool:
    """Whether tensors that are steady in both processes are read differently, again and again."""
    if len(own.steady) != len(other.steady):
        return True
    for k, both in enumerate(zip(own.steady, other.steady, strict=True)):
        odd = [i for i, (a, b) in enumerate(zip(own.read, other.read, strict=True)) if all(both) and not close(a[k], b[k])]
        if odd and not _varies(name, data, other, odd, k):
            return True
    return False


def _varies(name: str, data: Data, other: Content, odd: Sequence[int], k: int) -> bool:
    """Whether a tensor of these examples changes at every reading, or is once as the other process read it."""
    places = np.asarray(odd) * len(data) // len(other.read)
    seen = [_once(name, data, places) for _ in range(AGAIN)]
    looks = [[reading[n][k] for reading in seen] for n in range(len(odd))]
    return any(len(set(few)) > 1 or any(close(one, other.read[i][k]) for one in few) for i, few in zip(odd, looks, strict=True))
