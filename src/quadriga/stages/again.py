"""Which trials of earlier sessions count: facts do, mishaps are tried again, failures once the code they ran has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from quadriga import __version__
from quadriga.core.trial import Status, Trial
from quadriga.workloads import parse
from quadriga.workloads.suspects import files

FIRST = ("export", "pace", "baseline")  # without which there is no study: they are tried again however they failed
BY_TIME = (*FIRST, "final", "opponent", "test", "artifact")  # whose limit hangs on the budget, or on how busy the machine was
NEVER = {  # ends that say nothing of the recipe when the same command is given again → the stages of which that is so
    Status.FAILED: FIRST,
    Status.TIMED_OUT: BY_TIME,
}


def code_key(reference: str | None) -> str:
    """A digest of the code that trials run: the user's file and those that it imports from its folder, Quadriga, and torch."""
    total = hashlib.sha256(f"{__version__} {torch.__version__}".encode())
    for file in files(Path(parse(reference)[0])) if reference else ():
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


def counts(trial: Trial, code: str) -> bool:
    """Whether a trial of an earlier session is a fact.

    Args:
        code: what `code_key` says now.

    Example:
        >>> from quadriga.core.recipe import Recipe
        >>> killed = Trial(0, "search", Recipe(), status=Status.LOST)
        >>> wrong = Trial(1, "search", Recipe(), status=Status.FAILED, info={"code": "a"})
        >>> counts(killed, "a"), counts(wrong, "a"), counts(wrong, "b")
        (False, True, False)
    """
    if trial.status.mishap or trial.stage in NEVER.get(trial.status, ()):
        return False
    return trial.status is not Status.FAILED or trial.info.get("code") == code


def told(lost: Iterable[Trial]) -> list[str]:
    """A note of what is tried again."""
    ends = [str(t.status) for t in lost]
    parts = [f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)]
    return [f"tried again, since their end said nothing of what was tried: {', '.join(parts)}"] if parts else []
