"""What a model returns: which tensor is its prediction, and what a metric of a whole split can read of it."""

from __future__ import annotations

from quadriga.core.batch import Tree, candidates, named, storable
from quadriga.core.errors import BadInput
from quadriga.core.metric import LOSSES, METRICS, Metric, reads_classes
from quadriga.core.workload import Workload

WAY_OUT = 'return the prediction as "logits", or alone'


def predictions(output: Tree, workload: Workload, notes: list[str]) -> None:
    """Say which of several tensors is taken for the prediction, and what no export returns.

    Raises:
        BadInput: a named loss or metric would have to guess among the entries of a dict.
    """
    left: list[str] = []
    storable(output, left)
    if left:
        notes.append(f"the model also returns {', '.join(left)}: no tensor, so None in exports")
    found, entries = list(candidates(output)), named(output)
    if len(found) < 2 or (entries is not None and "logits" in found):
        return
    if entries is None:
        fields = getattr(output, "_fields", ())
        if "logits" in fields and fields.index("logits") != int(found[0]):
            raise BadInput(f"the model returns a named tuple {fields}, of which the first is read", "put logits first")
        notes.append(f"the model returns {len(found)} tensors; the first is taken for its prediction")
        return
    if reader := _named_reader(workload):
        problem = f"the model returns {', '.join(found)}, and {reader} cannot know which is the prediction"
        raise BadInput(problem, WAY_OUT)
    notes.append(f"the model returns {', '.join(found)}; methods that need one prediction take {found[0]}: else {WAY_OUT}")


def _named_reader(workload: Workload) -> str:
    """The loss or the metric of Quadriga's own that reads one tensor, by name; "" where both are the user's."""
    assert isinstance(workload.metric, Metric)
    for name, loss in LOSSES.items():
        if workload.loss is loss or (reads_classes(workload.loss) and type(workload.loss) is type(loss)):
            return name
    known = METRICS.get(workload.metric.name)
    return known.name if known is not None and type(known.examples) is type(workload.metric.examples) else ""
