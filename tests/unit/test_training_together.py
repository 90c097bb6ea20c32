"""Eight and more methods of training and optimizer in one recipe: each acts, and a kill in mid-epoch changes no bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import together
import torch

from quadriga.train.checkpoint import read_state

torch.set_num_threads(1)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def straight():
    """Network → fingerprint of the weights that all methods together give."""
    return {name: together.trained(name)[0] for name in together.RECIPES}


@pytest.mark.parametrize(
    ("name", "without"),
    [(name, i) for name, (_, *steps) in together.RECIPES.items() for i in range(len(steps))],
    ids=lambda v: str(v),
)
def test_each_acts(straight, name, without):
    """Taken out, any one of them changes the weights; the optimizer too, which SGD then stands in for."""
    assert len(together.RECIPES[name]) > 8
    assert together.trained(name, without)[0] != straight[name]


@pytest.mark.parametrize("name", together.RECIPES)
def test_killed_in_mid_epoch_and_resumed(tmp_path, straight, name):
    """SIGKILL where augmentation, averages, accumulation and a schedule are under way."""

    def process(*kill):
        return subprocess.run(
            [sys.executable, str(HERE / "together.py"), name, str(tmp_path), *map(str, kill)],
            env={**os.environ, "PYTHONPATH": f"{HERE.parents[1] / 'src'}:{HERE}", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    length = 192
    assert process(9).returncode == -signal.SIGKILL
    extra = read_state(tmp_path).extra
    assert extra["done"] == 8 and extra["position"] % length
    done = process()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [straight[name], "True"]
