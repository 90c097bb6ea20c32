"""Bad input, as people make it: each case ends with status 2 and a message that says what to do, before the search begins."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import textwrap

import pytest
import torch

torch.set_num_threads(1)

GOOD = """
import torch
from torch import nn
from quadriga import Workload
G = torch.Generator().manual_seed(0)
X = torch.randn(900, 4, generator=G)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
def workload():
    return Workload({arguments})
"""
ARGUMENTS = {
    "model": "lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))",
    "train": "(X[:300], Y[:300])",
    "val": "(X[300:600], Y[300:600])",
    "test": "(X[600:], Y[600:])",
}
RECIPES = {
    "method.toml": '[[step]]\nmethod = "shrnk"\n',
    "field.toml": '[[step]]\nmethod = "label_smoothing"\namont = 0.1\n',
    "value.toml": '[[step]]\nmethod = "label_smoothing"\namount = "much"\n',
    "syntax.toml": "[[step\n",
    "epochs.toml": '[[step]]\nmethod = "train"\nepochs = -1\n',
}
WORKLOADS = {  # what is changed, and words that the message has to hold
    "empty split": ({"val": "(X[:0], Y[:0])"}, ["val", "0 examples"]),
    "no test data": ({"test": "None"}, ["test"]),
    "labels int32": ({"train": "(X[:300], Y[:300].int())"}, ["int64"]),
    "labels as floats": ({"train": "(X[:300], Y[:300].float())"}, ["float"]),
    "label out of range": ({"val": "(X[300:600], Y[300:600] + 3)"}, ["3"]),
    "NaN in the data": ({"train": "(X[:300].where(X[:300] < 1, float('nan')), Y[:300])"}, ["NaN"]),
    "metric returns NaN": ({"metric": "lambda output, target: float('nan')"}, ["metric", "nan"]),
    "metric returns a string": ({"metric": "lambda output, target: 'good'"}, ["metric", "good"]),
    "model needs other shapes": ({"model": "lambda: nn.Linear(5, 3)"}, ["shape"]),
    "model is no module": ({"model": "lambda: 3"}, ["nn.Module"]),
    "one data set as two splits": ({"test": "(X[300:600], Y[300:600])"}, ["val", "test"]),
    "lengths differ": ({"train": "(X[:300], Y[:299])"}, ["299", "300"]),
    "unknown metric": ({"metric": "'acuracy'"}, ["accuracy"]),
    "loss returns NaN": ({"loss": "lambda output, target: output.sum() * float('nan')"}, ["loss", "nan"]),
    "no training data, not trained": ({"train": "None"}, ["trained"]),
    "batch size": ({"batch_size": "0"}, ["batch_size", "0"]),
}
OPTIONS = {
    "floor without a unit": (["--floor", "-0.5"], ["-0.5", "pt"]),
    "floor that cannot be proved": (["--floor", "-0.5pt"], ["cannot be proved", "300 test examples"]),
    "unknown objective": (["--minimize", "energy"], ["energy"]),
    "unknown family": (["--floor", "-9pt", "--only", "structur"], ["structure"]),
    "budget": (["--floor", "-9pt", "--budget", "soon"], ["soon", "90s"]),
    "limit": (["--floor", "-9pt", "--limit", "bytes"], ["bytes"]),
    "unknown limit": (["--floor", "-9pt", "--limit", "byte=0.2"], ["bytes"]),
    "budget below the baseline's time": (["--floor", "-9pt", "--budget", "1s"], ["budget"]),
}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the command line in this process; returns status, message and the JSON object."""
    from quadriga.cli import app
    from quadriga.exits import guarded

    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = guarded(app, [*words, "--json"])
        captured = capsys.readouterr()
        return status, captured.err, json.loads(captured.out.strip().splitlines()[-1])

    return run


def write(folder, **changes):
    arguments = ", ".join(f"{k}={v}" for k, v in {**ARGUMENTS, **changes}.items())
    (folder / "mine.py").write_text(GOOD.format(arguments=arguments))


def refused(outcome, words):
    status, message, data = outcome
    assert status == 2, message
    assert data["status"] == "failed" and data["winner"] is None
    for word in words:
        assert word.lower() in message.lower(), message
    assert "Traceback" not in message and data["error"]["message"]


@pytest.mark.parametrize("case", WORKLOADS)
def test_a_bad_workload_is_refused(call, tmp_path, case):
    changes, words = WORKLOADS[case]
    write(tmp_path, **changes)
    refused(call("run", "mine.py", "--floor", "-9pt", "--budget", "60s"), words)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_refused(call, tmp_path, case):
    options, words = OPTIONS[case]
    slow = {"baseline": "__import__('quadriga').Recipe((__import__('quadriga').step('train', epochs=99999),))"}
    write(tmp_path, **(slow if "baseline" in case else {}))
    refused(call("run", "mine.py", *options), words)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("method.toml", ["shrnk", "shrink"]),
        ("field.toml", ["amont", "amount"]),
        ("value.toml", ["much", "float"]),
        ("syntax.toml", ["TOML"]),
        ("epochs.toml", ["-1", "positive"]),
        ("missing.toml", ["missing.toml"]),
    ],
)
def test_a_bad_recipe_is_refused(call, tmp_path, recipe, words):
    write(tmp_path)
    if recipe in RECIPES:
        (tmp_path / recipe).write_text(RECIPES[recipe])
    refused(call("train", "mine.py", "--recipe", recipe), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def workload(:", ["mine.py", "syntax"]),
        ("def workload():\n    raise OSError('the disk is gone')", ["the disk is gone"]),
        ("def workload():\n    return 3", ["Workload"]),
        ("x = 1", ["mine.py"]),
    ],
)
def test_a_bad_file_is_refused(call, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    refused(call("run", "mine.py"), words)


def test_points_of_a_metric_that_has_none(call, tmp_path):
    write(tmp_path, metric="lambda output, target: (output.argmax(1) == target).double().mean()")
    refused(call("run", "mine.py", "--floor", "-0.5pt"), ["points", "-0.5%rel"])


def test_an_out_folder_that_is_a_file(call, tmp_path):
    write(tmp_path)
    (tmp_path / "file").write_text("mine")
    for verb in (["run", "mine.py", "--floor", "-9pt"], ["train", "mine.py"], ["compare", "mine.py", "mine.py"]):
        refused(call(*verb, "--out", "file"), ["file", "--out"])
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_name_gets_the_nearest_one(call):
    refused(call("run", "lenet_fashon"), ["lenet_fashion"])


def test_another_study_in_the_folder_is_not_overwritten(call, tmp_path):
    from quadriga.engine.store import Store

    write(tmp_path)
    with Store(tmp_path / "out") as store:
        store.put("identity", {"workload": "another", "seed": 0})
    refused(call("run", "mine.py", "--floor", "-9pt", "--budget", "60s"), ["another", "--out"])
    with Store(tmp_path / "out") as store:
        assert store.get("identity")["workload"] == "another"


@pytest.mark.parametrize("room", [2000, 40_000])
def test_no_space_left_is_said_and_resumable(tmp_path, room):
    """File sizes are limited as a full disk would: the store cannot be written, or not its second page."""
    write(tmp_path)
    code = textwrap.dedent("""
        import signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from quadriga.cli import main
        main(["run", "mine.py", "--floor", "-9pt", "--budget", "60s"])
    """)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and ("free space" in done.stderr or "space" in done.stderr), done.stderr
