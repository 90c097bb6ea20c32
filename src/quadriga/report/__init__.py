"""Records → report.html, report.md, report.json and pareto.svg. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput
from quadriga.core.files import atomic_write, read_json
from quadriga.core.folders import claimed
from quadriga.report.schema import complete, finite


def write(records: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write the report of a study, whatever its status; the page comes first in the list.

    Args:
        records: as `schema.Records` describes; missing keys are a study that ended early.
        folder: where to write; it is made if need be.

    Raises:
        BadInput: the records hold no result, or the folder cannot be written.
    """
    from quadriga.report import markdown, page, plots  # here, so that the schema costs no template engine
    from quadriga.report.sections import document

    full = finite(complete(records))
    made = document(full)
    contents = {
        "report.html": page.render(made, full),
        "report.md": markdown.render(made),
        "report.json": json.dumps({"document": made.plain(), "records": full}, indent=1, allow_nan=False, ensure_ascii=False),
    }
    if full["pareto"]:
        unit = full["workload"].get("unit", "")
        contents["pareto.svg"] = plots.pareto(full["pareto"], full["floor"].get("margin"), unit, page.picture_sheet())
    for name, content in contents.items():
        atomic_write(Path(folder) / name, content)
    return [Path(folder) / name for name in contents]


def again(folder: str | Path) -> list[Path]:
    """Write the report of a study again, from its records.json.

    Raises:
        BadInput: it is no study's folder, another process is at it, or its records are damaged.
    """
    records = read_json(Path(folder) / "records.json")
    with claimed(folder, "study") as ours:
        try:
            return write(records, ours)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            told = f"{type(error).__name__}: {str(error)[:80]}"
            raise BadInput(f"{ours / 'records.json'} is not what a study wrote: {told}", "restore the file") from error
