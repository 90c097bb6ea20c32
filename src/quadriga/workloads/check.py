"""Look a workload over before any time is spent on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, Tree, call, named, primary, resize, tensors, tree_map
from quadriga.core.copies import caches, unwrapped, without_cache, wrappers
from quadriga.core.data import Data, TensorData
from quadriga.core.errors import BadInput
from quadriga.core.workload import Workload
from quadriga.workloads.behaviour import only_read, refuse_writer, seeded, unwritten, well_behaved
from quadriga.workloads.labels import labels, unseen
from quadriga.workloads.layouts import dense, dense_model
from quadriga.workloads.outputs import predictions
from quadriga.workloads.overlap import apart
from quadriga.workloads.place import told
from quadriga.workloads.scoring import metric_works
from quadriga.workloads.splits import finite, sample, take

SMALLEST_VAL = 20
CHECKING = {"stage": "check", "text": "a few batches through model, loss and metric, and a look at every example"}  # progress


def check(workload: Workload) -> list[str]:
    """Run a few batches through everything that the user gave, and scan the data that is in memory.

    The workload is not changed: a copy of the model is used, in eval mode but for one batch. Of `test`, inputs and labels
    are scanned; the model never sees it.

    Returns:
        Notes: what is worth knowing but does not stand in the way.

    Raises:
        BadInput: what cannot work, with the value, the reason and the remedy.
    """
    splits = {n: d for n in ("train", "val", "test") if (d := getattr(workload, n)) is not None}
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notes = _sizes(workload)
        for name, data in splits.items():
            dense(f"an input of {name}", data.inputs if isinstance(data, TensorData) else ())
        samples = {name: sample(name, data) for name, data in splits.items()}
        for name, batch in samples.items():
            take(name, splits[name], torch.arange(min(2, len(splits[name]))))
            dense(f"an input of {name}", batch.inputs)
            finite(name, batch)
        model = _build(workload, notes)
        output, batch = _outputs(model, workload, notes)
        for name, part in samples.items():
            labels(name, part, primary(output), workload, notes)
        unseen(samples, notes)
        _loss(model, workload)
        metric_works(workload, output, batch)
        return notes + _loaders(workload, splits) + apart(splits)


def _sizes(workload: Workload) -> list[str]:
    count = len(workload.val)
    if count < SMALLEST_VAL:
        raise BadInput(f"val has {count} examples", f"give at least {SMALLEST_VAL}; the search compares candidates on it")
    notes = (
        [f"val has only {count} examples: candidates that differ by less than {100 / count:.1f} % look alike"]
        if count < 200
        else []
    )
    if workload.train is not None and len(workload.train) < workload.batch_size:
        notes.append(f"train has {len(workload.train)} examples, fewer than the batch size {workload.batch_size}")
    return notes


def _loaders(workload: Workload, splits: Mapping[str, Data]) -> list[str]:
    """What is not as in the user's own loaders."""
    notes = [text for data in splits.values() for text in data.notes]
    size = getattr(workload.train, "batch_size", None)
    if size not in (None, workload.batch_size):
        notes.append(f"train: its loader has batches of {size}; training has the workload's batch_size, {workload.batch_size}")
    return notes


def _build(workload: Workload, notes: list[str]) -> nn.Module:
    if isinstance(workload.model, nn.Module):
        dense_model(workload.model)  # such a tensor cannot be copied either
    try:
        given = workload.given()
        if names := wrappers(given):
            notes.append(f"the model is wrapped by {' and '.join(names)}: what it wraps is measured and changed, as it is")
        model = unwrapped(given)
        if caches(model) and _returns_cache(model, workload):
            notes.append("use_cache of the model's configuration is turned off: no export returns a cache")
        model = without_cache(model)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"the model cannot be built: {told(error)}", "correct it there") from error
    dense_model(model)
    if workload.train is not None and not any(p.requires_grad for p in model.parameters()):
        count = len(list(model.parameters()))
        remedy = "set requires_grad, or give trained=True and no train data"
        raise BadInput(f"the model has nothing to train: {count} parameters, none requires a gradient", remedy)
    return model


def _returns_cache(model: nn.Module, workload: Workload) -> bool:
    try:
        with torch.no_grad():
            entries = named(call(model.eval(), workload.inputs(1)))
    except Exception:  # what is wrong with it is found, and said, later
        return False
    return entries is not None and entries.get("past_key_values") is not None


def _outputs(model: nn.Module, workload: Workload, notes: list[str]) -> tuple[Tree, Batch]:
    """The outputs for a batch of val, after trying one example, two and a batch."""
    model.eval()
    count = min(len(workload.val), max(workload.batch_size, 128))
    batch = take("val", workload.val, torch.arange(count) * len(workload.val) // count)  # spread, for data sorted by class
    for size in (2, 1, workload.batch_size):
        _forward(model, resize(batch.inputs, size), size)
    output = _forward(model, batch.inputs, count)
    predictions(output, workload, notes)
    well_behaved(model, batch.inputs, notes)
    return output, batch


def _forward(model: nn.Module, inputs: Tree, size: int) -> Tree:
    shapes = ", ".join(str(list(t.shape)) for t in tensors(inputs))
    try:
        with torch.no_grad():
            output = call(model, inputs)
        first = primary(output)
    except TypeError as error:
        if "holds no tensor" in str(error):
            raise BadInput(str(error), "return logits, a tuple or a dict of tensors") from error
        raise BadInput(
            f"the model cannot be called with inputs {shapes}: {told(error)}", "match inputs and forward()"
        ) from error
    except Exception as error:
        problem = f"the model fails on inputs {shapes}: {told(error)}"
        raise BadInput(problem, _advice(model, inputs, error)) from error
    if first.dim() == 0 or len(first) != size:
        raise BadInput(f"the model returned {list(first.shape)} for {size} examples", "its output needs one row per example")
    if first.is_floating_point() and not bool(torch.isfinite(first).all()):
        bad = int((~torch.isfinite(first)).sum())
        raise BadInput(
            f"the model's output has {bad} of {first.numel()} values NaN or infinite", "check its weights and the inputs' scale"
        )
    return output


def _advice(model: nn.Module, inputs: Tree, error: Exception) -> str:
    if "more than 1 value per channel when training" in str(error):
        return "let norms use running statistics in eval mode: track_running_stats=True, and no train() in a forward"
    prepare = "prepare_decoder_input_ids_from_labels"
    if isinstance(inputs, Mapping) and hasattr(model, prepare) and "decoder_input_ids" not in inputs:
        return f"give decoder_input_ids beside the labels, as model.{prepare}(labels) makes them"
    return "match the model and the shape of the data"


def _loss(model: nn.Module, workload: Workload) -> None:
    """The loss of one batch, in training mode where there is training; model is a copy."""
    training = workload.train is not None
    name, data = ("train", workload.train) if training else ("val", workload.val)
    batch = take(name, data, torch.arange(min(len(data), workload.batch_size)))
    model.train(training)
    try:
        with torch.set_grad_enabled(training), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")
            with unwritten(batch.inputs) as written:
                output = call(model, batch.inputs)
            if written:
                refuse_writer(model, resize(batch.inputs, 2), " in training mode")
            loss = only_read("the loss", partial(_loss_of, workload, batch), output=output, target=batch.target)
    except BadInput:
        raise
    except UserWarning as error:
        problem = f"the loss broadcasts outputs and targets of different shapes: {str(error).split('. ')[0]}"
        raise BadInput(problem, _same_shape(output, batch.target)) from error
    except Exception as error:
        raise BadInput(
            f"the loss fails on the first batch of {name}: {told(error)}", "match outputs, targets and loss"
        ) from error
    finally:
        model.eval()
    if not isinstance(loss, Tensor):
        raise BadInput(f"the loss returned {loss!r:.60}, a {type(loss).__name__}", "return a tensor, [batch] or a scalar")
    if loss.shape not in (batch.index.shape, torch.Size([])):
        remedy = "return [batch] values or their mean"
        raise BadInput(f"the loss has the shape {list(loss.shape)} for {len(batch)} examples", remedy)
    if not bool(torch.isfinite(loss).all()):
        raise BadInput(
            f"the loss of the first batch of {name} is {float(loss.detach().mean())}", "check targets and the outputs' scale"
        )
    if training and not loss.requires_grad:
        raise BadInput("the loss does not depend on the parameters", "remove detach(), no_grad() or argmax from model and loss")
    _broadcast(model, workload, name, batch)


def _same_shape(output: Tree, target: Tree) -> str:
    first = primary(output)
    if not isinstance(target, Tensor) or target.numel() != first.numel():
        return "give both the same shape"
    return f"give both the same shape, as with target.reshape({', '.join(map(str, (-1, *first.shape[1:])))})"


def _loss_of(workload: Workload, batch: Batch, output: Tree, target: Tree) -> Any:
    return workload.loss(output, replace(batch, target=target))


def _broadcast(model: nn.Module, workload: Workload, name: str, batch: Batch) -> None:
    """Targets [n] against outputs [n, 1] silently become [n, n]: then the loss of four is not that of each."""
    with torch.no_grad():
        output = primary(call(model, batch.inputs))
        target = batch.target
        if not isinstance(target, Tensor) or output.shape == target.shape or output.numel() != target.numel():
            return
        parts = [_rows(batch, slice(i, i + 1)) for i in range(min(4, len(batch)))]
        each = torch.stack([workload.loss(call(model, b.inputs), b).mean() for b in parts])
        few = _rows(batch, slice(0, len(parts)))
        joint = workload.loss(call(model, few.inputs), few)
    allowed = [each] if joint.dim() else [each.mean(), each.sum()]
    if not any(torch.allclose(joint, a, rtol=1e-3, atol=1e-5) for a in allowed):
        problem = f"outputs {list(output.shape)} and targets {list(target.shape)} of {name} are broadcast in the loss"
        raise BadInput(problem, _same_shape(output, target))


def _rows(batch: Batch, rows: slice) -> Batch:
    return Batch(tree_map(lambda t: t[rows], batch.inputs), tree_map(lambda t: t[rows], batch.target), batch.index[rows])
