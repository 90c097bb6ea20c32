"""A recipe: an ordered list of steps as plain data, with a content hash. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput
from quadriga.core.files import parse_json, read_text

TRAIN = "train"
MOST, DEEP = 1 << 20, 8  # bytes of a recipe's file; lists and tables within one another in a field
TRAIN_FIELDS = {"epochs": float, "continue": bool, "baseline": bool}


@dataclass(frozen=True)
class Step:
    """One line of a recipe: a method's name and its fields, or `train` with `epochs` and `continue`, or with `baseline` alone.

    A field that is None is left out, since the files cannot say it: it means the method's default.
    """

    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", {k: v for k, v in self.fields.items() if v is not None})

    @property
    def is_train(self) -> bool:
        """Whether the engine carries this step out."""
        return self.method == TRAIN

    def plain(self) -> dict[str, Any]:
        """As one flat table, the form of the files."""
        return {"method": self.method, **{k: list(v) if isinstance(v, tuple) else v for k, v in self.fields.items()}}

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v}" for k, v in self.fields.items())
        return f"{self.method}({inside})"


def step(method: str, /, **fields: Any) -> Step:
    """A step; `continue_=True` stands for the field `continue`.

    Example:
        >>> str(step("train", epochs=2, continue_=True))
        'train(epochs=2, continue=True)'
    """
    return Step(method, {k.rstrip("_"): v for k, v in fields.items()})


@dataclass(frozen=True)
class Recipe:
    """An ordered list of steps, read from top to bottom. Equality and `hash` are over the steps, not the name.

    Example:
        >>> recipe = Recipe((step("shrink", kernel=3), step("train", epochs=1)))
        >>> Recipe.from_toml(recipe.to_toml()) == recipe
        True
    """

    steps: tuple[Step, ...] = ()
    name: str = field(default="", compare=False)

    def on(self, baseline: Recipe) -> Recipe:
        """The recipe with a workload's own training written out, where it begins with `train(baseline=True)`.

        Args:
            baseline: empty for a model that comes trained.

        Example:
            >>> begun = Recipe((step("train", baseline=True), step("low_rank")))
            >>> str(begun.on(Recipe((step("train", epochs=3),)))), str(begun.on(Recipe()))
            ('train(epochs=3) → low_rank()', 'low_rank()')
        """
        begins = bool(self.steps) and bool(self.steps[0].is_train and self.steps[0].fields.get("baseline", False))
        return Recipe((*baseline.steps, *self.steps[1:]), self.name) if begins else self

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the canonical JSON of the steps."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:12]

    def plain(self) -> list[dict[str, Any]]:
        """The steps as plain tables."""
        return [s.plain() for s in self.steps]

    def without(self, index: int) -> Recipe:
        """The recipe with one step taken out."""
        return Recipe(self.steps[:index] + self.steps[index + 1 :], self.name)

    def replaced(self, index: int, new: Step) -> Recipe:
        """The recipe with one step exchanged."""
        return Recipe((*self.steps[:index], new, *self.steps[index + 1 :]), self.name)

    def __add__(self, steps: Iterable[Step]) -> Recipe:
        return Recipe((*self.steps, *steps), self.name)

    def __str__(self) -> str:
        return " → ".join(map(str, self.steps)) or "(unchanged)"

    @classmethod
    def from_plain(cls, rows: Iterable[Mapping[str, Any]], name: str = "") -> Recipe:
        """Read the plain form; checks shape and `train` fields, not the methods' fields.

        Raises:
            BadInput: a row without a method, a bad train step, or a value that no file can say.
        """
        if not isinstance(rows, Iterable) or isinstance(rows, str | bytes | Mapping):
            raise BadInput(f"the steps are {_short(rows)}", "a recipe is a list of steps")
        steps = []
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping) or not isinstance(row.get("method"), str):
                raise BadInput(f"step {number} is {_short(row)}", 'each [[step]] needs method = "name"')
            fields = {k: v for k, v in row.items() if k != "method"}
            if odd := [k for k, v in fields.items() if not isinstance(k, str) or not _plain(v)]:
                problem = f"step {number}: {_short(odd[0])} is {_short(fields[odd[0]])}"
                raise BadInput(problem, "give text, numbers, booleans, and lists and tables of these")
            if row["method"] == TRAIN:
                _check_train(number, fields)
            steps.append(Step(row["method"], fields))
        return cls(tuple(steps), name)

    @classmethod
    def from_toml(cls, text: str, name: str = "") -> Recipe:
        """Parse TOML: `name = "…"` is optional, then `[[step]]` tables."""
        try:
            data = tomllib.loads(text)
        except RecursionError as error:
            raise BadInput(f"the recipe {name} is nested too deeply", "see recipes/ for examples") from error
        except ValueError as error:  # of TOML, or a number of thousands of digits
            raise BadInput(f"the recipe {name} is not TOML: {error}", "see recipes/ for examples") from error
        if unknown := set(data) - {"name", "about", "step"}:
            raise BadInput(f"the recipe has an unknown key {sorted(unknown)[0]!r}", "it holds name, about and [[step]]")
        if not isinstance(data.get("name", name), str):
            raise BadInput(f"the recipe's name is {_short(data['name'])}", "give text")
        return cls.from_plain(data.get("step", []), data.get("name", name))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a `.toml` or `.json` file.

        Raises:
            BadInput: the file is missing or malformed.
        """
        path = Path(path)
        if not path.is_file():
            raise BadInput(f"there is no recipe file {path}", "give the path of a .toml or .json recipe")
        text = read_text(path, MOST)
        if path.suffix == ".json":
            try:
                rows = parse_json(text)
            except BadInput as error:
                raise BadInput(f"{path} is not JSON: {error.problem}", "it holds a list of steps") from error
            return cls.from_plain(rows, path.stem)
        return cls.from_toml(text, path.stem)

    def to_toml(self) -> str:
        """The file form, which `from_toml` reads back equal."""
        head = [f"name = {_toml(self.name)}", ""] if self.name else []
        tables = ["\n".join(["[[step]]", *(f"{_key(k)} = {_toml(v)}" for k, v in row.items())]) for row in self.plain()]
        return "\n".join(head) + "\n".join(t + "\n" for t in tables)


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether a value can stand in a recipe's file."""
    if isinstance(value, Mapping):
        return depth < DEEP and all(isinstance(k, str) and _plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return depth < DEEP and all(_plain(v, depth + 1) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    if isinstance(value, str):
        return not any("\ud800" <= c <= "\udfff" for c in value)  # halves of characters, which no file can hold
    return value is None or isinstance(value, bool | float)


def _short(value: Any) -> str:
    """A value in a message."""
    try:
        told = repr(value)
    except (RecursionError, ValueError):
        told = f"a {type(value).__name__}"
    return told if len(told) <= 80 else f"{told[:79]}…"


def _toml(value: Any) -> str:
    """A value as TOML writes it.

    Example:
        >>> _toml({"conv1": 8, "a.b": 4}), _toml([1, 2])
        ('{"conv1" = 8, "a.b" = 4}', '[1, 2]')
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has other words for these
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if name.isascii() and name.replace("_", "a").replace("-", "a").isalnum() else _toml(name)


def _check_train(number: int, fields: Mapping[str, Any]) -> None:
    if unknown := set(fields) - set(TRAIN_FIELDS):
        raise BadInput(f'step {number}: train has no field "{sorted(unknown)[0]}"', "it takes epochs, continue and baseline")
    if "baseline" in fields and (number != 1 or fields != {"baseline": True}):
        raise BadInput(f"step {number}: train has {_short(fields)}", "baseline = true stands alone, in the first step")
    epochs = fields.get("epochs")
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < 1e6):
        raise BadInput(f"step {number}: epochs is {_short(epochs)}", "give a positive number")
    if not isinstance(fields.get("continue", False), bool):
        raise BadInput(f"step {number}: continue is {_short(fields['continue'])}", "give true or false")
