"""Matching layers of two networks, and what they put out in a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from quadriga.core.batch import Tree, primary, resize
from quadriga.methods.structure._teacher import refusal, trial

CONTAINERS = (nn.Sequential, nn.ModuleList)
EXAMPLES = 3  # in the trial pass: a number that few other dimensions have


@dataclass(frozen=True)
class Pair:
    """A layer of the student and the teacher's that it is compared with.

    Args:
        student, teacher: names of the layers.
        shapes: of what they put out for a few examples.
    """

    student: str
    teacher: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def __str__(self) -> str:
        (mine, theirs) = (list(s[1:]) for s in self.shapes)
        return f"{self.student} {mine} and the teacher's {self.teacher} {theirs}"


@contextmanager
def tapped(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What these layers put out last, by name, while this is entered: the first tensor, where there are several.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with tapped(net, ["0"]) as seen:
        ...     _ = net(torch.ones(4, 2))
        >>> seen["0"].shape
        torch.Size([4, 3])
    """
    seen: dict[str, Tensor] = {}
    handles = [model.get_submodule(name).register_forward_hook(partial(_keep, seen, name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tree) -> None:
    try:
        seen[name] = primary(output)
    except TypeError:  # a layer that puts out no tensor is no layer to compare
        seen.pop(name, None)


def pairs(student: nn.Module, teacher: nn.Module, example: Tree, only: str = "*") -> list[Pair]:
    """The layers of two networks that can be compared, in the order in which the teacher defines them.

    With `only` as "*" these are blocks (children of the outermost Sequential or ModuleList) and the layers with a matrix
    of weights outside of them, but for embeddings and the layer that gives the answer; else all that match. Layers
    belong together by name; blocks of lists of unequal length, by their relative depth.

    Args:
        student, teacher: both run on the example once, in evaluation mode.
        example: inputs of some examples.
        only: globs of the teacher's names, comma-separated.
    """
    names = _by_structure(student, teacher) if only == "*" else _by_name(student, teacher, only)
    mine, mine_last = _trial(student, example, [s for s, _ in names])
    theirs, theirs_last = _trial(teacher, example, [t for _, t in names])
    found = []
    for s, t in names:
        outputs = (mine.get(s), theirs.get(t))
        answers = outputs[0] is mine_last or outputs[1] is theirs_last
        if all(o is not None and _of_examples(o) for o in outputs) and not (only == "*" and answers):
            found.append(Pair(s, t, tuple(tuple(o.shape) for o in outputs)))  # type: ignore[arg-type,union-attr]
    return found


def _trial(model: nn.Module, example: Tree, names: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
    inputs = resize(example, EXAMPLES)
    with tapped(model, names) as seen:
        answer = primary(trial(model, inputs))
    return dict(seen), answer


def caught(seen: dict[str, Tensor], names: Iterable[str], step: str) -> dict[str, Tensor]:
    """What was seen of these layers, taken out, so that no graph lives on until the next pass.

    Raises:
        NotApplicable: one was not seen, which would make the term another one.
    """
    found = dict(seen)
    seen.clear()
    if missing := [n for n in names if n not in found]:
        raise refusal(step, f"{missing[0]} did not act in this forward pass", "name other layers by only")
    return found


def _of_examples(output: Tensor) -> bool:
    return output.dim() > 1 and output.is_floating_point() and len(output) == EXAMPLES


def _by_name(student: nn.Module, teacher: nn.Module, only: str) -> list[tuple[str, str]]:
    patterns, known = [p.strip() for p in only.split(",")], dict(student.named_modules())
    return [(n, n) for n, _ in teacher.named_modules() if n in known and any(fnmatchcase(n, p) for p in patterns)]


def _by_structure(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    known = dict(student.named_modules())
    found: list[tuple[str, str]] = []
    for name, module in _units(teacher, ""):
        mine = known.get(name)
        if type(module) in CONTAINERS and type(mine) in CONTAINERS:
            found += _blocks(name, mine, module)
        elif mine is not None:
            found.append((name, name))
    return found


def _units(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost containers, and the layers with a matrix of weights outside of them."""
    if type(module) in CONTAINERS:
        yield prefix, module
    elif is_parametrized(module) or not any(True for _ in module.children()):
        if any(p.dim() > 1 for p in module.parameters()) and not isinstance(module, nn.Embedding):
            yield prefix, module
    else:
        for name, child in module.named_children():
            yield from _units(child, f"{prefix}.{name}" if prefix else name)


def _blocks(name: str, mine: Any, theirs: Any) -> list[tuple[str, str]]:
    own, other = _children(name, mine), _children(name, theirs)
    if len(mine) == len(theirs):
        return [(n, n) for n in other if n in own]
    return [(n, other[at_depth(i, len(own), len(other))]) for i, n in enumerate(own)] if other else []


def _children(name: str, module: nn.Module) -> list[str]:
    weighted = [n for n, child in module.named_children() if any(True for _ in child.parameters())]
    return [f"{name}.{n}" if name else n for n in weighted]


def at_depth(place: int, count: int, other: int) -> int:
    """The place among `other` that is as deep as `place` among `count`; the last belongs to the last.

    Example:
        >>> [at_depth(i, 2, 6) for i in range(2)], [at_depth(i, 3, 3) for i in range(3)]
        ([2, 5], [0, 1, 2])
    """
    return -(-(place + 1) * other // count) - 1


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the last included.

    Example:
        >>> spread(list("abcdef"), 3), spread(list("ab"), 3)
        (['b', 'd', 'f'], ['a', 'b'])
    """
    return items if len(items) <= count else [items[at_depth(i, count, len(items))] for i in range(count)]
