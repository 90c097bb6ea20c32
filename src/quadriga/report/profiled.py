"""The page of `quadriga profile`: the report's section on where the time goes, alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadriga.core.files import atomic_write
from quadriga.report import text
from quadriga.report.document import Document, Section
from quadriga.report.layers import profile
from quadriga.report.roofline import drawable, roofline
from quadriga.report.schema import finite

Found = Mapping[str, Any]  # what `quadriga profile --json` prints


def section(found: Found) -> Section:
    """Tables of the layers, of the machine's ceilings and of the bounds, and the plot."""
    batch = {"batch": found.get("batch"), "seconds": found.get("seconds"), "layers": found["layers"]}
    given = {"threads": found.get("threads"), "ceilings": found.get("ceilings") or {}, "batches": [batch]}
    return profile({"profile": given})


def document(found: Found) -> Document:
    """One section below the call's time, its slowest row, and the bounds."""
    slowest = found["layers"][0]
    verdict = (
        f"A batch of {found['batch']} takes {text.seconds(found['seconds'])} in eager PyTorch, "
        f"{text.percent(slowest['share'])} of it in {slowest['layer'].strip('()')}."
    )
    figures = tuple(
        (text.ratio(bound["gain"]), "as fast at most", f"if {bound['if']}")
        for bound in found["bounds"]
        if bound["gain"] is not None
    )
    return Document(str(found["workload"]), "profiled", verdict, figures, (section(found),))


def write(found: Found, folder: str | Path) -> list[Path]:
    """Write profile.html, profile.md, profile.json and, where any layer has a place on it, roofline.svg.

    Args:
        found: what `stages.verbs.profile` returns.
        folder: where to write; it is made if need be.

    Returns:
        the files, the page first.
    """
    from quadriga.report import markdown, page  # here, so that a table on the console costs no template engine

    full = finite(found)
    made, rows = document(full), drawable(full["layers"])
    contents = {
        "profile.html": page.render(made, full, "profile"),
        "profile.md": markdown.render(made, ("roofline",) if rows else ()),
        "profile.json": json.dumps(full, indent=1, allow_nan=False, ensure_ascii=False),
    }
    if rows:
        contents["roofline.svg"] = roofline(full["layers"], full["ceilings"], page.picture_sheet())
    for name, content in contents.items():
        atomic_write(Path(folder) / name, content)
    return [Path(folder) / name for name in contents]
