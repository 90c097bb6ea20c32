"""A train step with everything that has state, run by `test_checkpoint.py` in processes that are killed.

Usage: python resumable.py FOLDER EPOCHS [STEP [WHERE]]: kill this process at a step, or at the nth rename inside a save.
"""

import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, OptimizerSlot
from quadriga.methods.training.crop import Crop
from quadriga.methods.training.flip import Flip
from quadriga.methods.training.rotate import Rotate
from quadriga.methods.training.schedule import Schedule
from quadriga.testing import fingerprint, tiny_cnn
from quadriga.train.loop import fit

torch.set_num_threads(1)
SEED = 11


class Average(Hook):
    """An exponential moving average, kept beside the weights, which uses all three global generators too."""

    def __init__(self, model):
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.count, self.noise = 0, (0.0, float("inf"))

    def after_step(self, model, progress):
        self.count += 1
        self.noise = (random.random() + np.random.rand() + torch.rand(1).item(), float("inf"))
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 0.1 + 0.01 * self.noise[0])

    def state_dict(self):
        return {"shadow": self.shadow, "count": self.count, "noise": self.noise}

    def load_state_dict(self, state):
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)
        self.count, self.noise = state["count"], state["noise"]

    def end(self, model, data):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(self.shadow[name])


class KillAt(Hook):
    """Ends the process at a step, as a power cut would."""

    def __init__(self, step):
        self.left = step

    def after_backward(self, model, progress):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)


def make(kill=0):
    """A setup with batch norm, dropout, AdamW, a schedule, three transforms and an averaging hook; and its data."""
    workload = tiny_cnn()
    setup = Setup.of(workload, seed=SEED)
    for method in (Crop(), Flip(), Rotate(), Schedule(kind="cosine", warmup=0.2)):
        setup = method(setup)
    hooks = (Average, lambda model: KillAt(kill))
    training = replace(setup.training, make_hooks=hooks)
    return replace(setup, training=training, optimizer=OptimizerSlot(adamw)), workload.train


def kill_at_rename(number):
    """End the process just before its nth rename of a finished temporary file."""
    rename, seen = os.replace, []

    def counting(source, target):
        seen.append(target)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = counting


def run(folder, epochs, kill=0):
    """Train, with a checkpoint at every step, and return the fingerprint of the weights."""
    setup, data = make(kill)
    outcome = fit(setup, data, epochs=epochs, seed=SEED, checkpoint=folder, every=0.0)
    return fingerprint(setup.model), outcome


if __name__ == "__main__":
    folder, epochs, *kill = sys.argv[1:]
    if len(kill) == 2:
        kill_at_rename(int(kill[1]))
    mark, outcome = run(Path(folder), float(epochs), int(kill[0]) if kill else 0)
    print(mark, outcome.steps, outcome.exact)
