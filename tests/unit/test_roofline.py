"""The roofline: what the ceilings are, and that the bounds bound."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn

from quadriga.core import products
from quadriga.core.roofline import REST, WIDTHS, bandwidth, bounds, gain_if_free, least_seconds, overhead_seconds, waits
from quadriga.measure import ceilings as measured
from quadriga.measure.ceilings import COPIES, Ceilings, ceilings
from quadriga.measure.roofline import profile

rates = some.floats(1e6, 1e15)
layers = some.fixed_dictionaries(
    {
        "layer": some.sampled_from(["a", "b", "c"]),
        "seconds": some.floats(1e-6, 1.0),
        "flops": some.integers(0, 10**12),
        "bytes": some.integers(0, 10**10),
    }
)
rows_of = some.lists(layers, min_size=1, max_size=6)
limits_of = some.builds(
    lambda fp32, bf16, int8, memory, faster: {
        "flops": fp32,
        "bytes": memory,
        "products": {"default": fp32, "fp32": fp32, "bf16": bf16, "int8": int8},
        "copies": [[10**6, memory * faster], [10**9, memory]],
    },
    rates,
    rates,
    rates,
    rates,
    some.floats(1, 20),
)


def ticking(step: float):
    """A clock that goes on by `step` seconds whenever it is read."""
    now = [0.0]

    def read() -> float:
        now[0] += step
        return now[0]

    return read


def test_a_ceiling_is_operations_or_bytes_over_the_clocks_seconds():
    """If any call takes 8 ms by the clock, the largest product and the largest copy set the figures."""
    found = ceilings(1, 0.01, ticking(0.008))
    assert found.products["default"] == pytest.approx(2 * 256**3 / 0.008)  # a larger one would overrun the 10 ms
    assert found.bytes == pytest.approx(COPIES[-1] / 0.008)
    assert [rate / size for size, rate in found.copies] == pytest.approx([1 / 0.008] * len(COPIES))
    fast = ceilings(1, 100.0, ticking(1.0))
    assert fast.products["default"] == pytest.approx(2 * 1024**3) and fast.flops == fast.products["fp32"]


def test_ceilings_are_measured_once_for_the_same_settings():
    clock = ticking(0.01)
    assert ceilings(1, 0.01, clock) is ceilings(1, 0.01, clock)


def test_a_product_that_rounds_is_not_a_float32_ceiling(monkeypatch):
    """Where "medium" is bfloat16 in disguise the default is the best; where it is float32 the faster of the two is."""
    rates = {"highest": 100.0, "medium": 250.0}
    monkeypatch.setattr(measured, "_product", lambda *given: rates[torch.get_float32_matmul_precision()])
    before = torch.get_float32_matmul_precision()
    for error, best in ((4e-3, 100.0), (4e-7, 250.0)):
        monkeypatch.setattr(measured, "medium_error", lambda error=error: error)
        missing: dict[str, str] = {}
        assert measured._float32(0.01, ticking(1.0), missing) == (100.0, best)
        assert ("fp32" in missing) == (best == 100.0)
    assert torch.get_float32_matmul_precision() == before


def test_a_type_without_a_product_says_why(monkeypatch):
    monkeypatch.delattr(torch, "_int_mm")
    found = ceilings(1, 0.01, ticking(0.008))
    assert found.products["int8"] is None and "_int_mm" in found.missing["int8"]
    row = next(b for b in bounds([{"layer": "a", "seconds": 1.0, "flops": 1, "bytes": 1}], found.plain()) if "int8" in b["if"])
    assert row["gain"] is None and "_int_mm" in row["if"]


def test_the_products_that_are_timed_are_right():
    """Every type multiplies the same small integers, whose products float32 and int32 hold exactly."""
    for dtype, multiply in ((torch.float32, torch.mm), (torch.int8, torch._int_mm)):
        a, b = measured._pair(64, dtype)
        exact = measured._pair(64, torch.float64)
        assert torch.equal(multiply(a, b).double(), exact[0] @ exact[1])


def test_the_precision_is_put_back_after_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), products.matmul_precision("medium"):
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == before


@given(
    rows_of,
    limits_of,
    some.sampled_from(sorted(WIDTHS)),
    some.sampled_from(["fp32", "bf16", "int8", "bytes"]),
    some.floats(1, 9),
)
def test_a_faster_machine_is_never_slower(rows, limits, kind, which, factor):
    """Monotone: raise one ceiling, and the least time of a pass falls or stays."""
    better = {**limits, "products": dict(limits["products"])}
    if which == "bytes":
        better |= {"bytes": limits["bytes"] * factor, "copies": [[s, r * factor] for s, r in limits["copies"]]}
    elif which == "fp32":
        better["flops"] = limits["flops"] * factor
    else:
        better["products"][which] *= factor
    assert least_seconds(rows, better, kind) <= least_seconds(rows, limits, kind) * (1 + 1e-9)


@given(rows_of, limits_of)
def test_no_bound_is_below_one_and_a_machine_at_its_roofline_has_nothing_to_gain(rows, limits):
    for bound in bounds(rows, limits):
        assert bound["gain"] is None or bound["gain"] >= 1 - 1e-9
    ideal = [{**row, "seconds": max(waits(row, limits))} for row in rows]
    total = sum(row["seconds"] for row in ideal)
    if total > 0:
        assert least_seconds(ideal, limits) == pytest.approx(total)


@given(rows_of, limits_of, some.sampled_from(["bf16", "int8"]))
def test_a_type_gains_no_more_than_its_arithmetic_or_its_width(rows, limits, kind):
    """From a float32 machine at its roofline, with one bandwidth: the larger of ceiling over ceiling and 4 / width."""
    limits = {**limits, "copies": []}
    ideal = [{**row, "seconds": max(waits(row, limits))} for row in rows]
    most = max(limits["products"][kind] / limits["flops"], WIDTHS["fp32"] / WIDTHS[kind])
    assert least_seconds(ideal, limits, kind) * most >= sum(row["seconds"] for row in ideal) * (1 - 1e-9)


@given(some.floats(1e-6, 1.0), some.floats(1e-6, 1.0), limits_of)
def test_without_its_slowest_layer_is_amdahls_law(slow, other, limits):
    rows = [
        {"layer": "only", "seconds": slow, "flops": 5, "bytes": 5},
        {"layer": REST, "seconds": other, "flops": 0, "bytes": 0},
    ]
    found = {b["if"]: b["gain"] for b in bounds(rows, limits)}
    assert found["its slowest layer, only, were gone"] == pytest.approx(gain_if_free(slow / (slow + other)))
    assert found["nothing were between the layers"] == pytest.approx(gain_if_free(other / (slow + other)))


@given(some.floats(1e3, 1e12), limits_of)
def test_less_data_are_never_copied_more_slowly(moved, limits):
    assert bandwidth(limits, moved / 2) >= bandwidth(limits, moved) >= limits["bytes"]


def test_a_narrow_type_moves_fewer_bytes():
    limits = {"flops": 1.0, "bytes": 2.0, "products": {"bf16": 4.0, "int8": 8.0}}
    row = {"flops": 16, "bytes": 80}
    assert [waits(row, limits, kind) for kind in WIDTHS] == [(16.0, 40.0), (4.0, 20.0), (2.0, 10.0)]
    with pytest.raises(ValueError, match="bf16"):
        waits(row, {"flops": 1.0, "bytes": 2.0}, "bf16")


def test_what_is_computed_between_the_layers_is_no_overhead():
    row = {"layer": REST, "seconds": 3.0, "flops": 20, "bytes": 0}
    assert overhead_seconds([row], {"flops": 10.0, "bytes": 1.0}) == pytest.approx(1.0)
    assert overhead_seconds([{**row, "flops": 90}], {"flops": 10.0, "bytes": 1.0}) == 0


def test_an_embedding_moves_the_rows_that_are_looked_up():
    table = nn.Embedding(1000, 8)
    (row,) = (r for r in profile(table, torch.arange(3), repeats=2, ceiling=Ceilings(1.0, 1.0)) if r["layer"] != REST)
    assert row["bytes"] == 3 * 8 + 2 * 3 * 8 * 4  # int64 places; each row read and written
    bag = nn.EmbeddingBag(1000, 8)
    (row,) = (r for r in profile(bag, torch.arange(6).view(2, 3), repeats=2, ceiling=Ceilings(1.0, 1.0)) if r["layer"] != REST)
    assert row["bytes"] == 6 * 8 + 6 * 8 * 4 + 2 * 8 * 4


def test_views_move_nothing_and_work_in_place_moves_what_it_changes():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Identity(), nn.ReLU(inplace=True), nn.ReLU())
    rows = {r["layer"]: r for r in profile(model, torch.randn(2, 3, 4), repeats=2, ceiling=Ceilings(1.0, 1.0))}
    assert [rows[str(i)]["bytes"] for i in range(5)] == [0, 0, 0, 2 * 24 * 4, 2 * 24 * 4]
    assert rows["0"]["fraction"] is None and math.isfinite(rows["4"]["fraction"])
