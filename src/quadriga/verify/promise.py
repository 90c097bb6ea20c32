"""Equal outputs, held to where a step is applied: what a model gave before, and whether it still gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Tree, call, copied, device_of, evaluating, to_device, tree_map
from quadriga.core.copies import copy_model
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Method, Numerics
from quadriga.core.rng import isolated, seed_all
from quadriga.core.setup import PROBE, Setup
from quadriga.verify.equal import TOLERANCE, equal

REMEDY = "leave the step out; a layer that computes something of its own may stand in the way"


def hold(method: Method, setup: Setup) -> Setup:
    """Apply a method, and hold it to what its numerics promise of the model's outputs.

    A method that promises equal outputs and writes the model is checked on the example and on random inputs; where the weights
    or statistics are fresh also on a copy whose norms have random gains and statistics, since those hide what is left out.

    Args:
        setup: as the method finds it; its model may be changed in place.

    Raises:
        NotApplicable: the method refuses, or the outputs are others; then the model is as it was.
    """
    if method.numerics is Numerics.CHANGED or "model" not in {method.family.slot, *method.writes}:
        return method(setup)
    example = setup.context.example
    untrained = "TRAINED" not in setup.traits or PROBE in setup.traits
    stirred = stirred_copy(setup.model) if untrained or _fresh(setup.model) else None
    was, witness = _State(setup.model), Witness(setup.model, example, method.numerics)
    after = method(setup)
    problem = witness.broken(after.model)
    if not problem and stirred is not None:
        problem = _problem_on(stirred, method, setup)
    if problem:
        was.restore()
        raise NotApplicable(f"{method.name} promises {method.numerics} outputs, and they are others: {problem}", REMEDY)
    return after


def _problem_on(model: nn.Module, method: Method, setup: Setup) -> str:
    witness = Witness(model, setup.context.example, method.numerics)
    try:
        return witness.broken(method(replace(setup, model=model)).model)
    except NotApplicable:  # which says nothing of the step on the model itself
        return ""


class Witness:
    """What a model gives on its example and on random inputs like it, in evaluation mode.

    Args:
        model: is called once; its state and the generators of random numbers are as before.
        example: inputs of some examples.
        numerics: EXACT or CLOSE.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> witness = Witness(net, torch.ones(2, 2))
        >>> witness.broken(net), witness.broken(nn.Linear(2, 2))[:20]
        ('', 'output at batch 4: e')
    """

    def __init__(self, model: nn.Module, example: Tree, numerics: Numerics = Numerics.CLOSE) -> None:
        self.numerics, self.compute = numerics, _compute_type(model)
        self.inputs, self.failure = _with_random(example), ""
        try:
            self.outputs = answer(model, self.inputs)
        except Exception:  # inputs that this forward does not stand: indices in an order, a mask with holes
            self.inputs = example
            self.outputs = answer(model, example)

    def broken(self, model: nn.Module) -> str:
        """How the model's outputs are others than those seen, for people; "" where they are equal.

        A model whose forward draws random numbers cannot be held to any output: "" too.
        """
        try:
            found = answer(model, self.inputs)
        except Exception as error:  # whatever the changed model's forward raises
            return f"the forward fails: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        problem = self._differs(self.outputs, found)
        if problem and self._differs(found, answer(model, self.inputs, seed=1)):
            return ""
        return problem

    def _differs(self, expected: Tree, found: Tree) -> str:
        given = equal(
            lambda _: expected, lambda _: found, self.inputs,
            numerics=self.numerics, compute=self.compute, batches=(_rows(self.inputs),),
        )  # fmt: skip
        return given.failures[0] if given.failures else ""


def answer(model: nn.Module, inputs: Tree, seed: int = 0) -> Tree:
    """The outputs in evaluation mode. Buffers and generators are given back, and the inputs are not written into."""
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    given = to_device(copied(inputs), device_of(model))
    try:
        with isolated(), evaluating(model), torch.no_grad():
            seed_all(seed)
            return tree_map(lambda t: t.detach().clone(), call(model, given))
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


def stirred_copy(model: nn.Module) -> nn.Module | None:
    """A copy whose constant vectors (fresh gains, biases, running statistics) are random; None where there are none.

    Example:
        >>> norm = nn.BatchNorm1d(3).eval()
        >>> bool((norm.running_var == 1).all()), bool((stirred_copy(norm).running_var == 1).any())
        (True, False)
    """
    if not any(_constant(t) for t in (*model.parameters(), *model.buffers())):
        return None
    copy, generator = copy_model(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*copy.parameters(), *copy.buffers()):
            if _constant(tensor):
                noise = torch.rand(tensor.shape, generator=generator).to(tensor)
                size = float(tensor.flatten()[0].abs())
                tensor.add_((noise - 0.5) * (size or 0.2))  # a variance of 1 becomes 0.5 to 1.5, a mean of 0 up to ±0.1
    return copy


def _fresh(model: nn.Module) -> bool:
    """Whether a norm has the statistics that it was made with."""
    found = (m._buffers.get("running_var") for m in model.modules())
    return any(v is not None and bool((v == 1).all()) for v in found)


def _constant(tensor: Tensor) -> bool:
    vector = tensor.dim() == 1 and tensor.numel() > 1 and tensor.is_floating_point()
    return vector and bool((tensor == tensor[0]).all())


def _with_random(example: Tree) -> Tree:
    """The example and as many random rows: numbers of the same mean and spread, within its range; indices shuffled."""
    generator = torch.Generator().manual_seed(0)

    def double(t: Tensor) -> Tensor:
        if not t.dim():
            return t
        if not t.is_floating_point():
            order = torch.randperm(t.numel(), generator=generator).to(t.device)
            return torch.cat([t, t.flatten()[order].view(t.shape)])
        if not bool(t.isfinite().all()):  # a mask that is added
            return torch.cat([t, t])
        spread = float(t.float().std()) if t.numel() > 1 else 0.0
        drawn = torch.randn(t.shape, generator=generator).to(t) * (spread or 1.0) + t.mean()
        return torch.cat([t, drawn.clamp(t.min(), t.max()) if spread else drawn])

    return tree_map(double, example)


def _rows(inputs: Tree) -> int:
    sizes: list[int] = []
    tree_map(lambda t: sizes.append(len(t) if t.dim() else 1), inputs)
    return max(sizes, default=1)


def _compute_type(model: nn.Module) -> str:
    """The coarsest type of its weights; TF32 where a GPU may use it."""
    order = list(TOLERANCE)
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()} & set(order)
    coarsest = max(found, key=order.index, default="float32")
    fast = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return "tf32" if coarsest == "float32" and device_of(model).type == "cuda" and fast else coarsest


class _State:
    """Modules, fields and values of a model, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        held = {id(t): t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
        self.values = [(t, t.data, t.detach().clone()) for t in held.values()]
        self.modules = [(m, type(m), [_field(*entry) for entry in vars(m).items()]) for m in model.modules()]

    def restore(self) -> None:
        """Put everything back."""
        for module, cls, fields in self.modules:
            module.__class__ = cls
            vars(module).clear()
            for name, value, entries in fields:
                if entries is not None:  # the table itself stays, since handles of hooks know it
                    value.clear()
                    value.update(entries)
                vars(module)[name] = value
        for tensor, storage, value in self.values:
            storage.copy_(value)
            tensor.data = storage


def _field(name: str, value: Any) -> tuple[str, Any, dict[Any, Any] | None]:
    return name, value, dict(value) if isinstance(value, dict) else None
