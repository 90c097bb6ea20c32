"""A planted secret is in none of the ways out: stdout, stderr, JSON, files, the store."""

from __future__ import annotations

import io
import os
import sqlite3
import subprocess
import sys

import pytest

from quadriga.core.files import atomic_write, write_json
from quadriga.core.recipe import Recipe
from quadriga.core.secrets import HIDDEN, Redacting, redacted
from quadriga.core.trial import Status, Trial
from quadriga.engine.store import Store

CANARY, PASSWORD = "canary-0123456789", "hunter22hunter"
FILE = f"""
import os
def workload():
    raise RuntimeError(f"401 from https://me:{PASSWORD}@host/data with {{os.environ['HF_TOKEN']}}")
"""


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://host/a:b@c", "https://host/a:b@c"),
        (
            f"postgres://me:{PASSWORD}@host:5432/db and http://x:y@z",
            f"postgres://me:{HIDDEN}@host:5432/db and http://x:{HIDDEN}@z",
        ),
        ("hf_" + "a" * 30, HIDDEN),
        (f"x{CANARY}y", f"x{HIDDEN}y"),
        ("bert-base-uncased", "bert-base-uncased"),
    ],
)
def test_what_looks_secret_is_hidden(text, left):
    assert redacted(text, {"MY_API_KEY": CANARY, "TOKENIZER_NAME": "bert-base-uncased", "A_SECRET": "short"}) == left


def test_places_of_files_are_no_secrets(tmp_path):
    assert redacted(f"see {tmp_path}", {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path)}) == f"see {tmp_path}"


def test_files_and_the_store_are_written_without(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", CANARY)
    atomic_write(tmp_path / "a.md", f"with {CANARY}")
    write_json(tmp_path / "b.json", {"why": [f"{CANARY} https://me:{PASSWORD}@host"]})
    atomic_write(tmp_path / "c.bin", CANARY.encode())  # bytes are as they are
    with Store(tmp_path / "study") as store:
        store.put("x", {"a": CANARY})
        store.add(Trial(0, "search", Recipe(), 0, Status.FAILED, f"{CANARY}"))
        assert store.get("x") == {"a": HIDDEN} and store.trials()[0].reason == HIDDEN
    rows = sqlite3.connect(tmp_path / "study/study.sqlite").execute("SELECT record FROM trials").fetchall()
    for text in ((tmp_path / "a.md").read_text(), (tmp_path / "b.json").read_text(), str(rows)):
        assert CANARY not in text and PASSWORD not in text and HIDDEN in text
    assert (tmp_path / "c.bin").read_bytes() == CANARY.encode()


def test_a_stream_hides_and_is_the_stream_else():
    plain = io.StringIO()
    stream = Redacting(plain)
    print(f"https://me:{PASSWORD}@host", file=stream)
    stream.writelines(["a\n", f"ftp://u:{PASSWORD}@h"])
    assert plain.getvalue() == f"https://me:{HIDDEN}@host\na\nftp://u:{HIDDEN}@h" and not stream.isatty()


def test_the_command_says_and_prints_none(tmp_path):
    (tmp_path / "w.py").write_text(FILE)
    done = subprocess.run(
        [sys.executable, "-m", "quadriga", "train", f"w.py?url=https://me:{PASSWORD}@host", "--json"],
        cwd=tmp_path, env={**os.environ, "HF_TOKEN": CANARY, "QUADRIGA_DEBUG": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert HIDDEN in done.stderr and HIDDEN in done.stdout
    found = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "w.py"]
    for text in (done.stdout, done.stderr, *(p.read_text(errors="replace") for p in found)):
        assert CANARY not in text and PASSWORD not in text
