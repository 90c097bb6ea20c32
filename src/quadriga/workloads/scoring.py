"""Whether a user's metric gives numbers that can be compared."""

from __future__ import annotations

import numbers
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quadriga.core.batch import Batch, Tree, named
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric
from quadriga.core.outputs import join, rowwise
from quadriga.core.workload import Workload
from quadriga.workloads.behaviour import only_read
from quadriga.workloads.place import told


def metric_works(workload: Workload, output: Tree, batch: Batch) -> None:
    """The metric on one batch, twice; one of a whole split also on two batches joined, as scoring does it."""
    metric = workload.metric
    assert isinstance(metric, Metric)
    first, second = _score(metric, output, batch), _score(metric, output, batch)
    if not np.array_equal(first, second):
        raise BadInput(f"the metric {metric.name} gives different values for equal outputs", "make it deterministic")
    if metric.examples is None and not first.ndim:
        _joined(metric, output, batch)


def _joined(metric: Metric, output: Tree, batch: Batch) -> None:
    """A metric of a whole split is given the outputs that have one row per example, of all batches joined.

    Raises:
        BadInput: it reads something else.
    """
    kept = rowwise(output, len(batch))
    gone = [name for name, value in entries_of(output).items() if value is not None and entries_of(kept).get(name) is None]
    try:
        _score(metric, join([kept, kept]), _twice(batch))
    except BadInput as error:
        if not gone:
            raise
        problem = f"the metric {metric.name} may read {' or '.join(gone)}, which has no row per example: {error.problem}"
        raise BadInput(problem, "let it read outputs with one row per example only") from error


def _score(metric: Metric, output: Tree, batch: Batch) -> NDArray[np.float64]:
    what = f"the metric {metric.name}"
    try:
        result = only_read(what, partial(_result, metric, batch), output=output, target=batch.target)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{what} fails: {told(error)}", "correct it; it is called with (output, target)") from error
    values = _numbers(result, what)
    if values.ndim and values.shape != (len(batch),):
        raise BadInput(
            f"{what} returned the shape {list(values.shape)} for {len(batch)} examples", "return [n] values or one number"
        )
    if metric.examples is not None and not values.ndim:
        raise BadInput(f"{what} returned one number", "its function `examples` has to return [n] values and weights")
    if not np.isfinite(values).all():
        raise BadInput(
            f"{what} returned {values.ravel()[~np.isfinite(values.ravel())][0]}", "check divisions by zero and its inputs"
        )
    return values


def entries_of(output: Tree) -> dict[str, Any]:
    """The top of an output tree by name or number."""
    entries = named(output)
    if entries is not None:
        return {str(k): v for k, v in entries.items()}
    return {f"output {k}": v for k, v in enumerate(output)} if isinstance(output, tuple | list) else {}


def _twice(batch: Batch) -> Batch:
    return Batch(batch.inputs, join([batch.target, batch.target]), torch.cat([batch.index, batch.index]))


def _result(metric: Metric, batch: Batch, output: Tree, target: Tree) -> Any:
    if metric.examples is None:
        assert metric.whole is not None
        return metric.whole(output, target)
    values, weights = metric.examples(output, replace(batch, target=target))
    return values if len(values) == len(weights) else f"{len(values)} values and {len(weights)} weights"


def _numbers(result: Any, what: str) -> NDArray[np.float64]:
    if isinstance(result, Tensor):
        return result.detach().cpu().double().numpy()
    if isinstance(result, list | tuple | np.ndarray | numbers.Real):
        try:
            return np.asarray(result, dtype=float)
        except (TypeError, ValueError):
            pass
    raise BadInput(f"{what} returned {result!r:.60}, a {type(result).__name__}", "return a number, or [n] values")
