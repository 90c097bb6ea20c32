"""What guessing reaches: the quality of answers that do not look at their inputs, to hold a baseline against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quadriga.core.batch import Batch, Tree, tensors, tree_map
from quadriga.core.data import Data
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric
from quadriga.core.outputs import join
from quadriga.measure.quality import score
from quadriga.measure.scores import Scores

SAMPLE, CHUNK = 4096, 256  # examples that the guess goes by, evenly spaced; and how many are read at once
DOUBT = 2.0  # standard errors by which a baseline has to be above the guess


@dataclass(frozen=True)
class Guess:
    """The best answer that ignores the input.

    Args:
        value: the quality that it reaches, in the metric's unit.
        how: what it answers.
        beaten: whether the model's quality is clearly better.
    """

    value: float
    how: str
    beaten: bool

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def guess(run: Callable[[Tree], Tree], data: Data, metric: Metric, scores: Scores) -> Guess | None:
    """The guess on a split, and whether the model whose scores these are is better than it.

    A metric that knows the best constant answer (`Metric.guess`) tells its value from the targets. Of any other, the model's
    own outputs are dealt out to other examples: as good an answer as one can give without looking.

    Args:
        run: the model, inputs tree → outputs tree; called for metrics without a guess of their own.
        data: the split that was scored.
        metric: that it was scored with.
        scores: of the model on it.

    Returns:
        None where outputs cannot be dealt out, since they differ in shape from batch to batch.

    Example:
        >>> from quadriga.core.data import TensorData
        >>> from quadriga.core.metric import accuracy
        >>> x = torch.eye(4)
        >>> data = TensorData(x, torch.tensor([0, 0, 0, 1]))
        >>> found = guess(lambda x: x, data, accuracy, score(lambda x: x, data, accuracy))
        >>> found.value, found.how, found.beaten
        (75.0, 'always class 0', False)
    """
    rows = torch.arange(min(len(data), SAMPLE)) * len(data) // min(len(data), SAMPLE)
    if metric.guess is not None:
        value, how = metric.guess(join([data.batch(part).target for part in rows.split(CHUNK)]))
        found, own = metric.scale * value, scores.value
    else:
        dealt = _dealt_out(run, data, metric, rows)
        if dealt is None:
            return None
        (found, own), how = dealt, "the model's own outputs, dealt out to other examples"
    return Guess(found, how, metric.gain(own, found) > DOUBT * _standard_error(metric, scores))


def _dealt_out(run: Callable[[Tree], Tree], data: Data, metric: Metric, rows: torch.Tensor) -> tuple[float, float] | None:
    """The metric's value with each output at an example half the split away, and at its own."""
    sample = [data.batch(part) for part in rows.split(CHUNK)]
    with torch.no_grad():
        outputs = [run(batch.inputs) for batch in sample]
    try:
        output = join(outputs)
        whole = Batch(None, join([batch.target for batch in sample]), rows)
    except BadInput:
        return None
    if any(t.dim() == 0 or len(t) != len(rows) for t in tensors(output)):
        return None
    dealt = tree_map(lambda t: t.roll(len(rows) // 2, 0), output)
    return tuple(_value(metric, one, whole) for one in (dealt, output))  # type: ignore[return-value]


def _value(metric: Metric, output: Tree, batch: Batch) -> float:
    return score(lambda _: output, _Once(batch), metric, len(batch)).value


class _Once(Data, fresh=True):
    """A split that was read before, to be scored in one call."""

    def __init__(self, batch: Batch) -> None:
        self.kept = batch

    def __len__(self) -> int:
        return len(self.kept)

    def batch(self, index: torch.Tensor) -> Batch:
        """All of it, which is what is asked for."""
        return self.kept


def _standard_error(metric: Metric, scores: Scores) -> float:
    if scores.values is None or scores.weights is None:
        return 0.0
    weighed = scores.values * scores.weights / scores.weights.mean()
    return float(metric.scale * weighed.std() / math.sqrt(len(weighed)))
