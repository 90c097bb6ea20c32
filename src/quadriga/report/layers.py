"""Where the time of the unchanged model goes, layer by layer, and what there is to gain at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quadriga.report import text
from quadriga.report.document import Section, Table, Text

Records = Mapping[str, Any]
MOST = 12  # rows of a table; the layers after them are added up
COLUMNS = ("layer", "kind", "time", "share", "FLOP", "bytes", "parameters", "limit", "of the roofline", "if free")


def profile(records: Records) -> Section:
    """A table a batch size, slowest layer first; nothing where the model was not profiled."""
    batches = records["profile"].get("batches") or []
    tables = tuple(_table(b) for b in sorted(batches, key=lambda b: -b["batch"]) if b["layers"])
    blocks = (Text(_machine(records["profile"])), *tables, Text(READ, "note")) if tables else ()
    return Section("profile", "Where the time goes", blocks)


READ = (
    "Between layers is what the model does in its own forward, such as functional activations and pooling. Bytes are inputs, "
    "outputs and weights, each once. Limit: what a layer would wait for at the roofline; data that stay in the cache can "
    "exceed it. If free: how many times faster the whole model would be without the layer, the most that changing it alone "
    "can give (Amdahl's law)."
)


def _machine(given: Mapping[str, Any]) -> str:
    limits, threads = given.get("ceilings") or {}, given.get("threads")
    told = f"The unchanged model in eager PyTorch, on {threads} thread{'s' * (threads != 1)}." if threads else ""
    if limits.get("flops") and limits.get("bytes"):
        told += (
            f" There this machine reaches {text.operations(limits['flops'])} a second in a matrix product and copies "
            f"{text.size(limits['bytes'])} a second; these two are the roofline."
        )
    return told.strip() or "The unchanged model in eager PyTorch."


def _table(given: Mapping[str, Any]) -> Table:
    rows = [*given["layers"][:MOST], *_rest(given["layers"][MOST:])]
    least = roofline_seconds(given["layers"])
    title = f"Batch {given['batch']}: {text.seconds(given['seconds'])} a call"
    if least > 0:
        title += f"; with every layer at its roofline and nothing between them {text.seconds(least)}"
        title += f", {text.ratio(given['seconds'] / least)} as fast"
    return Table(COLUMNS, tuple(_row(r) for r in rows), COLUMNS[2:7] + COLUMNS[8:], title)


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    share = row["share"]
    return (
        str(row["layer"]),
        str(row.get("kind") or text.NONE),
        text.seconds(row["seconds"]),
        text.percent(share),
        text.operations(row["flops"]).removesuffix("FLOP").strip() if row["flops"] else text.NONE,
        text.size(row["bytes"]) if row["bytes"] else text.NONE,
        text.number(row["parameters"]) if row["parameters"] else text.NONE,
        str(row.get("bound") or text.NONE),
        text.percent(row.get("fraction")),
        text.ratio(gain_if_free(share)),
    )


def _rest(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layers that the table has no room for, as one row."""
    if not rows:
        return []
    sums = {k: sum(r[k] for r in rows) for k in ("seconds", "share", "flops", "bytes", "parameters")}
    return [{"layer": f"({len(rows)} more)", "kind": "", **sums}]


def gain_if_free(share: float) -> float | None:
    """How many times faster a whole is when a part of it takes no time; None where the part is all of it.

    Source: Amdahl 1967, AFIPS 30, 483–485.

    Example:
        >>> gain_if_free(0.75), gain_if_free(0.0)
        (4.0, 1.0)
    """
    return 1 / (1 - share) if share < 1 else None


def roofline_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all layers at their roofline; one that is faster already counts as it is, one of unknown bytes as nothing.

    Example:
        >>> roofline_seconds([{"seconds": 2.0, "fraction": 0.5}, {"seconds": 1.0, "fraction": 1.3}, {"seconds": 9.0}])
        2.0
    """
    return sum(row["seconds"] * min(1.0, row.get("fraction") or 0.0) for row in rows)
