"""Workloads from a user's file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quadriga.core.batch import call
from quadriga.core.errors import BadInput
from quadriga.workloads import check, load

torch.set_num_threads(1)
EXAMPLES = Path(__file__).parents[2] / "examples"
BODY = """
import torch
from torch import nn
from quadriga import Workload

def make(n=40):
    x, y = torch.arange(3.0 * n).view(n, 3), torch.arange(n) % 2
    return Workload(model=lambda: nn.Linear(3, 2), train=(x, y), val=(x + 500, y), test=(x + 900, y))
"""


@pytest.fixture
def write(tmp_path):
    def one(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return one


@pytest.mark.parametrize("end", ["", ":make"])
def test_the_function_is_found(write, end):
    path = write(BODY)
    made = load(path + end)
    assert made.reference == f"{path}:make"
    assert len(load(made.reference).val) == 40


def test_options_reach_the_function_and_the_reference(write):
    made = load(write(BODY), n=60)
    assert len(made.train) == len(load(made.reference).train) == 60


def test_workload_is_the_default_and_an_annotation_decides(write):
    both = BODY + "\ndef workload():\n    return make(50)\n\ndef other():\n    return 3\n"
    assert len(load(write(both)).train) == 50
    annotated = BODY.replace("def make(n=40):", "def make(n=40) -> Workload:") + "\ndef helper():\n    return 3\n"
    assert load(write(annotated)).reference.endswith(":make")


def test_a_relative_path_becomes_absolute(write, monkeypatch):
    path = write(BODY)
    monkeypatch.chdir(Path(path).parent)
    assert load("mine.py").reference == f"{path}:make"


def test_names_do_not_clash_and_neighbours_can_be_imported(write):
    """Files called as installed modules are, and a module beside the file."""
    write("WIDTH = 40\n", "beside_me.py")
    path = write(BODY.replace("import torch\n", "import torch\nfrom beside_me import WIDTH\n", 1), "json.py")
    assert load(path).reference == f"{path}:make"
    import json

    assert hasattr(json, "dumps")
    assert not any(name in ("mine", "json_") for name in sys.modules)


def test_an_edited_file_is_read_anew(write, monkeypatch):
    """Also where size and time of the file are those it had, as after an edit within the same second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write(BODY)
    was = os.stat(path)
    assert len(load(path).train) == 40
    path = write(BODY.replace("n=40", "n=44"))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert len(load(path).train) == 44


@pytest.mark.parametrize(
    ("text", "end", "message"),
    [
        ("x = (\n", "", "mine.py:1: syntax error: '(' was never closed"),
        ("import torch\n1 / 0\n", "", "mine.py:2: ZeroDivisionError"),
        ("import no_such_package\n", "", "mine.py:1: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", "", "mine.py:2: SystemExit"),
        ("x = 1\n", "", "write a function workload()"),
        (BODY, ":mak", 'no function "mak"; did you mean "make"'),
        (BODY + "\ndef two():\n    return 2\n", "", "2 that could make one: make, two"),
        ("def workload():\n    return 3\n", "", "workload() of mine.py returned int"),
        ("def workload():\n    raise KeyError('key')\n", "", "mine.py:2: KeyError: 'key'"),
        ("def workload(size):\n    return size\n", "", 'needs a value for "size"'),
        (BODY, "?m=3", 'no option "m"'),
        (BODY.replace("val=(x + 500, y)", "val=(x[:0], y[:0])"), "", "mine.py:8: val has 0 examples"),
        (BODY.replace("val=(x + 500, y)", "val=(x, y[:9])"), "", "inputs and targets have different lengths [9, 40]"),
    ],
)
def test_bad_files(write, text, end, message):
    with pytest.raises(BadInput) as caught:
        load(write(text) + end)
    assert message in str(caught.value)


def test_a_missing_file_and_its_nearest_name(write, tmp_path):
    write(BODY, "lenet.py")
    with pytest.raises(BadInput, match=r'there is no file .*lenett\.py; did you mean "lenet\.py"'):
        load(str(tmp_path / "lenett.py"))
    with pytest.raises(BadInput, match="there is no file"):
        load("nowhere/at_all.py")


@pytest.mark.parametrize("name", ["mlp_fashion", "trained_only", "bert_wordnet"])
def test_examples_pass_the_check(name, monkeypatch):
    if name == "bert_wordnet":
        pytest.importorskip("transformers")
    monkeypatch.setenv("QUADRIGA_DATA", "shipped")
    made = load(str(EXAMPLES / f"{name}.py"))
    assert not [note for note in check(made) if "in both" not in note]
    assert made.trained == (made.train is None) == (name == "trained_only")


def test_trained_example_is_trained(monkeypatch):
    monkeypatch.setenv("QUADRIGA_DATA", "shipped")
    made = load(str(EXAMPLES / "trained_only.py"))
    batch = made.val.batch(torch.arange(2000))
    with torch.inference_mode():
        values, _ = made.metric.examples(call(made.build(), batch.inputs), batch)
    assert float(values.mean()) > 0.8


def test_another_process_finds_it(write):
    reference = load(write(BODY), n=50).reference
    code = f"from quadriga.workloads import load; print(len(load({reference!r}).train))"
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "50"
