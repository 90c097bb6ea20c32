"""Whether splits share examples: by the places they are read from, by bytes before any transform, or by reading them."""

from __future__ import annotations

import time
from functools import cached_property
from itertools import combinations

import numpy as np
import torch

from quadriga.core import rng
from quadriga.core.batch import tensors
from quadriga.core.data import Data, TensorData
from quadriga.core.errors import BadInput
from quadriga.workloads.origin import Array, bare, digest, digests, form, inputs_of, origin, table
from quadriga.workloads.place import told

OVERLAP = 0.01  # of the smaller split; more would colour the verdict
READING = 1.5  # seconds in which a split is read that cannot be compared otherwise
TWICE = 4  # examples that are read twice, to see whether they are changed at random
GIVE = "give examples that the other split does not hold"


class Examples:
    """The examples of a split, as far as they are known without and with reading them.

    Args:
        name, data: of the split.
        seconds: in which it may be read.
    """

    def __init__(self, name: str, data: Data, seconds: float) -> None:
        self.name, self.data, self.seconds = name, data, seconds
        self.origin = origin(data)
        self.random = False

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def forms(self) -> set[tuple[str, ...]]:
        """In what form its examples are stored; nothing where that is not known of all."""
        tables = [table(base) for base in self.origin.bases]
        return set() if any(t is None for t in tables) else {form(t) for t in tables if t is not None}

    @cached_property
    def stored(self) -> Array | None:
        """A digest of each example's inputs as they are stored; None where that is not known of all."""
        tables = [table(base) for base in self.origin.bases]
        if any(t is None for t in tables):
            return None
        found = np.empty(len(self), object)
        for number, parts in enumerate(tables):
            here = np.flatnonzero(self.origin.which == number)
            rows = self.origin.rows[here]
            whole = len(here) == len(parts[0]) and np.array_equal(rows, np.arange(len(here)))  # type: ignore[index]
            found[here] = digests(parts, None if whole else rows)  # type: ignore[arg-type]
        return found

    @cached_property
    def read(self) -> Array:
        """A digest of each example's inputs as they are read, with transforms off where that works; None for those not read.

        Every one is read under the same seed, so that what is changed at random is changed alike.
        """
        if self.stored is not None and isinstance(self.data, TensorData) and self.data.plain:
            return self.stored
        found, end = np.full(len(self), None, object), time.monotonic() + self.seconds
        order = torch.randperm(
            len(self), generator=torch.Generator().manual_seed(0)
        ).tolist()  # an even sample, if it is cut off
        with rng.isolated():
            for count, place in enumerate(order):
                found[place] = self._one(place, 0)
                if count < TWICE and self._one(place, 1) != found[place]:
                    self.random = True
                if time.monotonic() > end:
                    break
        return found

    @cached_property
    def _sources(self) -> list[object]:
        """The data sets without their transforms, where they can be read so."""
        return [other if _readable(other := bare(base)) else base for base in self.origin.bases]

    def _one(self, place: int, seed: int) -> bytes:
        rng.seed_all(seed)
        source = self._sources[int(self.origin.which[place])]
        try:
            if isinstance(source, Data):
                return digest(tensors(source.batch(torch.tensor([place])).inputs))
            return digest(inputs_of(source[int(self.origin.rows[place])]))  # type: ignore[index]
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"{self.name} cannot be read: {told(error)}", "correct the data set") from error


def _readable(base: object) -> bool:
    if isinstance(base, Data):
        return True
    try:
        base[0]  # type: ignore[index]
    except Exception:
        return False
    return True


def apart(splits: dict[str, Data]) -> list[str]:
    """Check that no two splits share examples, whatever is done to them when they are read; returns notes.

    Raises:
        BadInput: two splits are the same data, or more than 1 % of the smaller one is in the other.
    """
    notes, known = [], {name: Examples(name, data, READING) for name, data in splits.items()}
    for one, two in combinations(known.values(), 2):
        if one.data is two.data or _same_storage(one.data, two.data):
            raise BadInput(f"{one.name} and {two.name} are the same data", GIVE)
        small, large = sorted((one, two), key=len)
        held, all_compared = shared(small, large)
        count, size = int(held.sum()), len(small)
        if count == size:
            raise BadInput(f"{one.name} and {two.name} hold the same examples", GIVE)
        text = f"{count} of {size} examples ({count / size:.1%}) are in both {one.name} and {two.name}"
        if count > OVERLAP * (size if all_compared else _seen(small)):
            raise BadInput(text, "remove them from one of the two; at most 1 % is tolerated")
        notes += [text] if count else []
        notes += [] if all_compared else _partly(one, two)
    return notes


def shared(small: Examples, large: Examples) -> tuple[Array, bool]:
    """Which examples of one split [n] are in another, and whether all could be compared."""
    held = _same_places(small, large)
    if small.forms and small.forms == large.forms and small.stored is not None and large.stored is not None:
        return held | _within(small.stored, large.stored), True
    alike = {id(b) for b in small.origin.bases} == {id(b) for b in large.origin.bases}
    if alike and not any(isinstance(b, Data) for b in small.origin.bases):
        return held, True
    held = held | _within(small.read, large.read)
    whole = _seen(small) == len(small) and _seen(large) == len(large)
    return held, whole and not (small.random or large.random)


def _same_places(small: Examples, large: Examples) -> Array:
    """Examples that both read from one place of one data set."""
    held = np.zeros(len(small), bool)
    for i, base in enumerate(small.origin.bases):
        for j, other in enumerate(large.origin.bases):
            if base is other:
                here = small.origin.which == i
                held[here] |= np.isin(small.origin.rows[here], large.origin.rows[large.origin.which == j])
    return held


def _within(some: Array, others: Array) -> Array:
    known = {d for d in others.tolist() if d is not None}
    return np.asarray([d in known for d in some.tolist()], bool)


def _seen(split: Examples) -> int:
    return sum(d is not None for d in split.read.tolist())


def _partly(one: Examples, two: Examples) -> list[str]:
    """What was not compared."""
    notes = []
    if random := [e.name for e in (one, two) if e.random]:
        notes.append(
            f"{one.name} and {two.name}: {' and '.join(random)} changes examples at random when they are read, so that equal "
            "ones may not be found; give the change to `transform`, or the data as Subsets of one data set"
        )
    counts = [f"{_seen(e)} of {len(e)} examples of {e.name}" for e in (one, two)]
    if any(_seen(e) < len(e) for e in (one, two)):
        notes.append(f"only {' and '.join(counts)} were compared, as many as can be read in {READING:g} s")
    return notes


def _same_storage(a: Data, b: Data) -> bool:
    if not (isinstance(a, TensorData) and isinstance(b, TensorData) and a.plain and b.plain):
        return False
    keys = [[(t.data_ptr(), t.shape, t.stride()) for t in tensors(d.inputs)] for d in (a, b)]
    return keys[0] == keys[1]
