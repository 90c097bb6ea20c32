"""How a process comes to work for a study: it makes the workload again, and has to find the one that the driver has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quadriga.core.errors import BadInput
from quadriga.core.trial import Status

if TYPE_CHECKING:
    from quadriga.engine.tasks import Desk


def admitted(spec: Mapping[str, Any]) -> Desk:
    """A desk for the workload of a spec: `workload`, `folder`, `seed`, and `key`, "" where there is none to compare with.

    Raises:
        BadInput: the workload cannot be loaded here, or is another one than the driver's.
    """
    from quadriga.engine.tasks import Desk
    from quadriga.workloads import load
    from quadriga.workloads.identity import same

    workload, folder = load(spec["workload"]), Path(spec["folder"])
    if spec["key"]:
        same(workload, folder, spec["key"])
    return Desk(workload, folder, spec["seed"])


def fatal(error: BadInput) -> dict[str, Any]:
    """The answer to every order of a process that could not begin: it ends the study, since no other answer would differ."""
    return {"status": Status.FAILED, "reason": str(error), "bad_input": [error.problem, error.remedy], "fatal": True}
