"""A command ends with a status of ours only where ours was said; and leaves no process and no file of its own behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from quadriga.core.scratch import LOCK, PREFIX, scratch, sweep
from quadriga.core.supervise import VARIABLE, _Heard, _why, wanted

FILE = """
import os, sys, time
from pathlib import Path
import torch
from torch import nn
from quadriga import Workload
ACT = os.environ["ACT"]

def act():
    if ACT == "exit":
        sys.exit(0)
    if ACT == "_exit":
        os._exit(0)
    if ACT == "abort":
        os.abort()
    if ACT == "forks":
        if (child := os.fork()) == 0:
            time.sleep(600)
        Path(os.environ["MARK"]).write_text(str(child))
        os._exit(0)
    if ACT == "waits":
        Path(os.environ["MARK"]).write_text(str(os.getpid()))
        time.sleep(600)

class Odd(nn.Linear):
    def forward(self, x):
        act()
        return super().forward(x)

def workload():
    x, y = torch.randn(64, 4), torch.randint(2, (64,))
    return Workload(model=lambda: Odd(4, 2), train=(x, y), val=(x + 1, y), test=(x + 2, y), batch_size=16)
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(FILE)
    (tmp_path / "tmp").mkdir()
    for name, value in {"MARK": str(tmp_path / "mark"), "TMPDIR": str(tmp_path / "tmp")}.items():
        monkeypatch.setenv(name, value)

    def started(act, *words):
        command = [sys.executable, "-m", "quadriga", "profile", "odd.py", "--json", *words]
        pipe = subprocess.PIPE
        env = {**os.environ, "ACT": act}
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True)

    return started


def ended(pid):
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.1)
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("act", "words"), [("exit", "sys.exit(0)"), ("_exit", "with status 0"), ("abort", "SIGABRT"), ("forks", "with status 0")]
)
def test_user_code_that_ends_the_process_is_no_success(call, act, words, tmp_path):
    with call(act) as process:
        out, said = process.communicate(timeout=200)
    assert process.returncode not in (0, None) and words in said, said[-2000:]
    told = json.loads(out.strip().splitlines()[-1])
    assert told["status"] == "failed" and words in told["error"]["message"]
    assert "looking the workload over" in said or act == "exit"
    if act == "forks":
        assert ended(int((tmp_path / "mark").read_text()))


def test_a_signal_reaches_the_process_and_the_caller_is_told(call, tmp_path):
    with call("waits") as process:
        while not (tmp_path / "mark").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "resume with the same command" in said, said[-2000:]
    assert json.loads(out.strip().splitlines()[-1])["status"] == "interrupted"
    assert not list((tmp_path / "tmp").glob(f"{PREFIX}*")), "temporary files go with the command"


def test_killed_the_next_start_clears_what_it_left(call, tmp_path):
    with call("waits") as process:
        while not (tmp_path / "mark").exists() or not (tmp_path / "mark").read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
        process.communicate(timeout=100)
    assert ended(int((tmp_path / "mark").read_text()))
    (left,) = (tmp_path / "tmp").glob(f"{PREFIX}*")
    assert sweep(tmp_path / "tmp") == 1 and not left.exists()


def test_a_living_command_keeps_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with scratch() as place, scratch() as inner:
        assert place == inner == Path(tempfile.gettempdir()) and place.parent == tmp_path
        assert sweep(tmp_path) == 0 and (place / LOCK).is_file()
    assert not place.exists() and Path(tempfile.gettempdir()) == tmp_path
    stranger = tmp_path / f"{PREFIX}x"
    stranger.mkdir()
    assert sweep(tmp_path) == 0 and stranger.exists(), "without a lock it is not known to be dead"


def test_what_hangs_is_ended_and_named():
    status, problem, remedy = _why(-9, _Heard(doing="looking the workload over", late=True))
    assert status == "failed" and problem.startswith("looking the workload over took longer than 900 s") and remedy
    assert _why(-9, _Heard())[1].startswith("the process was ended by SIGKILL")
    assert _why(-2, _Heard())[0] == "interrupted"


def test_only_what_runs_user_code_is_supervised_and_only_once():
    assert wanted(["run", "w"], {}) and not wanted(["doctor"], {}) and not wanted([], {})
    assert not wanted(["run", "w"], {VARIABLE: "1 2"})
    assert not wanted(["train", "w"], {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
