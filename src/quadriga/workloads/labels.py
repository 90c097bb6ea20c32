"""Class labels: what cross-entropy and accuracy can read."""

from __future__ import annotations

import torch
from torch import Tensor

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput
from quadriga.core.metric import METRICS, cross_entropy
from quadriga.core.workload import Workload


def labels(name: str, batch: Batch, logits: Tensor, workload: Workload, notes: list[str]) -> None:
    """Class labels: type, shape and range, wherever cross-entropy or accuracy reads them."""
    target, scored = batch.target, workload.metric is METRICS["accuracy"] and name != "train"
    if workload.loss is not cross_entropy and not scored:
        return
    reader = "accuracy" if workload.loss is not cross_entropy else "cross_entropy"
    if not isinstance(target, Tensor):
        raise BadInput(f"the labels of {name} are {type(target).__name__}", f"{reader} needs a tensor of class numbers")
    if target.is_floating_point():
        if target.shape[1:] == logits.shape[1:] and not scored:
            return  # soft labels
        form = f"{str(target.dtype)[6:]} of shape {list(target.shape)}"
        raise BadInput(f"the labels of {name} are {form}; {reader} needs class numbers, int64", "use labels.long()")
    if target.dtype != torch.int64:
        raise BadInput(f"the labels of {name} are {str(target.dtype)[6:]}; {reader} needs int64", "use labels.long()")
    if target.shape[1:] != logits.shape[1:-1]:
        expected = ["n", *logits.shape[1:-1]]
        remedy = f"give them the shape [{', '.join(map(str, expected))}], as with labels.squeeze(1)"
        raise BadInput(f"the labels of {name} have the shape {list(target.shape)}, the outputs [n, {_dims(logits)}]", remedy)
    outside = ((target < 0) | (target >= logits.shape[-1])) & (target != -100)
    if bool(outside.any()):
        place = outside.nonzero()[0]
        value, count, first = int(target[tuple(place)]), int(outside.sum()), int(batch.index[place[0]])
        problem = f"{count} labels of {name} are outside 0..{logits.shape[-1] - 1}, first {value} at example {first}"
        raise BadInput(problem, f"the model has {logits.shape[-1]} outputs; number the classes from 0, or widen its last layer")
    if len(target) > 1 and bool((target == target.flatten()[0]).all()):
        notes.append(f"all labels of {name} are {int(target.flatten()[0])}")


def _dims(t: Tensor) -> str:
    return ", ".join(map(str, t.shape[1:]))


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
