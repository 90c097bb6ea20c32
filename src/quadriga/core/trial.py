"""One recipe tried: what it was, what it cost, what was measured, how it ended. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.recipe import Recipe


class Status(StrEnum):
    """How a trial ended. Every end is a result; but those by a mishap say nothing of the recipe, and are tried again."""

    COMPLETE = "complete"
    REFUSED = "refused"  # a method does not apply, or two may not follow each other
    DIVERGED = "diverged"  # NaN or infinite loss or metric
    FAILED = "failed"  # by an error in the code that it ran; the user's, or ours
    OUT_OF_MEMORY = "out of memory"
    LOST = "lost"  # its process or machine ended without an answer, or its disk was full
    TIMED_OUT = "timed out"

    @property
    def mishap(self) -> bool:
        """Whether it was by machine, signal, memory or disk, and not by what was tried."""
        return self in (Status.OUT_OF_MEMORY, Status.LOST)

    @classmethod
    def _missing_(cls, value: object) -> Status | None:
        return cls.FAILED if value == "crashed" else None  # as stores of version 1 have it


FIELDS = {"number": int, "stage": str, "recipe": list, "seed": int, "status": str, "reason": str, "values": dict, "info": dict}


@dataclass(frozen=True)
class Trial:
    """An immutable record of one trial.

    Args:
        number: counts from 0 within the study.
        stage: "baseline", "cost", "search", "ablation", "control" or "final".
        recipe: what was tried.
        seed: of the weights, the data order and the transforms.
        status: how it ended.
        reason: why, for people, when it is not COMPLETE.
        values: measured numbers by name ("quality", "latency/1", "bytes", "samples", "seconds", …).
        info: further plain data (parent hash, epochs, note).
    """

    number: int
    stage: str
    recipe: Recipe
    seed: int = 0
    status: Status = Status.COMPLETE
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it ran to its end."""
        return self.status is Status.COMPLETE

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "number": self.number,
            "stage": self.stage,
            "name": self.recipe.name,
            "recipe": self.recipe.plain(),
            "seed": self.seed,
            "status": str(self.status),
            "reason": self.reason,
            "values": dict(self.values),
            "info": dict(self.info),
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Trial:
        """Read back what `plain` wrote.

        Raises:
            BadInput: it is no record of a trial.
        """
        if not isinstance(data, Mapping):
            raise BadInput(f"a trial is {str(data)[:60]!r}", "it has to be a table")
        for name, kind in FIELDS.items():
            if not isinstance(data.get(name), kind) or isinstance(data[name], bool):
                raise BadInput(f"a trial has {name} = {str(data.get(name))[:60]!r}", f"it has to be a {kind.__name__}")
        if odd := [k for k, v in data["values"].items() if not isinstance(v, int | float)]:
            raise BadInput(f"a trial has the value {odd[0]} = {str(data['values'][odd[0]])[:60]!r}", "it has to be a number")
        if data["status"] not in (*Status, "crashed"):
            raise BadInput(f"a trial has the status {data['status'][:60]!r}", did_you_mean(data["status"], Status))
        recipe = Recipe.from_plain(data["recipe"], str(data.get("name", "")))
        rest = {k: data[k] for k in ("number", "stage", "seed", "reason", "values", "info")}
        return cls(recipe=recipe, status=Status(data["status"]), **rest)

    def with_values(self, **values: float) -> Trial:
        """The same trial with more measured numbers."""
        return replace(self, values={**self.values, **values})
