"""A train step that is broken off in its middle and resumed from its checkpoint, for methods whose hooks have state."""

from dataclasses import replace

from quadriga.core.slots import Hook
from quadriga.testing import fingerprint
from quadriga.train.loop import fit


class Cut(BaseException):
    """The process ends here, with what its folder holds."""


class CutAt(Hook):
    """Breaks off at a step; 0 for never."""

    def __init__(self, step):
        self.left = step

    def after_backward(self, model, progress):
        self.left -= 1
        if self.left == 0:
            raise Cut


def with_cut(setup, step):
    hooks = (*setup.training.make_hooks, lambda model: CutAt(step))
    return replace(setup, training=replace(setup.training, make_hooks=hooks))


def run(make, data, epochs, folder, cut=0, start=None):
    """Train what `make` gives with a checkpoint after every step; the fingerprint and the outcome."""
    setup = with_cut(make(), cut)
    outcome = fit(setup, data, epochs=epochs, seed=3, checkpoint=folder, every=0.0, start=start)
    return fingerprint(setup.model), outcome


def resumed(make, data, epochs, folder, cuts):
    """Broken off after each of these numbers of steps, resumed by a fresh setup each time, and then to the end."""
    for step in cuts:
        try:
            run(make, data, epochs, folder, step)
        except Cut:
            continue
        raise AssertionError(f"it ended before step {step}")
    return run(make, data, epochs, folder)
