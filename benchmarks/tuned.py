"""Workloads whose baseline is a tuned AdamW one-cycle run, as `benchmarks/train_cost.py` tuned it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quadriga.core.files import read_json
from quadriga.core.recipe import Recipe
from quadriga.core.workload import Workload
from quadriga.workloads import load

TUNED = Path("out/train_cost/tuned.json")  # name → plain recipe


def _with_tuned(reference: str) -> Workload:
    recipe = Recipe.from_plain(read_json(TUNED)[reference], "AdamW one-cycle, tuned")
    return replace(load(reference), baseline=recipe, reference=f"{__file__}:{NAMES[reference]}")


def resnet20() -> Workload:
    """resnet20_fashion."""
    return _with_tuned("resnet20_fashion")


def gpt_2m() -> Workload:
    """gpt_shakespeare of 2 M parameters."""
    return _with_tuned("gpt_shakespeare?size=2M")


def gpt_10m() -> Workload:
    """gpt_shakespeare of 10 M parameters, its rate as tuned at 2 M unless it was tuned itself."""
    return _with_tuned("gpt_shakespeare?size=10M")


NAMES = {"resnet20_fashion": "resnet20", "gpt_shakespeare?size=2M": "gpt_2m", "gpt_shakespeare?size=10M": "gpt_10m"}
