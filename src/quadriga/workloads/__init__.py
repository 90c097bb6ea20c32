"""Workloads: ready-made ones by name, and the user's own from a Python file."""

from __future__ import annotations

import json
import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.workload import Workload
from quadriga.workloads import ready, user
from quadriga.workloads.check import check
from quadriga.workloads.fashion import Splits, fashion_mnist
from quadriga.workloads.glosses import wordnet_glosses
from quadriga.workloads.plays import shakespeare

__all__ = ["Splits", "check", "fashion_mnist", "load", "names", "shakespeare", "wordnet_glosses"]


def names() -> list[str]:
    """The ready-made workloads: the files in `ready/`.

    Example:
        >>> "lenet_fashion" in names()
        True
    """
    return sorted(module.name for module in pkgutil.iter_modules(ready.__path__))


def load(reference: str, **options: Any) -> Workload:
    """Make a workload from how people call it; its `reference` lets another process make it again.

    Args:
        reference: a ready-made name ("lenet_fashion", "gpt_shakespeare:2M"), or a file and perhaps its function
            ("path/file.py", "path/file.py:function"); options may follow, as in "lstm_wordnet?examples=2000".
        options: arguments of its function, such as size="2M"; strings, numbers or booleans.

    Raises:
        BadInput: an unknown name or option, a missing file, an error in it (with file and line), or another type returned.
    """
    target, part, given = parse(reference)
    given.update(options)
    for key, value in given.items():
        if value is not None and not isinstance(value, str | int | float | bool):
            raise BadInput(f"the option {key} is a {type(value).__name__}", "give a string, a number or a boolean")
    if target.endswith(".py") or "/" in target:
        path = Path(target).expanduser().resolve()
        part, function = user.pick(user.read_file(path), part, path)
        made = user.make(function, given, f"{part}() of {path.name}", path.parent)
        name = f"{path}:{part}"
    else:
        if target not in names():
            raise BadInput(f'there is no workload "{target}"', f"{did_you_mean(target, names())} or give a file, path/file.py")
        if part is not None:
            given["size"] = part
        made = user.make(import_module(f"{ready.__name__}.{target}").workload, given, target)
        name = target
    return replace(made, reference=name + spell(given))


def parse(reference: str) -> tuple[str, str | None, dict[str, Any]]:
    """A reference's target, the part behind its colon, and its options.

    Example:
        >>> parse("a/b.py:make?n=3")
        ('a/b.py', 'make', {'n': 3})
    """
    head, mark, query = reference.rpartition("?")
    if not mark or "=" not in query:
        head, query = reference, ""
    target, colon, part = head.rpartition(":")
    if not colon or "/" in part or "\\" in part:
        target, part = head, ""
    return target, part or None, {key: _value(text) for key, text in parse_qsl(query)}


def spell(options: dict[str, Any]) -> str:
    """Options in the form that `parse` reads back.

    Example:
        >>> spell({"size": "2M", "examples": 10})
        '?examples=10&size=2M'
    """
    rows = {
        k: v if isinstance(v, str) and _value(v) == v else json.dumps(v) for k, v in sorted(options.items()) if v is not None
    }
    return f"?{urlencode(rows)}" if rows else ""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
