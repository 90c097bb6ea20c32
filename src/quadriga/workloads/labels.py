"""Class labels: what cross-entropy and accuracy can read."""

from __future__ import annotations

import torch
from torch import Tensor

from quadriga.core.batch import Batch
from quadriga.core.classes import class_dim
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric, reads_classes
from quadriga.core.workload import Workload


def labels(name: str, batch: Batch, logits: Tensor, workload: Workload, notes: list[str]) -> None:
    """Class labels: type, shape and range, wherever a named loss or metric reads them."""
    assert isinstance(workload.metric, Metric)
    target, scored = batch.target, reads_classes(workload.metric.examples) and name != "train"
    if not reads_classes(workload.loss) and not scored:
        return
    reader = "cross_entropy" if reads_classes(workload.loss) else workload.metric.name
    if not isinstance(target, Tensor):
        raise BadInput(f"the labels of {name} are {type(target).__name__}", f"{reader} needs a tensor of class numbers")
    if target.is_floating_point():
        if target.shape[1:] == logits.shape[1:] and not scored:
            _dim(name, logits, target, workload, soft=True)
            return
        form = f"{str(target.dtype)[6:]} of shape {list(target.shape)}"
        raise BadInput(f"the labels of {name} are {form}; {reader} needs class numbers, int64", "use labels.long()")
    if target.dtype != torch.int64:
        raise BadInput(f"the labels of {name} are {str(target.dtype)[6:]}; {reader} needs int64", "use labels.long()")
    classes = logits.shape[_dim(name, logits, target, workload)]
    outside = ((target < 0) | (target >= classes)) & (target != -100)
    if bool(outside.any()):
        place = outside.nonzero()[0]
        value, count, first = int(target[tuple(place)]), int(outside.sum()), int(batch.index[place[0]])
        problem = f"{count} labels of {name} are outside 0..{classes - 1}, first {value} at example {first}"
        raise BadInput(problem, f"the model has {classes} outputs; number the classes from 0, or widen its last layer")
    if len(target) > 1 and bool((target == target.flatten()[0]).all()):
        notes.append(f"all labels of {name} are {int(target.flatten()[0])}")


def _dim(name: str, logits: Tensor, target: Tensor, workload: Workload, *, soft: bool = False) -> int:
    try:
        return class_dim((len(target), *logits.shape[1:]), target.shape, workload.classes_dim, soft=soft)
    except BadInput as error:
        raise BadInput(f"{name}: {error.problem}", error.remedy) from error


def unseen(samples: dict[str, Batch], notes: list[str]) -> None:
    """A note on classes that are judged but never learned."""
    train = samples.get("train")
    if train is None or not isinstance(train.target, Tensor) or train.target.dtype != torch.int64 or train.target.dim() != 1:
        return
    known = set(train.target.unique().tolist())
    for name in ("val", "test"):
        target = samples[name].target
        if isinstance(target, Tensor) and (extra := set(target.unique().tolist()) - known):
            notes.append(f"{name} has classes that train lacks: {', '.join(map(str, sorted(extra)[:5]))}")
