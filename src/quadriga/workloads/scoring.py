"""Whether a user's metric gives numbers that can be compared."""

from __future__ import annotations

import numbers
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quadriga.core.batch import Batch, Tree
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric
from quadriga.core.workload import Workload
from quadriga.workloads.behaviour import only_read
from quadriga.workloads.place import told


def metric_works(workload: Workload, output: Tree, batch: Batch) -> None:
    """The metric on one batch, twice."""
    assert isinstance(workload.metric, Metric)
    first, second = _score(workload.metric, output, batch), _score(workload.metric, output, batch)
    if not np.array_equal(first, second):
        raise BadInput(f"the metric {workload.metric.name} gives different values for equal outputs", "make it deterministic")


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
