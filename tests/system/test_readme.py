"""Every Python block and every `quadriga` line of the README runs, in order, in one empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|console)\n(.*?)^```$", README, re.S | re.M)


def commands() -> list[tuple[str, list[str]]]:
    """What to run: (a file to write first, or "", and the command)."""
    found = []
    for language, text in BLOCKS:
        if language == "python":
            named = re.match(r"# (\w+\.py)\n", text)
            name = named[1] if named else f"block_{len(found)}.py"
            found.append((f"{name}\n{text}", [sys.executable, name]))
        else:
            lines = [line for line in text.splitlines() if line]
            assert all(line.startswith("quadriga ") for line in lines), "console blocks hold quadriga commands only"
            found += [("", [sys.executable, "-m", *line.split()]) for line in lines]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all blocks, since later ones use what earlier ones made."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize(("file", "command"), commands(), ids=lambda v: "" if isinstance(v, str) else " ".join(v[1:4]))
def test_readme(folder, file, command):
    if file:
        name, _, text = file.partition("\n")
        (folder / name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    verdicts = (0, 1) if "run" in command else (0,)  # on a busy machine nothing may qualify: that is an answer too
    assert done.returncode in verdicts, done.stderr[-4000:]
    for out in folder.glob("out*"):
        status = json.loads((out / "result.json").read_text(encoding="utf-8"))["status"]
        assert status in ("verified", "infeasible", "unmeasured")
        assert (out / "report.html").is_file()


def test_the_main_job_takes_at_most_fifteen_lines():
    lengths = [len([line for line in text.splitlines() if line]) for language, text in BLOCKS if language == "python"]
    assert lengths and max(lengths) <= 15


def test_the_tree_names_every_folder():
    named = set(re.findall(r"^\| `([\w/]+)` \|", README, re.M))
    packages = {f"src/quadriga/{p.name}" for p in (ROOT / "src/quadriga").iterdir() if (p / "__init__.py").is_file()}
    top = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name in ("recipes", "tests", "benchmarks", "docs", "examples")}
    there = packages | {name for name in top if any((ROOT / name).iterdir())}
    assert there <= named, f"not in the README: {there - named}"
    assert {n for n in named if n.startswith("src/")} <= packages, "a folder that is not there"
