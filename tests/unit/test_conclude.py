"""The verdict: what was not measured well enough is no result, and what was written has to hold before it is announced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quadriga.core.recipe import Recipe
from quadriga.core.trial import Trial
from quadriga.measure.machine import Busy
from quadriga.measure.timings import Timings
from quadriga.stages import conclude, timing
from quadriga.stages.conclude import Conclusion, Finalist, Judge
from quadriga.stages.ratios import opponents_ratios

BATCHES = (1, 64)


def timed(spread: float, others: float = 0.0, seconds: float = 2.0) -> Timings:
    """Eager PyTorch at `seconds` a call and a finalist at 1, over eight restarts that differ by a factor `spread`."""
    found = Timings.empty(list(BATCHES), ["eager", "final-0"], 8)
    for number in range(8):
        noise = spread if number % 2 else 1.0
        for arm, value in (("eager", seconds * noise), ("final-0", 1.0)):
            found.add(arm, {b: [(value, value)] * 4 for b in BATCHES}, {})
        found.restarts += 1
        found.others.append(others)
    return found


def judge(sessions: list[Timings], left: float = 1000.0, monkeypatch=None, profile=None):
    """A judge whose timings are made up, and how often it timed."""
    said, asked = [], []
    budget = SimpleNamespace(left=left)

    def time_arms(study, arms, enough, **how):
        budget.left -= 80.0
        asked.append(arms)
        return sessions[len(asked) - 1]

    study = SimpleNamespace(
        options=SimpleNamespace(minimize="latency"),
        baseline=Trial(0, "baseline", Recipe(), values={}),
        budget=budget,
        startup=2.0,
        short=False,
        batches=BATCHES,
        notes=said,
        say=lambda *a, **k: None,
        stage=lambda name: [Trial(1, "profile", Recipe(), values=profile)] if name == "profile" and profile else [],
        engine=SimpleNamespace(resources=lambda: SimpleNamespace(here=True), stop=lambda: None),
    )
    monkeypatch.setattr(conclude, "timed", time_arms)
    monkeypatch.setattr(conclude, "wait_for_calm", lambda study, seconds: 0.0)
    return Judge(study), asked


def finalist() -> Finalist:
    return Finalist(Recipe(), None, "work/built/final", trial=Trial(2, "final", Recipe(), values={"bytes": 1.0}))


ARMS = {"eager": {}, "final-0": {}}


def test_a_quiet_machine_is_timed_once(monkeypatch):
    one, asked = judge([timed(1.02)], monkeypatch=monkeypatch)
    mine = finalist()
    one._judge_cost(mine, "final-0", one._timed([mine], ARMS, {}))
    assert len(asked) == 1
    assert mine.why_not == ""
    assert {r["verdict"] for r in mine.ratios["eager"].values()} == {"faster"}


def test_what_was_not_measured_well_enough_is_timed_again_and_the_quieter_session_counts(monkeypatch):
    one, asked = judge([timed(9.0, 0.6), timed(1.02)], monkeypatch=monkeypatch)
    mine = finalist()
    timings = one._timed([mine], ARMS, {})
    one._judge_cost(mine, "final-0", timings)
    assert len(asked) == 2
    assert timings.disturbed == 0.0
    assert mine.ratios["eager"]["1"]["value"] == pytest.approx(2.0, rel=0.02)


def test_a_session_in_which_the_finalist_failed_is_no_better(monkeypatch):
    """A session without a single ratio has no wide interval either, and once counted as the quieter one."""
    broken = Timings.empty(list(BATCHES), ["eager", "final-0"], 8)
    broken.errors["final-0"] = "it ended"
    first = timed(9.0, 0.6)
    one, _ = judge([first, broken], monkeypatch=monkeypatch)
    assert one._timed([finalist()], ARMS, {}) is first


def test_a_machine_that_stays_busy_gives_no_winner_and_says_why(monkeypatch):
    one, asked = judge([timed(9.0, 0.63), timed(12.0, 0.7)], monkeypatch=monkeypatch)
    mine = finalist()
    timings = one._timed([mine], ARMS, {})
    one._judge_cost(mine, "final-0", timings)
    assert len(asked) == 2
    assert timings.others[0] == 0.63, "the session with the narrower intervals"
    assert mine.unmeasured
    assert "other processes took 63% of its cores" in mine.why_not
    assert Conclusion([mine], None, timings, {}).status == "unmeasured"


def test_nothing_is_timed_again_that_the_budget_does_not_allow(monkeypatch):
    one, asked = judge([timed(9.0)], left=120.0, monkeypatch=monkeypatch)
    one._timed([finalist()], ARMS, {})
    assert len(asked) == 1


def test_eager_that_is_far_from_its_profile_is_told_of(monkeypatch):
    one, _ = judge([], monkeypatch=monkeypatch, profile={"latency/1": 0.5, "latency/64": 1.9})
    one._note_eager(timed(1.0))
    assert len(one.study.notes) == 1
    assert "at batch 1 in the verification and 0.5 s in the profile" in one.study.notes[0]


def test_the_load_while_timing_is_told_of_where_it_is_worth_it(monkeypatch):
    one, _ = judge([], monkeypatch=monkeypatch)
    one._note_load(timed(1.0, others=0.02))
    assert one.study.notes == []
    one._note_load(timed(1.0, others=0.4))
    assert "took 40% of the machine's cores" in one.study.notes[0]


def test_calm_is_waited_for_no_longer_than_is_allowed():
    """Cores that are all taken by others: every second is waited for; with calm cores the first look is enough."""
    now, slept = [0.0], []
    study = SimpleNamespace(engine=SimpleNamespace(resources=lambda: SimpleNamespace(here=True)), say=lambda *a, **k: None)

    def cores(share):
        def look():
            now[0] += 10.0
            return Busy(share * now[0], now[0])

        return look

    assert timing.wait_for_calm(study, 5.0, cores(1.0), slept.append) == pytest.approx(1.0, abs=0.1)
    assert len(slept) == 5
    slept.clear()
    assert timing.wait_for_calm(study, 5.0, cores(0.0), slept.append) == 0.0
    assert len(slept) == 1


def test_ratios_say_how_far_they_can_be_trusted():
    ratios = opponents_ratios(timed(9.0), "final-0")["eager"]
    assert {r["verdict"] for r in ratios.values()} == {"unmeasured"}
