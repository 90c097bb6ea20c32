"""What the user brings: a model, its data splits, a loss and a metric."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from quadriga.core import rng
from quadriga.core.batch import Tree, copied, resize, tensors
from quadriga.core.copies import copy_model, refuse_script, unwrapped, without_cache
from quadriga.core.data import Data, as_data
from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.metric import LOSSES, METRICS, Loss, Metric, laid_out
from quadriga.core.recipe import Recipe, step

DEFAULT_TRAINING = Recipe((step("optimizer", kind="sgd", lr=0.1), step("train", epochs=10)), "baseline")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with its task.

    Args:
        model: an `nn.Module`, or a function without arguments that builds one.
        train: examples to learn from; None for a trained model that only has evaluation data.
        val: examples that the search, calibration and ablation may see.
        test: examples that are opened once, for the verdict. Each split is a `Data`, `(inputs, target)`
            tensors, a `DataLoader` or a map-style `Dataset`; targets have one row per example.
        loss: a name ("cross_entropy", "squared_error") or a callable (output, target) → [batch] or scalar.
        metric: a name ("accuracy", "bits_per_byte", "mean_squared_error"), a `Metric`, or a callable
            (output, target) → [batch] values or one number; higher is better unless `higher_is_better` is False.
        name: for the report.
        batch_size: of training, and the larger of the two batch sizes at which latency is measured.
        trained: whether the model comes trained.
        baseline: the recipe that trains the unchanged model as its user does.
        invariances: changes that keep labels true: "horizontal_flip", "rotation", "translation", "color" (brightness,
            contrast, hue).
        reference: how another process finds this workload again: a name, or "file.py:function".
        data_note: which data this is, for every record.
        higher_is_better: direction of a metric given as a callable.
        classes_dim: where outputs have scores of classes: 1 for [batch, classes, ...], as PyTorch's own losses want it, −1
            for [batch, ..., classes]; None: told from the shapes of outputs and targets, where only one fits.

    Raises:
        BadInput: a split is empty or of a wrong type, or a name is unknown.

    Example:
        >>> x, y = torch.randn(40, 4), torch.randint(2, (40,))
        >>> workload = Workload(model=nn.Linear(4, 2), train=(x, y), val=(x + 1, y), test=(x + 2, y))
        >>> workload.metric.name, len(workload.test)
        ('accuracy', 40)
    """

    model: nn.Module | Callable[[], nn.Module]
    val: Any
    test: Any
    train: Any = None
    loss: str | Callable[..., Any] = "cross_entropy"
    metric: str | Metric | Callable[..., Any] = "accuracy"
    name: str = "workload"
    batch_size: int = 64
    trained: bool = False
    baseline: Recipe | None = None
    invariances: frozenset[str] = frozenset()
    reference: str | None = None
    data_note: Mapping[str, Any] = field(default_factory=dict)
    higher_is_better: bool = True
    classes_dim: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__  # frozen: the given forms are made uniform once, here
        for split in ("train", "val", "test"):
            if getattr(self, split) is not None:
                put(self, split, as_data(getattr(self, split), split))
            elif split != "train":
                raise BadInput(f"the workload has no {split} data", f"give {split}= examples")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise BadInput(f"batch_size is {self.batch_size!r}", "give a positive integer")
        if self.train is None and not self.trained:
            raise BadInput("there is no training data and the model is not marked as trained", "give train= or trained=True")
        if self.baseline is None:
            put(self, "baseline", Recipe(name="baseline") if self.trained else DEFAULT_TRAINING)
        if self.classes_dim not in (None, 1, -1):
            raise BadInput(f"classes_dim is {self.classes_dim!r}", "give 1 for [n, classes, ...] or -1 for [n, ..., classes]")
        put(self, "metric", laid_out(_metric(self.metric, self.higher_is_better), self.classes_dim))
        put(self, "loss", laid_out(_loss(self.loss), self.classes_dim))

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh copy of the model; the same seed gives the same weights, in every process. The given module is never touched.

        Raises:
            BadInput: the function does not return an `nn.Module`.
        """
        return without_cache(unwrapped(self.given(seed)))

    def given(self, seed: int = 0) -> nn.Module:
        """As `build`, but with what `torch.compile` or `DataParallel` put around the model or its parts, and with a cache."""
        if isinstance(self.model, nn.Module):
            refuse_script(self.model)
            return copy_model(self.model)
        with rng.alike(seed):
            model = self.model()
        if not isinstance(model, nn.Module):
            raise BadInput(f"the model function returned {type(model).__name__}", "it has to return an nn.Module")
        return model

    @property
    def example(self) -> Tree:
        """Two examples' inputs, for tracing and export; the caller may write into them."""
        return copied(self._example)

    @cached_property
    def _example(self) -> Tree:
        return self.inputs(2)

    def inputs(self, batch: int) -> Tree:
        """`batch` examples' inputs from val, repeated if there are fewer."""
        with torch.inference_mode(False):  # tensors of inference mode, kept by a caller, could not be learned from
            return resize(self.val.fixed(torch.arange(min(batch, len(self.val)))).inputs, batch)

    @property
    def calibration_source(self) -> Data:
        """Where calibration examples come from: train, or val when there is no training data."""
        return self.train if self.train is not None else self.val


def _metric(given: Any, higher_is_better: bool) -> Metric:
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        if given not in METRICS:
            raise BadInput(f'there is no metric "{given}"', did_you_mean(given, METRICS))
        return METRICS[given]
    if not callable(given):
        raise BadInput(f"the metric is a {type(given).__name__}", "give a name, a Metric or a callable (output, target)")
    return Metric(getattr(given, "__name__", "metric"), "", higher_is_better, whole=given)


def _loss(given: Any) -> Loss:
    if isinstance(given, str):
        if given not in LOSSES:
            raise BadInput(f'there is no loss "{given}"', did_you_mean(given, LOSSES))
        return LOSSES[given]
    if not callable(given):
        raise BadInput(f"the loss is a {type(given).__name__}", "give a name or a callable (output, target)")
    if given in LOSSES.values() or "batch" in list(inspect.signature(given).parameters)[1:2]:
        return given
    return lambda output, batch: given(output, batch.target)


def uses_images(inputs: Tree) -> bool:
    """Whether the inputs are one float tensor [batch, channels, height, width]."""
    found = tensors(inputs)
    return len(found) == 1 and found[0].dim() == 4 and found[0].is_floating_point()


def uses_tokens(inputs: Tree) -> bool:
    """Whether the first input is int64 token numbers [batch, length]."""
    found = tensors(inputs)
    return bool(found) and found[0].dim() == 2 and found[0].dtype == torch.int64
