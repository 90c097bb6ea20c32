"""What a later session takes up: facts, not mishaps; a broken-off end with its time; folders that are ours; sealed results."""

from __future__ import annotations

import errno
import json
import sqlite3

import numpy as np
import pytest
from made_up import Engine

from quadriga.core import files, folders
from quadriga.core.errors import BadInput, Mishap
from quadriga.core.folders import MARK, claim, claimed
from quadriga.core.recipe import Recipe, step
from quadriga.core.trial import Status, Trial
from quadriga.engine.store import Store
from quadriga.measure.quality import Scores
from quadriga.search.space import Space
from quadriga.stages import seal
from quadriga.stages.again import code_key
from quadriga.stages.conclude import Finalist, Judge
from quadriga.stages.opening import _same_study
from quadriga.stages.state import Budget, Options, Study
from quadriga.testing import tiny_mlp

ONE = Recipe((step("threads", count=1),))


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.0)


def opened(folder, store):
    space = Space({}, frozenset(), Recipe(), frozenset())
    return Study(tiny_mlp(), Options("-1pt"), folder, store, Engine(1), space, lambda event: None)


def test_mishaps_are_tried_again_and_facts_are_not(tmp_path):
    code = code_key(None)
    ends = {
        "search": [Status.LOST, Status.OUT_OF_MEMORY, Status.REFUSED, Status.DIVERGED, Status.TIMED_OUT, Status.COMPLETE],
        "baseline": [Status.FAILED, Status.TIMED_OUT],
        "final": [Status.TIMED_OUT],
    }
    with Store(tmp_path) as store:
        number = 0
        for stage, row in ends.items():
            for status in row:
                store.add(Trial(number, stage, ONE, status=status))
                number += 1
        store.add(Trial(number, "cost", ONE, status=Status.FAILED, info={"code": code}))
        store.add(Trial(number + 1, "cost", ONE, status=Status.FAILED, info={"code": "of another file"}))
        study = opened(tmp_path, store)
        kept = [(t.stage, t.status) for t in study.trials]
        assert kept == [("search", s) for s in ends["search"][2:]] + [("cost", Status.FAILED)]
        assert study.number == number + 2, "numbers of those that are tried again are not given twice"
        told = next(n for n in study.notes if n.startswith("tried again"))
        assert "1 lost" in told and "1 out of memory" in told and "2 failed" in told and "2 timed out" in told
        study.add(Trial(study.number, "search", ONE))
        assert len(store.trials()) == number + 3


def test_the_key_of_the_code_goes_by_the_file_and_what_it_imports(tmp_path):
    main, beside, other = tmp_path / "mine.py", tmp_path / "parts.py", tmp_path / "other.py"
    main.write_text("import parts\ndef workload(): ...\n")
    beside.write_text("A = 1\n")
    other.write_text("B = 1\n")
    keys = [code_key(f"{main}:workload")]
    for file, text in ((other, "B = 2\n"), (beside, "A = 2\n"), (main, "import parts\ndef workload(): pass\n")):
        file.write_text(text)
        keys.append(code_key(f"{main}:workload"))
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_broken_off_end_has_its_time_again(tmp_path):
    """Killed in its verification, a study once had none left for it and gave the baseline out as its result."""
    now = [0.0]
    with Store(tmp_path) as store:
        budget = Budget(100.0, store, lambda: now[0])
        now[0] = 60.0
        budget.whole()
        now[0] = 95.0
        budget.keep()
    with Store(tmp_path) as store:
        again = Budget(100.0, store, lambda: now[0])
        assert again.left == 40.0
        now[0] += 30.0
        again.whole()
        again.keep()
    with Store(tmp_path) as store:
        assert Budget(100.0, store, lambda: now[0]).left == 40.0, "from where it began at first"


def test_what_was_scored_on_test_is_not_scored_again(tmp_path, monkeypatch):
    mine = Recipe((step("onnxruntime"),))
    with Store(tmp_path) as store:
        study = opened(tmp_path, store)
        study.engine.renew = lambda: None
        scores = Scores(np.zeros(4), np.ones(4), None, 0.5)
        for number, (name, recipe) in enumerate({"baseline": study.workload.baseline, "final-0": mine}.items()):
            scores.save(tmp_path / f"scores/test-{name}.npz")
            study.add(Trial(number, "test", recipe, info={"scores": f"scores/test-{name}.npz"}))
        judge = Judge(study)
        monkeypatch.setattr(judge, "_control_recipes", lambda recipe: {})
        found = judge._open_test([Finalist(mine, None, "work/built/final")])
        assert set(found) == {"baseline", "final-0"} and not study.engine.queue and store.get("opened") is None
        (tmp_path / "scores/test-final-0.npz").unlink()
        monkeypatch.setattr(study, "collect_all", lambda until: [])
        assert set(judge._open_test([Finalist(mine, None, "work/built/final")])) == {"baseline"}
        assert len(store.get("opened")) == 1


def test_a_folder_is_ours_or_it_is_left_alone(tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "built").mkdir(parents=True)
    (theirs / "built/thesis.txt").write_text("years")
    with pytest.raises(BadInput, match=r"is not empty, and is not ours: it holds built"):
        claim(theirs, "study")
    assert [p.name for p in theirs.rglob("*")] == ["built", "thesis.txt"]
    ours = tmp_path / "ours"
    with claimed(ours, "study") as folder:
        assert json.loads((folder / MARK).read_text())["kind"] == "study"
        with pytest.raises(BadInput, match="another run has"):
            claim(ours, "study")
    with pytest.raises(
        BadInput, match=r"holds a study, written by quadriga run; choose another --out folder for quadriga train"
    ):
        claim(ours, "training")
    (ours / "mine.txt").write_text("put there later")
    claim(ours, "study").close()
    (ours / MARK).write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        claim(ours, "study")


def test_folders_of_older_versions_are_known(tmp_path):
    (tmp_path / "study.sqlite").touch()
    claim(tmp_path, "study").close()
    assert (tmp_path / "study.sqlite").exists()


@pytest.mark.parametrize("kind", ["folder", "link", "page", "letter", "json"])
def test_a_store_that_is_none_is_named(tmp_path, kind):
    with Store(tmp_path) as store:
        store.add(Trial(0, "search", ONE))
        store.put("floor", 1)
    file = tmp_path / "study.sqlite"
    if kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "link":
        file.unlink()
        file.symlink_to(tmp_path / "nowhere")
    elif kind == "page":
        data = bytearray(file.read_bytes())
        data[4096:8192] = bytes(4096)
        file.write_bytes(data)
    else:
        with sqlite3.connect(file) as base:
            old, new = ('"complete"', '"complate"') if kind == "letter" else ('"stage"', '"stage')
            base.execute("UPDATE trials SET record = replace(record, ?, ?)", (old, new))
        base.close()
    with pytest.raises(BadInput) as found, Store(tmp_path) as store:
        store.trials()
        store.get("floor")
    assert str(found.value) and found.value.remedy


def test_a_study_without_a_trained_baseline_begins_anew_when_the_workload_was_mended(tmp_path):
    with Store(tmp_path) as store:
        assert _same_study(store, {"workload": "a", "seed": 0}, tmp_path) == []
        store.add(Trial(0, "baseline", Recipe(), status=Status.FAILED))
        assert "begun anew, with another workload" in _same_study(store, {"workload": "b", "seed": 0}, tmp_path)[0]
        assert store.trials() == []
        store.add(Trial(0, "baseline", Recipe()))
        with pytest.raises(BadInput, match="holds a study with another workload"):
            _same_study(store, {"workload": "c", "seed": 0}, tmp_path)


def test_a_finished_study_is_looked_at_before_it_is_shown(tmp_path):
    with Store(tmp_path) as store:
        store.add(Trial(0, "baseline", Recipe(), values={"quality": 90.0}))
        store.put("result", {"status": "verified"})
        files.write_json(tmp_path / "records.json", {"a": 1})
        seal.seal(store, tmp_path)
        seal.check(store, tmp_path)
        store.put("spent", 3.0)
        seal.check(store, tmp_path)
        files.write_json(tmp_path / "records.json", {"a": 2})
        with pytest.raises(BadInput, match=r"records\.json was changed since this study was finished"):
            seal.check(store, tmp_path)
        files.write_json(tmp_path / "records.json", {"a": 1})
        store.put("result", {"status": "infeasible"})
        with pytest.raises(BadInput, match=r"study\.sqlite was changed"):
            seal.check(store, tmp_path)


def test_a_full_disk_is_a_mishap(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(Mishap, match="No space left"):
        files.atomic_write(tmp_path / "x.json", "{}")
    assert not list(tmp_path.iterdir())
    wrapped = RuntimeError("it could not be saved")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    assert files.disk_is_full(wrapped) and not files.disk_is_full(ValueError("x"))
    assert files.disk_is_full(RuntimeError("SafetensorError: Error while serializing: I/O error: No space left on device"))


def test_a_worker_says_that_the_disk_was_full(tmp_path, monkeypatch):
    from quadriga.engine.tasks import Desk

    desk = Desk(tiny_mlp(), tmp_path, 0)
    for error, status in ((Mishap("x could not be written", "free space"), Status.LOST), (SystemExit(0), Status.FAILED)):
        monkeypatch.setattr(Desk, "_hello", lambda self, recipe, args, error=error: (_ for _ in ()).throw(error))
        assert desk.do("hello", {"recipe": []})["status"] == status
