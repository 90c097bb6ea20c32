"""The value that methods map: four slots, one per family, the traits known of it, and a read-only context."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, Tree, call, copied, evaluating, primary
from quadriga.core.classes import class_dim
from quadriga.core.data import Data
from quadriga.core.errors import BadInput
from quadriga.core.method import invariant
from quadriga.core.metric import Metric
from quadriga.core.slots import OptimizerSlot, RuntimeSpec, Training
from quadriga.core.workload import Workload, uses_images, uses_tokens

PROBE = "PROBE"  # the trait of a walk that skipped a train step: what goes by the weights is a guess
Arm = tuple[nn.Module, Tree]  # a model and the inputs it is called with


def undecided(key: str, compute: Callable[[], Any]) -> Any:
    """The service `decide` where nothing is kept: compute it."""
    return compute()


def untold(what: str) -> None:
    """The service `leave` where nobody asks."""


class Kept(Sequence[Batch]):
    """Batches that are given out again and again, each time as a copy: whoever writes into one changes none of the others.

    Example:
        >>> kept = Kept([Batch(torch.zeros(2), None, torch.arange(2))])
        >>> kept[0].inputs.add_(1).tolist(), kept[0].inputs.tolist()
        ([1.0, 1.0], [0.0, 0.0])
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches: tuple[Batch, ...] = batches._batches if isinstance(batches, Kept) else tuple(batches)

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, place: int) -> Batch: ...
    @overload
    def __getitem__(self, place: slice) -> Kept: ...
    def __getitem__(self, place: int | slice) -> Batch | Kept:
        found = self._batches[place]
        return copied(found) if isinstance(found, Batch) else Kept(found)


class Lent:
    """A field of a dataclass that is read as a copy."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Tree:
        return self if instance is None else copied(vars(instance)[self.name])

    def __set__(self, instance: Any, value: Tree) -> None:
        vars(instance)[self.name] = value


@dataclass(frozen=True)
class Context:
    """What a method may look at. Tensors of `example` and `calibration` are copies each time, which a model may write into.

    Args:
        example: two examples' inputs.
        calibration: batches cut from train.
        metric: of the task.
        seed: for anything random.
        teacher: the trained baseline, frozen and in eval mode, or None.
        invariances: changes of the input that keep its label.
        examples: number of training examples, or None where nobody says.
        classes: number of classes where outputs are [batch, classes] and targets integer, else None.
        classes_dim: where outputs are scores of classes, also of positions, and targets integer: 1 or −1, else None.
        gradients: (model) → {parameter name: mean gradient of the loss over calibration}.
        curvature: (model) → {parameter name: diagonal of the loss's Hessian, estimated over calibration}.
        evaluate: (model) → quality on val.
        enough: (model, quality before a change or None) → whether its quality is within the floor, or, of a model that misses
            the floor before the change, as near to that; None where no floor is known.
        time: (arms, spec) → seconds per call of each arm (a model and its inputs), realised by the specification and
            timed in turn, block by block, so that their ratios can be trusted more than their values.
        pace: (setups) → processor seconds per training step of each, on copies of their models, timed in turn.
        runtime: the specification that the whole recipe ends in, as far as its later hardware steps say.
        granules: (sides of layers, spec) → for each the step of width in which its cost goes in that runtime and precision, by
            a measurement on this machine; None where nothing can be measured. See `core.granules`.
        decide: (key, compute) → plain data: what `compute` returned when this step of this recipe was first applied, so
            that a decision by a measurement is made once, and every process rebuilds the same network.
        leave: told by a method of what it was asked for and left as it is, with the reason, since the rest of it applies.
        again: makes, in another process, the setup that a train step finds, and the data that it learns from; it can be
            pickled. None where nothing can, and what a worker needs has to be sent.
    """

    example: Tree
    calibration: Sequence[Batch]
    metric: Metric
    seed: int = 0
    teacher: nn.Module | None = None
    invariances: frozenset[str] = frozenset()
    examples: int | None = None
    classes: int | None = None
    classes_dim: int | None = None
    gradients: Callable[[nn.Module], Mapping[str, Tensor]] | None = None
    curvature: Callable[[nn.Module], Mapping[str, Tensor]] | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    enough: Callable[[nn.Module, float | None], bool] | None = None
    time: Callable[[Sequence[Arm], RuntimeSpec], list[float]] | None = None
    pace: Callable[[Sequence[Setup]], list[float]] | None = None
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)
    granules: Callable[[Collection[str], RuntimeSpec], Mapping[str, int]] | None = None
    decide: Callable[[str, Callable[[], Any]], Any] = undecided
    leave: Callable[[str], None] = untold
    again: Callable[[], tuple[Setup, Data]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", Kept(self.calibration))


setattr(Context, "example", Lent("example"))  # noqa: B010 (a field of the class body would take it for a default)


@dataclass(frozen=True)
class Setup:
    """Four slots, traits and context. Methods return a new one; the model inside is the trial's own."""

    model: nn.Module
    training: Training
    optimizer: OptimizerSlot
    runtime: RuntimeSpec
    traits: frozenset[str]
    context: Context

    @property
    def ending(self) -> RuntimeSpec:
        """What this place of the recipe ends in: the runtime of its last step, or that for a batch of one before it is set."""
        final = self.context.runtime
        return final.alone if final.alone is not None and self.runtime.alone is None else final

    @classmethod
    def of(cls, workload: Workload, seed: int = 0, model: nn.Module | None = None, **services: Any) -> Setup:
        """The start of every trial: the workload's own model, built or copied, and its plain training.

        Args:
            workload: what to start from.
            seed: of the initial weights, and of everything random later.
            model: takes the place of a freshly built one.
            services: fields of `Context` that the study supplies (teacher, gradients, evaluate, time).
        """
        model = workload.build(seed) if model is None else model
        source = workload.calibration_source
        count = min(len(source), 512)
        calibration = Kept(source.fixed(i) for i in torch.arange(count).split(workload.batch_size))
        classes = class_count(model, workload)
        assert isinstance(workload.metric, Metric), "a workload replaces names when it is made"
        facts = {
            "invariances": workload.invariances,
            "examples": len(source) if workload.train is not None else None,
            "classes": classes,
            "classes_dim": dim_of_logits(model, workload),
        }
        context = Context(workload.example, calibration, workload.metric, seed, **{**facts, **services})
        return cls(
            model,
            plain_training(workload),
            OptimizerSlot(plain_sgd),
            RuntimeSpec(),
            first_traits(model, workload, classes, context),
            context,
        )

    def reset_training(self, workload: Workload) -> Setup:
        """After a `train` step: the model is finished, TRAINED is known, training and optimizer slots are the workload's again.

        Raises:
            NotApplicable: what was to be done at the end cannot be done.
        """
        model = self.model
        for finish in self.training.finish:
            model = finish(model)
        return replace(
            self,
            model=model,
            training=plain_training(workload),
            optimizer=OptimizerSlot(plain_sgd),
            traits=self.traits | {"TRAINED"},
        )


def plain_training(workload: Workload) -> Training:
    """The training slot when no step changed it: the workload's own loss and batch size."""
    assert not isinstance(workload.loss, str), "a workload replaces names when it is made"
    return Training(workload.loss, workload.batch_size)


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer when no step chose one: SGD at 0.1."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def class_count(model: nn.Module, workload: Workload) -> int | None:
    """Number of classes if outputs are [batch, classes] and targets are integers [batch], else None."""
    target = workload.val.batch(torch.arange(1)).target
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dim() != 1:
        return None
    with evaluating(model), torch.no_grad():
        logits = primary(call(model, workload.example))
    return logits.shape[-1] if logits.dim() == 2 else None


def dim_of_logits(model: nn.Module, workload: Workload) -> int | None:
    """1 or −1 where outputs are scores of classes, [batch, …] or of positions, and targets integers; else None."""
    batch = workload.val.batch(torch.arange(1))
    if not isinstance(batch.target, Tensor) or batch.target.is_floating_point():
        return None
    with evaluating(model), torch.no_grad():
        logits = primary(call(model, batch.inputs))
    try:
        return class_dim(logits.shape, batch.target.shape, workload.classes_dim) if logits.is_floating_point() else None
    except BadInput:  # no scores of classes; or nobody knows where
        return None


def first_traits(model: nn.Module, workload: Workload, classes: int | None, context: Context) -> frozenset[str]:
    """The facts that hold before any method acted."""
    names = list(dict(model.named_parameters(remove_duplicate=False)))
    facts = {
        "FLOAT_WEIGHTS": True,
        "TRAINED": workload.trained,
        "TRAIN_DATA": workload.train is not None,
        "TEACHER": context.teacher is not None,
        "TIED": len(names) > len(list(model.parameters())),
        "CLASSES": classes is not None,
        "LOGITS": context.classes_dim is not None,
        "IMAGES": uses_images(workload.example),
        "TOKENS": uses_tokens(workload.example),
        "PER_EXAMPLE_LOSS": _per_example(model, workload),
    }
    return frozenset(name for name, holds in facts.items() if holds) | {invariant(change) for change in workload.invariances}


def _per_example(model: nn.Module, workload: Workload) -> bool:
    batch = workload.val.batch(torch.arange(min(2, len(workload.val))))
    with evaluating(model), torch.no_grad():
        loss = plain_training(workload).loss(call(model, batch.inputs), batch)
    return isinstance(loss, Tensor) and loss.shape == batch.index.shape
