"""Hand over what was found: the artifact with its card, and a folder without what only served on the way."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.artifact import announced
from quadriga.artifact.announce import BATCH
from quadriga.core.folders import WORK
from quadriga.measure.scores import Scores
from quadriga.report.schema import complete
from quadriga.report.verdict import sentence
from quadriga.runtime import open_built
from quadriga.stages.conclude import Conclusion
from quadriga.stages.state import Study


@dataclass(frozen=True)
class Kept:
    """What was handed over.

    Args:
        folder: of the artifact, or None.
        why_not: why there is none, or "".
        written: whether one was written, and did not hold.
    """

    folder: Path | None
    why_not: str = ""
    written: bool = False


def keep(study: Study, conclusion: Conclusion, evidence: dict[str, Any]) -> Kept:
    """Write the winner's artifact, or the unchanged baseline's, and load it as its user would before it is announced.

    The artifact as it lies on disk is loaded in a fresh process by its own `load.py`, verified and scored; what does not hold
    is put aside.
    """
    winner = conclusion.winner
    recipe = winner.recipe if winner else study.workload.baseline
    if study.find(("final", "baseline"), recipe) is None:
        return Kept(None, "there is no trained baseline")
    study.engine.renew()
    args = {"folder": winner.folder if winner else None, "evidence": evidence, "card": _card(study, evidence)}
    study.say("report", "writing the artifact")
    study.submit("artifact", "artifact", recipe, limit=60, args=args)
    done = study.collect_all(study.budget.left - 90)
    if not done or not done[-1].ok:
        study.forget()
        return Kept(None, done[-1].reason if done else "no time was left to write it")
    target = study.folder / "artifact"
    split, expected = _expected(study, conclusion)
    metric = study.workload.metric
    found = announced(target, getattr(study.workload, split), metric, expected, say=lambda text: study.say("report", text))
    if found.ok:
        return Kept(target)
    aside = study.folder / "artifact-failed"
    shutil.rmtree(aside, ignore_errors=True)
    target.rename(aside)
    return Kept(None, f"{found.problem}; it was put aside, in {aside.name}", written=True)


def _expected(study: Study, conclusion: Conclusion) -> tuple[str, dict[int, Scores]]:
    """The split, and the scores on it that are about to be announced, by batch size."""
    scores = study.folder / "scores"
    if conclusion.winner is None:
        return "val", {BATCH: study.scores(study.baseline)}
    number = next(n for n, f in enumerate(conclusion.finalists) if f is conclusion.winner)
    found = {BATCH: Scores.load(scores / f"test-final-{number}.npz")}
    if open_built(study.folder / conclusion.winner.folder).spec.alone is not None:
        found[1] = Scores.load(scores / f"alone-test-final-{number}.npz")
    return "test", found


def _card(study: Study, evidence: dict[str, Any]) -> dict[str, Any]:
    """What the artifact's README tells, as `artifact.card.render` takes it."""
    workload, winner = study.workload, evidence["winner"]
    told = complete({"result": evidence, "floor": {"text": str(study.options.floor)}})
    data = workload.data_note.get("data")
    limits = [f"Its quality is known for this data: {data}."] if data else []
    return {
        "title": f"{workload.name}, {'made cheaper' if winner else 'unchanged: nothing better was found'}",
        "about": sentence(told), "winner": winner, "baseline": evidence["baseline"], "limits": limits,
        "command": study.options.command, "machine": dict(study.machine), "seed": study.options.seed,
    }  # fmt: skip


def clear(study: Study) -> None:
    """Remove what only served on the way; checkpoints and the store stay."""
    shutil.rmtree(study.folder / WORK, ignore_errors=True)
