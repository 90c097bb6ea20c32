"""Where the time of the unchanged model goes, layer by layer, and what there is to gain at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quadriga.core.roofline import bounds, gain_if_free
from quadriga.report import text
from quadriga.report.document import Block, Figure, Section, Table, Text
from quadriga.report.roofline import drawable, roofline

Records = Mapping[str, Any]
MOST = 12  # rows of a table; the layers after them are added up
COLUMNS = ("layer", "kind", "time", "share", "FLOP", "bytes", "parameters", "limit", "of the roofline", "if free")


def profile(records: Records) -> Section:
    """For each batch size a table, slowest layer first, what there is to gain, and the plot; nothing if not profiled."""
    given = records["profile"]
    limits = given.get("ceilings") or {}
    blocks: list[Block] = []
    for batch in sorted((b for b in given.get("batches") or () if b["layers"]), key=lambda b: -b["batch"]):
        blocks += [_table(batch), *gains(batch, limits), *_figure(batch, limits)]
    if blocks:
        blocks = [Text(_machine(given)), *ceilings(limits), *blocks, *_training(records), Text(READ, "note")]
    return Section("profile", "Where the time goes", tuple(blocks))


READ = (
    "Between layers is what the model does in its own forward, such as functional activations and pooling. Bytes are inputs, "
    "outputs and weights, each once. Limit: what a layer would wait for at the roofline, which is the best float32 product "
    "and, for its bytes, the fastest copy at least as large. If free: how many times faster the whole model would be without "
    "the layer, the most that changing it alone can give (Amdahl's law). What there is to gain at most: every layer at its "
    "roofline in a type, or as it is where that is faster, with bytes in proportion to the type's width. A runtime that fuses "
    "layers saves bytes that are counted here, and what is between the layers may be work too, so a bound is a ceiling and no "
    "forecast."
)
NAMES = {
    "default": "float32 product, as PyTorch does it unasked",
    "fp32": "float32 product, the best",
    "bf16": "bf16 product",
    "int8": "int8 product",
}


def ceilings(limits: Mapping[str, Any]) -> list[Table]:
    """What this machine reaches, by type and by size of a copy; nothing for older records, which have two numbers."""
    missing = limits.get("missing") or {}
    products = [
        (NAMES.get(kind, kind), text.operations(rate), str(missing.get(kind) or text.NONE))
        for kind, rate in (limits.get("products") or {}).items()
    ]
    copies = [
        (f"copy, {text.size(size)} read and written", text.size(rate), text.NONE) for size, rate in limits.get("copies") or ()
    ]
    columns = ("ceiling", "a second", "remark")
    return [Table(columns, (*products, *copies), ("a second",), "What this machine reaches")] if products else []


def gains(given: Mapping[str, Any], limits: Mapping[str, Any]) -> list[Table]:
    """What each family could gain at most in a forward pass."""
    found = bounds(given["layers"], limits)
    rows = tuple((str(b["family"]), str(b["if"]), text.seconds(b["seconds"]), text.ratio(b["gain"])) for b in found)
    columns = ("family", "if", "a call takes", "speed-up at most")
    return [Table(columns, rows, columns[2:], f"Batch {given['batch']}: what there is to gain at most")] if rows else []


def _figure(given: Mapping[str, Any], limits: Mapping[str, Any]) -> list[Figure]:
    shown = drawable(given["layers"])
    if not shown or not limits.get("flops") or not limits.get("bytes"):
        return []
    rest = max(0.0, 1 - sum(row["share"] for row in shown))
    caption = (
        f"Batch {given['batch']}: one disc a layer, its area the share of the time. Level lines are the best products, slopes "
        "the copies: left of the corner a layer waits for its data, right of it for arithmetic; how far it lies below the line "
        f"is what it does not use. {text.percent(rest)} of the time is in layers without products and between layers, which "
        "have no place here."
    )
    return [Figure("roofline", roofline(given["layers"], limits), caption)]


def _training(records: Records) -> list[Text]:
    """How far the baseline's training is from the float32 ceiling, where both its seconds and its operations are known."""
    base, limits = records.get("baseline") or {}, records["profile"].get("ceilings") or {}
    seconds, flops = base.get("train_seconds"), base.get("train_flops")
    if not seconds or not flops or not limits.get("flops"):
        return []
    least = flops / limits["flops"]
    told = (
        f"Training the baseline took {text.seconds(seconds)} for {text.operations(flops)}, counted as three forward passes a "
        f"sample. At the float32 ceiling these take {text.seconds(least)}, so {text.ratio(seconds / least)} is the most that "
        "executing the same training faster in float32 can give; fewer samples or operations, and narrower types, go beyond it."
    )
    return [Text(told)]


def _machine(given: Mapping[str, Any]) -> str:
    limits, threads = given.get("ceilings") or {}, given.get("threads")
    told = f"The unchanged model in eager PyTorch, on {threads} thread{'s' * (threads != 1)}." if threads else ""
    if limits.get("flops") and limits.get("bytes"):
        told += (
            f" There this machine reaches {text.operations(limits['flops'])} a second in a float32 product and copies "
            f"{text.size(limits['bytes'])} a second where no cache helps."
        )
    return told.strip() or "The unchanged model in eager PyTorch."


def _table(given: Mapping[str, Any]) -> Table:
    rows = [*given["layers"][:MOST], *_rest(given["layers"][MOST:])]
    return Table(
        COLUMNS,
        tuple(_row(r) for r in rows),
        COLUMNS[2:7] + COLUMNS[8:],
        f"Batch {given['batch']}: {text.seconds(given['seconds'])} a call",
    )


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
