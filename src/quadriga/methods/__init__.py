"""The registry of methods: every file of `methods/<family>/`, and every plug-in. Importing it imports no torch."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.method import Family, Method
from quadriga.core.recipe import TRAIN, Step

GROUP = "quadriga.methods"  # of entry points, each of which names a subclass of Method


def available() -> dict[str, type[Method]]:
    """All methods by name: ours, then plug-ins. A file of ours that does not import is an error, a plug-in a warning."""
    return dict(_found())


@cache
def _found() -> dict[str, type[Method]]:
    own = {cls.name: cls for family in Family for cls in _of_family(family)}
    for point in entry_points(group=GROUP):
        method = _plugin(point)
        if method is not None and own.setdefault(method.name, method) is not method:
            warnings.warn(f"the plug-in {point.value} is left out: {method.name} exists", stacklevel=2)
    return dict(sorted(own.items()))


def _of_family(family: Family) -> list[type[Method]]:
    """The methods in the files of one family; a file without any, or with a leading underscore, is a helper."""
    found = []
    folder = Path(__file__).parent / family.value
    for info in pkgutil.iter_modules([str(folder)]):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{family.value}.{info.name}")
        for cls in vars(module).values():
            if _is_method(cls) and cls.__module__ == module.__name__:
                assert cls.name == info.name, f"{module.__name__} holds the method {cls.name}: one file, one method, one name"
                assert cls.family is family, f"{cls.name} is of the family {cls.family}, and lies in {family}"
                found.append(cls)
    return found


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and not inspect.isabstract(value)


def _plugin(point: EntryPoint) -> type[Method] | None:
    try:
        method = point.load()
    except Exception as error:  # a stranger's code may raise anything, and must not take ours down
        warnings.warn(f"the plug-in {point.value} does not import: {error!r}", stacklevel=3)
        return None
    if not _is_method(method):
        warnings.warn(f"the plug-in {point.value} is not a subclass of Method", stacklevel=3)
        return None
    return method


def build(step: Step) -> Method:
    """The method of a recipe's step.

    Raises:
        BadInput: unknown name or field, or a bad value.

    Example:
        >>> build(Step("flip", {"probability": 0.25}))
        Flip(kind='random', probability=0.25)
    """
    known = available()
    if step.method not in known:
        raise BadInput(f'there is no method "{step.method}"', did_you_mean(step.method, [*known, TRAIN]))
    return known[step.method].parse(step.fields)


def cards() -> list[dict[str, Any]]:
    """One row of plain data for each method: what it does, its promise, its source, its fields."""
    return [card(method) for method in available().values()]


def card(method: type[Method]) -> dict[str, Any]:
    """A method's row; of a field it gives type, default and what the docstring says of it."""
    return {
        "name": method.name,
        "family": method.family.value,
        "numerics": method.numerics.value,
        "source": method.source,
        "about": inspect.cleandoc(method.__doc__ or "").partition("\n\n")[0].replace("\n", " "),
        "fields": fields(method),
        "search": {k: [_plain(v) for v in choices] for k, choices in method.search.items()},
        "shapes": method.shapes,
        "trains": method.trains,
        "common": method.common,
        "control": dict(method.control),
        **{k: sorted(getattr(method, k)) for k in ("requires", "adds", "removes", "writes")},
    }


def fields(method: type[Method]) -> dict[str, dict[str, Any]]:
    """For each field its type, its default (left out where one is required) and the docstring's line about it."""
    hints, about = typing.get_type_hints(method), field_docs(method)
    rows = {}
    for f in dataclasses.fields(method):
        row = {"type": _spelled(hints[f.name]), "about": about.get(f.name, "")}
        rows[f.name] = row if f.default is dataclasses.MISSING else {**row, "default": _plain(f.default)}
    return rows


def _spelled(hint: Any) -> str:
    """A type as people write it.

    Example:
        >>> from collections.abc import Mapping
        >>> _spelled(typing.Union[int, typing.Literal["auto"], Mapping[str, int]])
        "int | Literal['auto'] | Mapping[str, int]"
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_spelled, typing.get_args(hint)))
    if hint is types.NoneType:
        return "None"
    text = hint.__name__ if type(hint) is type else str(hint)
    return text.replace("typing.", "").replace("collections.abc.", "")


def field_docs(method: type[Method]) -> dict[str, str]:
    """Field name → what the docstring's `Args` say of it."""
    body = inspect.cleandoc(method.__doc__ or "").partition("Args:\n")[2]
    block = re.match(r"(?:[ ]{4}.*\n?|\n(?=    ))*", body)
    joined = re.sub(r"\n {5,}", " ", block[0] if block else "")
    return {name: text for names, text in re.findall(r"^ {4}([\w, ]+): (.*)$", joined, re.M) for name in names.split(", ")}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
