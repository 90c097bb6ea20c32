"""Hand over what was found: the artifact with its card, and a folder without what only served on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quadriga.report.schema import complete
from quadriga.report.verdict import sentence
from quadriga.stages.conclude import Conclusion
from quadriga.stages.state import Study


def keep_winner(study: Study, conclusion: Conclusion, evidence: dict[str, Any]) -> Path | None:
    """Write the winner's artifact; without a winner the baseline's, as eager PyTorch runs it."""
    winner = conclusion.winner
    recipe = winner.recipe if winner else study.workload.baseline
    folder = winner.folder if winner else None
    if study.find(("final", "baseline"), recipe) is None:
        return None
    study.engine.renew()
    args = {"folder": folder, "evidence": evidence, "card": _card(study, evidence)}
    study.submit("artifact", "artifact", recipe, limit=60, args=args)
    done = study.collect_all(study.budget.left - 90)
    target = study.folder / "artifact"
    if not done or not done[-1].ok:
        study.notes.append(f"no artifact: {done[-1].reason if done else 'no time was left'}")
        return None
    return target


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
    for name in ("built", "timing"):
        shutil.rmtree(study.folder / name, ignore_errors=True)
