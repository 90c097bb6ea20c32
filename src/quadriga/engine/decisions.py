"""Decisions by measurement, made once: plain data kept under the study's folder, so that every process sees the same."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quadriga.core.files import read_json, write_json
from quadriga.core.recipe import Recipe, Step
from quadriga.core.slots import RuntimeSpec
from quadriga.parallel import group

SETTLED = ("round_to", "widths")  # fields of methods that a decision of that name can fill in


class Decisions:
    """The service `Context.decide` of one walk.

    A decision belongs to the workload, the seed, the step that asks with the steps before it that shape the network, and the
    specification that the whole recipe ends in. What is kept is JSON, and it is read back even where it was just computed,
    so the first process and the others go on with equal data. Of processes that train together the first one measures; how the
    training is laid out over them is no part of the question.

    Args:
        folder: where `<hash>.json` files are kept; None keeps them in memory, for this walk.
        whose: gives what identifies workload and seed; called when something is decided.
        spec: what the recipe ends in.

    Example:
        >>> decide = Decisions(None, lambda: ["a workload", 0], RuntimeSpec())
        >>> decide("widths", lambda: {"conv1": 3}), decide("widths", lambda: {"conv1": 4})
        ({'conv1': 3}, {'conv1': 3})
    """

    def __init__(self, folder: Path | None, whose: Callable[[], list[Any]], spec: RuntimeSpec) -> None:
        self.folder, self.whose, self.spec = folder, whose, spec
        self.prefix = Recipe()  # what shapes the network, up to the step that is being applied; the walker moves it on
        self.at = 0  # the number of that step in the recipe
        self.made: dict[str, dict[str, Any]] = {}
        self.places: dict[str, int] = {}  # name of a decision → number of the step that asked

    def __call__(self, key: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returned when this was first asked."""
        asked = {
            "whose": self.whose(),
            "steps": self.prefix.plain(),
            "runtime": asdict(replace(self.spec, parallel=None)),
            "key": key,
        }
        name = digest(asked)
        if name not in self.made:
            self.made[name] = group.same(lambda: self._kept(name, asked, compute))
            self.places[name] = self.at
        return json.loads(json.dumps(self.made[name]["value"]))

    @property
    def mark(self) -> str:
        """A hash of all decisions so far, "" without any: weights trained behind them depend on what was decided.

        They do not depend on what it was decided for: recipes for two runtimes that decide alike share their training.
        """
        return digest([[row["steps"], row["key"], row["value"]] for row in self.made.values()]) if self.made else ""

    def plain(self) -> list[dict[str, Any]]:
        """All decisions so far, for reports: the step that asked and its number, its key and the value."""
        rows = [(self.places[name], row) for name, row in self.made.items()]
        return [{"index": at, "step": row["steps"][-1], "key": row["key"], "value": row["value"]} for at, row in rows]

    def _kept(self, name: str, asked: dict[str, Any], compute: Callable[[], Any]) -> dict[str, Any]:
        if self.folder is None:
            return _row(asked, compute)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json"
        with open(self.folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be measuring the same; a killed one lets go
            if not path.exists():
                write_json(path, _row(asked, compute))
        return read_json(path)


def settled(recipe: Recipe, decisions: Iterable[Mapping[str, Any]], before: int = 0) -> Recipe:
    """The recipe with what was decided written out where a field of its step can say it: it rebuilds the network anywhere.

    Args:
        recipe: as it was walked.
        decisions: rows of `Decisions.plain`.
        before: how many more steps the recipe had when it was walked, with the workload's own training written out.

    Example:
        >>> decided = {"index": 0, "value": {"round_to": {"dense_out": 8}}}
        >>> str(settled(Recipe((Step("prune_channels", {"ratio": 0.5}),)), [decided]))
        "prune_channels(ratio=0.5, round_to={'dense_out': 8})"
    """
    for row in decisions:
        at, value = row["index"] - before, row["value"]
        told = {name: value[name] for name in SETTLED if isinstance(value, Mapping) and value.get(name)}
        recipe = recipe.replaced(at, Step(recipe.steps[at].method, {**recipe.steps[at].fields, **told}))
    return recipe


def _row(asked: dict[str, Any], compute: Callable[[], Any]) -> dict[str, Any]:
    return json.loads(json.dumps({**asked, "value": compute()}, allow_nan=False))


def digest(plain: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
