"""Asynchronous gradient descent in shared memory: workers update one set of weights without waiting for one another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Asynchronous


@dataclass(frozen=True, kw_only=True)
class Hogwild(Method):
    """Let several processes of one machine make the steps of training, each with batches of its own, all on one set of weights
    in shared memory, which none of them locks. A gradient is then a little stale: others have updated the weights since they
    were read, on average about workers - 1 times. How stale every update was is counted, and reported with the training.

    A batch of the stream goes to exactly one worker, by turns as they are free, so that an epoch sees every example once and
    schedules follow what all have done together. Batch statistics and the optimizer's state are shared like the weights: sgd,
    with momentum too, adam, adamw, nadam, rmsprop, adagrad and muon, which change tensors in place. Momentum adds to the
    inertia that staleness brings anyway, so with many workers less of it is better. Early gradients are large and change fast,
    and stale ones slow it down, so one process makes the first part of the training alone. At the rates that serial training
    just bears, stale gradients diverge now and then: clip them, at a norm that few reach.

    Refused, with the reason: an optimizer that counts in its groups or replaces its state; methods that keep a state from step
    to step (averages, lookahead, early stopping, gradual pruning, qat) or choose examples by their losses (prune_data);
    `compile`, fp16 and a GPU. Checkpoints are taken between two steps of everybody, and a killed train step goes on from the
    last; a worker that dies ends it.

    Equal seeds give the same batches but not the same weights, since who comes first is chance: NONDETERMINISTIC. One worker is
    plain training to the bit. The threads of the process are divided among the workers; each starts anew with PyTorch, which
    takes seconds and a few hundred MiB, so that it pays for trainings of minutes on cores that would idle.

    Args:
        workers: processes, at least 1, with the one that trains anyway.
        scale: multiply an update's rate by 1 / (1 + its staleness); give a larger rate with it.
        alone: the part of the train step, in [0, 1], before the others join.

    Source: Recht et al. 2011, arXiv:1106.5730; Zhang et al. 2016, arXiv:1511.05950 (scale); Dean et al. 2012, "Large scale
    distributed deep networks", section 5 (alone).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1106.5730, arXiv:1511.05950"
    search: ClassVar = {"workers": (2, 4), "scale": (False, True)}
    requires = frozenset({"TRAIN_DATA"})
    adds = frozenset({"NONDETERMINISTIC"})

    workers: int = 2
    scale: bool = False
    alone: float = 0.1

    def __post_init__(self) -> None:
        self.insist(
            ("workers", 1 <= self.workers <= 256, "give from 1 to 256 processes"),
            ("alone", 0 <= self.alone <= 1, "give a part of the training, from 0 to 1"),
        )

    @classmethod
    def unsearched(cls) -> str:
        return "a search uses all cores already, and what it finds has to be rebuilt by its seed"

    def apply(self, setup: Setup) -> Setup:
        """Ask for workers. NotApplicable where others are asked for already, on a GPU, and where steps are compiled."""
        if setup.training.asynchronous is not None:
            raise NotApplicable("workers are asked for already", "give its fields once")
        if setup.runtime.device != "cpu":
            raise NotApplicable(f"the model trains on {setup.runtime.device}, where processes take turns", "train on the CPU")
        if setup.runtime.compile:
            raise NotApplicable("every worker would compile the training step for itself", "leave out compile")
        asked = Asynchronous(self.workers, self.scale, self.alone, self.name)
        return replace(setup, training=replace(setup.training, asynchronous=asked))
