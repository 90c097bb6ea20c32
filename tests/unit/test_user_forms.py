"""The most telling of the forms of `benchmarks/user_models.py`: each is what PyTorch computes, or is refused in a sentence."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # at the end: tests have a module `networks` of their own
import user_models  # noqa: E402
import user_models_compare  # noqa: E402
from user_models_forms import forms  # noqa: E402

FORMS = forms()
WORK = ("gathered", "float64", "embedding_bag_max", "tuple_inputs")
REFUSED = {
    "packed": r'in "gru" packed sequences, .*user_forms_text\.py:\d+.*torch\.gather',
    "bfloat16": '"input" is bfloat16, which NumPy lacks.*eager or inductor',
    "branch": r"data-dependent branch .*user_forms_shapes\.py:\d+.*torch\.where",
}


def tried(name, folder):
    cells = user_models.child(name, str(FORMS[name].file), folder, ["check", "onnxruntime"])
    assert cells["check"]["verdict"] == "works", cells["check"]
    return cells["onnxruntime"]


@pytest.mark.parametrize("name", WORK)
def test_a_form_gives_what_its_own_module_gives_at_every_batch_and_the_quality_that_is_stated(name, tmp_path):
    cell = tried(name, tmp_path)
    assert cell["verdict"] == "works", cell
    found = user_models_compare.verdict(FORMS[name].plain(), tmp_path / "onnxruntime")
    cell = user_models.held(cell, found)
    assert cell["verdict"] == "works" and cell["scored"] == pytest.approx(cell["quality"], abs=0.1)


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_cannot_be_run_is_refused_with_its_place_and_a_way_out(name, tmp_path):
    cell = tried(name, tmp_path)
    assert cell["verdict"] == "refused"
    assert re.search(REFUSED[name], cell["says"]), cell["says"]
    assert FORMS[name].out in FORMS  # the way out is a form of its own, which is tried as well


def test_the_comparison_notices_a_wrong_output_a_wrong_quality_and_an_error():
    right = {"difference": 1e-6, "allowed": 1e-3, "where": "", "quality": 90.0, "scored": 90.0}
    assert user_models.held({"verdict": "works"}, right)["verdict"] == "works"
    for wrong in ({"difference": 0.1}, {"difference": float("inf")}, {"scored": 80.0}, {"raised": "RuntimeError"}):
        assert user_models.held({"verdict": "works"}, {**right, **wrong})["verdict"] == "wrong"


def test_the_comparison_sees_an_artifact_that_computes_something_else():
    plain = FORMS["plain"].plain()
    inputs, _ = user_models_compare.examples(plain["test"], 8)
    model = plain["model"]
    assert user_models_compare.compared(model, model, inputs) == (0.0, "")
    for other in (
        lambda x: model(x) + 0.1,
        lambda x: model(x)[:1],
        lambda x: {"logits": model(x)},
        lambda x: model(x).double(),
    ):
        assert user_models_compare.compared(model, other, inputs)[0] > 1e-2


def test_every_form_has_its_own_name_and_every_way_out_is_a_form():
    assert len(FORMS) > 70
    assert all(one.out in FORMS or not one.out for one in FORMS.values())
