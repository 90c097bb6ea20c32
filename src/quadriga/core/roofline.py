"""The roofline as arithmetic: what a layer would take at the machine's ceilings, and what there is to gain at most. No torch.

Rows are those of `measure.roofline.profile`; ceilings are the plain form of `measure.ceilings.Ceilings`, or the two numbers
{"flops", "bytes"} of older records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTHS = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes of a number, weight and activation alike
REST = "(between layers)"
UNBOUNDED = "not bounded by a forward pass: it acts on what training costs"
Row = Mapping[str, Any]
Plain = Mapping[str, Any]


def product_rate(ceilings: Plain, kind: str = "fp32") -> float | None:
    """Operations a second of the machine's best product in a type; None where it has none, or it was not measured.

    Example:
        >>> product_rate({"flops": 8.0, "bytes": 1.0}), product_rate({"flops": 8.0, "bytes": 1.0}, "int8")
        (8.0, None)
    """
    found: float | None = ceilings.get("flops") if kind == "fp32" else (ceilings.get("products") or {}).get(kind)
    return found


def bandwidth(ceilings: Plain, moved: float) -> float:
    """Bytes a second for a layer that moves so many: the fastest copy at least as large, for smaller data may stay in a cache.

    Source: Ilic, Pratas and Sousa 2014, Cache-aware Roofline model, IEEE Computer Architecture Letters 13(1).

    Example:
        >>> limits = {"flops": 1.0, "bytes": 10.0, "copies": [[1000, 80.0], [10**9, 10.0]]}
        >>> bandwidth(limits, 500), bandwidth(limits, 5000), bandwidth(limits, 10**10)
        (80.0, 10.0, 10.0)
    """
    return float(max([rate for size, rate in ceilings.get("copies") or () if size >= moved], default=ceilings["bytes"]))


def waits(row: Row, ceilings: Plain, kind: str = "fp32") -> tuple[float, float]:
    """Seconds that a layer's operations and its bytes take at the ceilings, if all its numbers were of a type.

    Raises:
        ValueError: the machine has no product of this type.

    Example:
        >>> waits({"flops": 60, "bytes": 40}, {"flops": 10.0, "bytes": 8.0})
        (6.0, 5.0)
    """
    rate = product_rate(ceilings, kind)
    if not rate:
        raise ValueError(f"this machine has no {kind} product that was measured")
    moved = row["bytes"] * WIDTHS[kind] / WIDTHS["fp32"]
    return row["flops"] / rate, moved / bandwidth(ceilings, moved)


def least_seconds(rows: Sequence[Row], ceilings: Plain, kind: str = "fp32") -> float:
    """Seconds of a pass with each layer at its roofline in a type, or as it is where that is faster, and nothing between.

    Whatever kernels compute the same layers one by one, in this type or as they are, take at least as long, as far as the
    ceilings are ceilings; fusing layers can save bytes beyond. What is computed between the layers counts with its
    operations alone, for its bytes are unknown.

    Example:
        >>> rows = [{"seconds": 9.0, "flops": 60, "bytes": 40}, {"seconds": 1.0, "flops": 60, "bytes": 40}]
        >>> least_seconds(rows, {"flops": 10.0, "bytes": 8.0})
        7.0
    """
    return sum(min(row["seconds"], max(waits(row, ceilings, kind))) for row in rows)


def overhead_seconds(rows: Sequence[Row], ceilings: Plain) -> float:
    """Seconds between the layers beyond what the operations there need: calls, copies, unfused arithmetic.

    Example:
        >>> overhead_seconds([{"layer": REST, "seconds": 5.0, "flops": 20, "bytes": 0}], {"flops": 10.0, "bytes": 8.0})
        3.0
    """
    return sum(r["seconds"] - min(r["seconds"], r["flops"] / ceilings["flops"]) for r in rows if r["layer"] == REST)


def gain_if_free(share: float) -> float | None:
    """How many times faster a whole is when a part of it takes no time; None where the part is all of it.

    Source: Amdahl 1967, AFIPS 30, 483–485.

    Example:
        >>> gain_if_free(0.75), gain_if_free(0.0)
        (4.0, 1.0)
    """
    return 1 / (1 - share) if share < 1 else None


def bounds(rows: Sequence[Row], ceilings: Plain) -> list[dict[str, Any]]:
    """What each family could gain at most in a forward pass, as far as the profile bounds it.

    Args:
        rows: of one batch size.
        ceilings: of the machine that they were timed on.

    Returns:
        {"family", "if", "seconds", "gain"}: the pass would take so many seconds and be so many times faster if that were
        so; both None where nothing bounds it, and "if" says why.
    """
    total = sum(row["seconds"] for row in rows)
    if not total > 0 or not ceilings.get("flops") or not ceilings.get("bytes"):
        return []
    named = [row for row in rows if row["layer"] != REST]
    found = []
    if slowest := max(named, key=lambda row: row["seconds"], default=None):
        found.append(
            _bound("structure", f"its slowest layer, {slowest['layer']}, were gone", total - slowest["seconds"], total)
        )
    found.append(_bound("hardware", "nothing were between the layers", total - overhead_seconds(rows, ceilings), total))
    for kind in WIDTHS:
        found.append(_in_type(kind, rows, ceilings, total))
    return [*found, *({"family": f, "if": UNBOUNDED, "seconds": None, "gain": None} for f in ("training", "optimizer"))]


def _in_type(kind: str, rows: Sequence[Row], ceilings: Plain, total: float) -> dict[str, Any]:
    if not product_rate(ceilings, kind):
        why = (ceilings.get("missing") or {}).get(kind) or "not measured"
        return {"family": "hardware", "if": f"{kind}: {why}", "seconds": None, "gain": None}
    said = f"also every layer were at its roofline in {kind}"
    return _bound("hardware", said, least_seconds(rows, ceilings, kind), total)


def _bound(family: str, said: str, seconds: float, total: float) -> dict[str, Any]:
    return {"family": family, "if": said, "seconds": seconds, "gain": total / seconds if seconds > 0 else None}
