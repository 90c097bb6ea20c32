"""Many training and optimizer methods at once on a CNN, an LSTM and a GPT; run by `test_training_together.py`, in processes
that are killed too.

Usage: python together.py NAME FOLDER [STEP]: train with a checkpoint at every step; kill this process at a step.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from resumable import KillAt

from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.methods import build
from quadriga.testing import fingerprint, tiny_cnn, tiny_lstm, tiny_transformer
from quadriga.train.loop import fit

torch.set_num_threads(1)
EPOCHS, SEED = 4.0, 3
RECIPES = {
    "cnn": (
        tiny_cnn,
        step("optimizer", kind="adamw", lr=0.01),
        step("l2", form="decoupled", amount=0.1),
        step("decay_schedule", kind="linear"),
        step("qat"),
        step("crop", padding=2),
        step("flip", kind="alternating"),
        step("mixup"),
        step("label_smoothing"),
        step("schedule", kind="one_cycle"),
        step("accumulate", steps=2),
        step("clip_gradients", limit=0.3),
        step("lookahead", every=3),
        step("ema", decay=0.7),
    ),
    "lstm": (
        tiny_lstm,
        step("optimizer", kind="adamw", lr=0.01),
        step("cautious_decay", amount=0.1),
        step("l1", amount=0.001),
        step("token_dropout", probability=0.2),
        step("label_smoothing"),
        step("schedule", kind="cosine", warmup=0.1),
        step("accumulate", steps=2, keep_batch=True),
        step("clip_gradients", limit=0.1),
        step("prune_data", ratio=0.5),
        step("ema", decay=0.7),
    ),
    "gpt": (
        tiny_transformer,
        step("optimizer", kind="muon", lr=0.01),
        step("l2", form="decoupled", amount=0.1),
        step("decay_schedule", kind="cosine"),
        step("token_dropout", probability=0.1),
        step("schedule", kind="wsd", warmup=0.1),
        step("accumulate", steps=2),
        step("batch_ramp"),
        step("clip_gradients", limit=0.1),
        step("prune_data", ratio=0.5),
        step("swa", start=0.5),
    ),
}


def made(name, without=None, kill=0):
    """The setup with all steps but one, and its data."""
    workload, *steps = RECIPES[name]
    task = workload((192, 48, 48))
    setup = Setup.of(task, seed=SEED)
    for number, one in enumerate(Recipe(tuple(steps)).steps):
        if number != without:
            setup = build(one)(setup)
    training = setup.training  # a hook that kills at step 0 never does
    return replace(setup, training=replace(training, make_hooks=(*training.make_hooks, lambda model: KillAt(kill)))), task.train


def trained(name, without=None, folder=None, kill=0):
    """The fingerprint of the trained weights."""
    setup, data = made(name, without, kill)
    outcome = fit(setup, data, epochs=EPOCHS, seed=SEED, checkpoint=folder, every=0.0)
    return fingerprint(setup.model), outcome


if __name__ == "__main__":
    name, folder, *kill = sys.argv[1:]
    mark, outcome = trained(name, folder=Path(folder), kill=int(kill[0]) if kill else 0)
    print(mark, outcome.exact)
