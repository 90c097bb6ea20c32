"""Each parser over mutations of what it reads: what it does not take it refuses by its own error, in little memory.

`make fuzz` makes 10,000 mutations for each; QUADRIGA_MUTATIONS sets another number.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import tracemalloc
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quadriga import methods
from quadriga.core.errors import BadInput
from quadriga.core.files import read_json
from quadriga.core.recipe import Recipe, step
from quadriga.core.trial import Trial
from quadriga.engine.store import Store
from quadriga.report import again
from quadriga.report.schema import empty_result
from quadriga.runtime import _pack, standalone
from quadriga.runtime.standalone import Damaged, folder

MUTATIONS = int(os.environ.get("QUADRIGA_MUTATIONS", "100"))
MOST = 200 << 20  # bytes of memory that reading a small file may take
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
WEIRD = [
    None, True, -1, 0, 1e308, -1e-308, 10**30, 10**400, float("nan"), float("inf"), "", "x" * 5000, "\ud800", "../../x", "\0",
    [], {}, [[]], {"a": {}}, [None] * 3, "nan", "1e999", "ünï", [1, "a", None], {"": ""},
]  # fmt: skip
many = settings(
    max_examples=MUTATIONS, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def nested(depth):
    return "[" * depth + "]" * depth


@st.composite
def bytes_like(draw, data):
    """Some of these bytes flipped, removed, repeated, cut off; numbers made huge; brackets made deep."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        kind, at = draw(st.integers(0, 6)), draw(st.integers(0, max(0, len(found) - 1)))
        size = draw(st.integers(0, 40))
        if kind == 0 and found:
            found[at] ^= draw(st.integers(1, 255))
        elif kind == 1:
            del found[at : at + size]
        elif kind == 2:
            found[at:at] = found[at : at + size] * draw(st.integers(1, 4))
        elif kind == 3:
            found = found[:at]
        elif kind == 4:
            found[at:at] = draw(st.binary(max_size=12))
        elif kind == 5 and (hits := list(re.finditer(rb"\d+", bytes(found)))):
            hit = draw(st.sampled_from(hits))
            found[hit.start() : hit.end()] = draw(st.sampled_from([b"-1", b"9" * 20, b"9" * 5000, b"1e999", b"nan", b"0x"]))
        else:
            found[at:at] = nested(draw(st.sampled_from([3, 2000, 200_000]))).encode()
    return bytes(found)


def places(value, path=()):
    """Every place in plain data."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def data_like(draw, value):
    """Plain data with some of its values exchanged or gone."""
    made = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([p for p in places(made) if p] or [("x",)]))
        here = made
        for key in way:
            here = here[key]
        if isinstance(here, dict) and draw(st.booleans()) and draw(st.booleans()):
            here.pop(last, None)
        else:
            here[last] = deepcopy(draw(st.sampled_from(WEIRD)))
    return made


def within_memory(action):
    """Do something that may take so much memory, and be refused by one of our errors; any other error is a finding."""
    tracemalloc.start()
    try:
        return action()
    except (BadInput, Damaged) as error:
        assert 0 < len(str(error)) < 3000, "a message that people can read"
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST, f"{peak >> 20} MiB"


def built(recipe):
    for one in recipe.steps:
        if not one.is_train:
            methods.build(one)
    assert str(recipe) or not recipe.steps
    assert Recipe.from_toml(recipe.to_toml(), recipe.name) == recipe or "nan" in str(recipe)
    return recipe.hash


@many
@given(st.data())
def test_recipe_files(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    file.write_bytes(data.draw(bytes_like(data.draw(st.sampled_from(RECIPES)).read_bytes())))
    within_memory(lambda: built(Recipe.load(file)))


@many
@given(st.data())
def test_recipes_as_json(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    plain = Recipe.load(data.draw(st.sampled_from(RECIPES))).plain()
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(bytes_like(json.dumps(plain).encode())))
    else:
        file.write_text(json.dumps(data.draw(data_like(plain)), ensure_ascii=True))
    within_memory(lambda: built(Recipe.load(file)))


def a_trial():
    return Trial(
        3, "search", Recipe((step("shrink", kernel=3), step("train", epochs=1.5)), "n"), values={"quality": 1.5}
    ).plain()


@many
@given(data_like(a_trial()))
def test_trials(plain):
    within_memory(lambda: Trial.from_plain(plain).plain())


@many
@given(st.data())
def test_stores(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("store")
    with Store(place) as store:
        store.put("floor", "-0.5pt")
        store.add(Trial.from_plain(a_trial()))
    if data.draw(st.booleans()):
        file = place / "study.sqlite"
        file.write_bytes(data.draw(bytes_like(file.read_bytes())))
    else:
        with sqlite3.connect(place / "study.sqlite") as base:
            text = data.draw(bytes_like(json.dumps(a_trial()).encode()))
            base.execute("UPDATE trials SET record = ?", (text.decode(errors="replace"),))
        base.close()

    def read():
        with Store(place) as store:
            return store.trials(), store.get("floor"), store.digest()

    within_memory(read)


def some_records():
    return {
        "version": 1, "result": empty_result("verified", "w"), "workload": {"name": "w", "metric": "accuracy", "unit": "pt"},
        "floor": {"text": "-0.5pt", "margin": 0.5}, "baseline": {"quality": 90.0, "bytes": 100.0, "parameters": 10.0},
        "trials": [a_trial()], "notes": ["a note"], "pareto": [], "budget": {"total": 60.0, "phases": {"search": 3.0}},
        "timing": {"batches": [1], "arms": {}, "others": 0.0},
    }  # fmt: skip


@many
@given(st.data())
def test_records(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("records")
    if data.draw(st.booleans()):
        (place / "records.json").write_bytes(data.draw(bytes_like(json.dumps(some_records()).encode())))
    else:
        (place / "records.json").write_text(json.dumps(data.draw(data_like(some_records()))))
    within_memory(lambda: again(place))


@many
@given(bytes_like(json.dumps({"a": [1, 2.5, "x", None], "b": {"c": True}}).encode()))
def test_json_files(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "x.json"
    file.write_bytes(text)
    within_memory(lambda: read_json(file))


@pytest.fixture(scope="module")
def packed():
    rng = np.random.default_rng(0)
    few = rng.choice([0.0, 0.25, -0.5], 3000, p=[0.8, 0.1, 0.1]).astype(np.float32)
    files = {"a.bin": b"", "b.bin": bytes(range(256)) * 9, "c.bin": few.tobytes() + rng.bytes(300)}
    return _pack.pack(files, {"format": 1, "runtime": "onnxruntime", "files": list(files), "threads": 1})


@many
@given(st.data())
def test_packed_files(tmp_path_factory, packed, data):
    place = tmp_path_factory.mktemp("packed")
    (place / "model.qdz").write_bytes(data.draw(bytes_like(packed)))
    (place / "runtime.json").write_text(json.dumps({"format": 1, "packed": "model.qdz"}))

    def read():
        entry = folder.read_entry(place)
        return folder.unpacked(place, entry)

    within_memory(read)
    folder.tidy()


@pytest.mark.parametrize("way", [b"L", b"Z"])
def test_a_bomb_is_refused_before_memory_is_taken(tmp_path, way):
    """3 MB once took 6.2 GB."""
    import lzma
    import zlib

    from quadriga.runtime.standalone._unpack import FILTERS, MAGIC

    zeros = bytes(1 << 29)
    compressor = zlib.compressobj(9, wbits=-15)
    small = (
        lzma.compress(zeros, lzma.FORMAT_RAW, filters=FILTERS)
        if way == b"L"
        else compressor.compress(zeros) + compressor.flush()
    )
    del zeros
    (tmp_path / "model.qdz").write_bytes(MAGIC + (1 + len(small)).to_bytes(4, "little") + way + small)
    (tmp_path / "runtime.json").write_text(json.dumps({"format": 1, "packed": "model.qdz"}))
    tracemalloc.start()
    with pytest.raises(Damaged, match="would take more than"):
        folder.read_entry(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 << 20


@many
@given(
    bytes_like(
        json.dumps({"format": 1, "runtime": "onnxruntime", "files": ["model.onnx"], "threads": 1, "names": ["x"]}).encode()
    )
)
def test_runtime_entries(tmp_path_factory, text):
    place = tmp_path_factory.getbasetemp() / "entries"
    place.mkdir(exist_ok=True)
    (place / "runtime.json").write_bytes(text)
    within_memory(lambda: standalone.read_entry(place))


@many
@given(st.data())
def test_manifests(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "manifests"
    place.mkdir(exist_ok=True)
    manifest = {"format": 1, "files": {"runtime.json": {"sha256": "0" * 64, "bytes": 10}}}
    text = json.dumps(manifest, indent=1).encode() + b"\n"
    if data.draw(st.booleans()):
        text = json.dumps(data.draw(data_like(manifest)), indent=1, ensure_ascii=True).encode() + b"\n"
    (place / "manifest.json").write_bytes(data.draw(bytes_like(text)) if data.draw(st.booleans()) else text)
    (place / "runtime.json").write_text("{}")
    within_memory(lambda: standalone.check_files(place))
