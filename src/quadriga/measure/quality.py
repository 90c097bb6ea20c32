"""Quality of a model on a split, kept per example so that two models can be compared in pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, Fields, Tree, call, copied, device_of, evaluating, tree_map
from quadriga.core.cuda import settle
from quadriga.core.data import Data
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric
from quadriga.core.outputs import join, rowwise
from quadriga.measure.scores import Array, Scores

__all__ = ["Scores", "join", "rowwise", "score", "whole_value"]


MORE = "check the metric on this example"


def score(run: Callable[[Tree], Tree], data: Data, metric: Metric, batch_size: int = 256) -> Scores:
    """Evaluate a model on every example of a split, once and in order.

    Args:
        run: inputs tree → outputs tree; an `nn.Module` is called in eval mode on its own device, and left as it was.
        data: the split; its last batch may be smaller.
        metric: with `examples`, or with `whole`, which may also return [n] values: then it is called batch by batch,
            otherwise once on all outputs.
        batch_size: examples per call.

    Raises:
        BadInput: the metric raised, or returned NaN, infinity, a string, or another number of values than examples.
    """
    with torch.no_grad(), evaluating(run) if isinstance(run, nn.Module) else nullcontext():
        batches = _outputs(run, data, batch_size)
        first, output, seconds = next(batches)
        if metric.examples is not None or _per_example(metric, output, first):
            return _score_examples(metric, _chain((first, output, seconds), batches))
        return _score_whole(metric, _chain((first, output, seconds), batches))


Item = tuple[Batch, Tree, float]


def _score_examples(metric: Metric, items: Iterator[Item]) -> Scores:
    values, weights, predictions, total = [], [], [], 0.0
    for batch, output, seconds in items:
        v, w = _examples(metric, output, batch)
        values.append(v)
        weights.append(w)
        if metric.predict is not None and (p := metric.predict(output)).dim() == 1 and len(p) == len(batch):
            predictions.append(p.cpu().numpy().astype(np.int64))
        total += seconds
    value, weight = np.concatenate(values), np.concatenate(weights)
    if not weight.sum() > 0 or (weight < 0).any():
        raise BadInput(f'the metric "{metric.name}" gave weights that sum to {weight.sum():g}', "weights are positive")
    predicted = np.concatenate(predictions) if len(predictions) == len(values) else None
    return Scores(value, weight, predicted, metric.scale * float((weight * value).sum() / weight.sum()), total)


def _score_whole(metric: Metric, items: Iterator[Item]) -> Scores:
    outputs, targets, predictions, total = [], [], [], 0.0
    for batch, output, seconds in items:
        outputs.append(rowwise(output, len(batch)))
        targets.append(tree_map(lambda t: t.cpu(), batch.target))
        if metric.predict is not None and (p := metric.predict(output)).dim() == 1 and len(p) == len(batch):
            predictions.append(p.cpu().numpy().astype(np.int64))
        total += seconds
    output, target = join(outputs), join(targets)
    value = metric.scale * whole_value(metric, copied(output), copied(target))  # both are kept, and resampled
    return Scores(
        None, None, np.concatenate(predictions) if len(predictions) == len(outputs) else None, value, total, output, target
    )


def whole_value(metric: Metric, outputs: Tree, targets: Tree) -> float:
    """The number that a set metric gives, unscaled.

    Raises:
        BadInput: it raised, or the result is no finite number.
    """
    assert metric.whole is not None
    with _blaming(metric, "all examples"):
        result = metric.whole(outputs, targets)
    if isinstance(result, Tensor | np.ndarray) and np.ndim(result) == 0:
        result = result.item()
    if isinstance(result, bool) or not isinstance(result, int | float | np.number):
        raise BadInput(f'the metric "{metric.name}" returned {_short(result)}', "return one number, or one per example")
    if not np.isfinite(result):
        raise BadInput(f'the metric "{metric.name}" returned {float(result)} on all examples', "it has to be finite")
    return float(result)


def _outputs(run: Callable[[Tree], Tree], data: Data, batch_size: int) -> Iterator[Item]:
    module = run if isinstance(run, nn.Module) else None
    home = device_of(module) if module is not None else torch.device("cpu")
    for batch in data.batches(batch_size):
        batch = batch.to(home) if module is not None else batch
        start = time.perf_counter()
        output = call(module, batch.inputs) if module is not None else run(batch.inputs)
        settle(output)
        if type(output) is dict:  # from an artifact, of a model whose outputs have attributes too
            output = Fields(output)
        yield batch, output, time.perf_counter() - start


def _chain(first: Item, rest: Iterator[Item]) -> Iterator[Item]:
    yield first
    yield from rest


@contextmanager
def _blaming(metric: Metric, where: str) -> Iterator[None]:
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f'the metric "{metric.name}" raised {type(error).__name__}: {error} on {where}', MORE) from error


def _where(batch: Batch) -> str:
    return f"examples {int(batch.index[0])} to {int(batch.index[-1])}"


def _per_example(metric: Metric, output: Tree, batch: Batch) -> bool:
    """Whether a user's callable returns [n] values; what it raises on one batch may be right on the whole set."""
    assert metric.whole is not None
    try:
        result = metric.whole(copied(output), copied(batch.target))  # it is called on both again
    except Exception:
        return False
    return isinstance(result, Tensor | np.ndarray | list | tuple) and np.ndim(result) == 1 and len(result) == len(batch)


def _examples(metric: Metric, output: Tree, batch: Batch) -> tuple[Array, Array]:
    """Checked values and weights of one batch."""
    with _blaming(metric, _where(batch)):
        if metric.examples is not None:
            values, weights = metric.examples(output, batch)
        else:
            assert metric.whole is not None
            values, weights = metric.whole(output, batch.target), torch.ones(len(batch))  # type: ignore[assignment]
    return _numbers(metric, values, batch, "values"), _numbers(metric, weights, batch, "weights")


def _numbers(metric: Metric, given: Any, batch: Batch, what: str) -> Array:
    try:
        array = np.asarray(given.detach().cpu().double() if isinstance(given, Tensor) else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadInput(f'the metric "{metric.name}" returned {_short(given)} as {what}', "return numbers") from error
    if isinstance(given, str) or array.shape != (len(batch),):
        text = f'the metric "{metric.name}" returned {what} of shape {list(array.shape)} for {len(batch)} examples'
        raise BadInput(text, "return one number per example")
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise BadInput(f'the metric "{metric.name}" returned {array[place]} for example {int(batch.index[place])}', MORE)
    return array


def _short(value: Any) -> str:
    return repr(value)[:60]
