"""The contract of every method, as checks that any method can be put through, ours or a stranger's."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, Tree, call, resize, tensors
from quadriga.core.data import TensorData
from quadriga.core.errors import NotApplicable
from quadriga.core.method import SLOTS, Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors, Hook, Moment
from quadriga.testing.setups import MakeSetup, fingerprint, make_setups
from quadriga.train.loop import fit
from quadriga.train.outcome import Outcome
from quadriga.verify.promise import Witness

Check = Callable[[Method, Mapping[str, MakeSetup]], None]


def check_method(
    method: Method | type[Method],
    setups: Mapping[str, MakeSetup] | None = None,
    checks: Iterable[Check] | None = None,
) -> None:
    """Put a method through the contract.

    Args:
        method: an instance, or a class, which is tried where its search starts.
        setups: name → function that builds a fresh setup; by default tiny workloads of four kinds, untrained and
            trained. The method has to apply to at least one, or say why not everywhere.
        checks: by default all of `CHECKS`.

    Raises:
        AssertionError: a promise is not kept.
    """
    made = setups if setups is not None else make_setups()
    one = starting(method, made) if isinstance(method, type) else method
    for check in checks if checks is not None else CHECKS:
        check(one, made)


def starting(method: type[Method], setups: Mapping[str, MakeSetup]) -> Method:
    """The method where its search starts, with first choices; or one choice away, where only that does something."""
    first = {name: choices[0] for name, choices in method.search.items()}
    others = [{**first, name: choice} for name, choices in method.search.items() for choice in choices[1:]]
    for fields in (first, *others):
        one = method.parse(fields)
        for make in setups.values():
            try:
                one(make())
            except NotApplicable:
                continue
            return one
    return method.parse(first)


def applied(method: Method, setups: Mapping[str, MakeSetup]) -> Iterable[tuple[str, Setup, Setup]]:
    """(name, setup before, setup after) for every setup that the method takes."""
    for name, make in setups.items():
        before = make()
        kept = replace(before)
        try:
            yield name, kept, method(before)
        except NotApplicable:
            continue


def check_declaration(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """A frozen dataclass with a family, a numerics promise, a source, and a docstring that explains every field."""
    cls = type(method)
    own = cls.__dict__.get("__dataclass_params__")  # its own decorator, not one that it inherits
    assert own is not None and own.frozen, f"{cls.__name__} is not a frozen dataclass"
    assert isinstance(method.family, Family) and isinstance(method.numerics, Numerics)
    assert isinstance(method.source, str) and method.source.strip(), f"{method.name} names no source"
    assert set(method.writes) <= set(SLOTS)
    for facts in (method.requires, method.adds, method.removes):
        assert isinstance(facts, frozenset) and all(isinstance(f, str) for f in facts)
    about = inspect.cleandoc(cls.__doc__ or "")
    assert about and not about.startswith(cls.__name__ + "("), f"{method.name} has no docstring"
    assert "Source:" in about, f"{method.name}: the docstring names no Source:"
    for field in dataclasses.fields(cls):
        assert field.name in about.partition("Args:")[2], f"{method.name}.{field.name} is not explained under Args:"


def check_fields(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """Plain fields round-trip through `parse`, and every choice of `search` is a valid value."""
    given = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    assert type(method).parse(plain) == method
    assert set(method.search) <= set(given), (
        f"{method.name}.search names {set(method.search) - set(given)}, which are no fields"
    )
    for name, choices in method.search.items():
        assert choices, f"{method.name}.search has no choice for {name}"
        for choice in choices:
            type(method).parse({**plain, name: list(choice) if isinstance(choice, tuple) else choice})


def check_input_unchanged(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """The given setup keeps its slots; a method of another family than structure leaves the model as it is."""
    for name, make in setups.items():
        before = make()
        slots, model = {s: getattr(before, s) for s in SLOTS}, fingerprint(before.model)
        try:
            method(before)
        except NotApplicable:
            assert fingerprint(before.model) == model, f"{method.name} refused {name} after changing its model"
        assert all(getattr(before, s) is value for s, value in slots.items())
        if "model" not in {method.family.slot, *method.writes}:
            assert fingerprint(before.model) == model, f"{method.name} changed the model of {name}"


def check_slots(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """Only owned slots are written, the context stays, and the traits change as declared."""
    for name, before, after in applied(method, setups):
        written = {s for s in SLOTS if getattr(before, s) is not getattr(after, s)}
        assert written <= {method.family.slot, *method.writes}, f"{method.name} wrote {written} of {name}"
        assert after.context is before.context
        assert after.traits == (before.traits - method.removes) | method.adds


def check_interface(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """The model answers with the shapes and types that it had, at batch 1 and 2."""
    for name, make in setups.items():
        before = make()
        was = {n: shapes(before.model, before.context.example, n) for n in (1, 2)}
        try:
            after = method(before)
        except NotApplicable:
            continue
        for batch, expected in was.items():
            found = shapes(after.model, after.context.example, batch)
            assert found == expected, f"{method.name} on {name}: outputs {found} at batch {batch}, were {expected}"


def check_promise(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """One that promises equal outputs and writes the model gives them: on the example, and on random inputs."""
    if method.numerics is Numerics.CHANGED or "model" not in {method.family.slot, *method.writes}:
        return
    for name, make in setups.items():
        before = make()
        witness = Witness(before.model, before.context.example, method.numerics)
        try:
            problem = witness.broken(method(before).model)
        except NotApplicable:
            continue
        assert not problem, f"{method.name} on {name} promises {method.numerics} outputs: {problem}"


def shapes(model: nn.Module, example: Tree, batch: int) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and types of a model's outputs, in eval mode."""
    was = model.training
    with torch.no_grad():
        output = call(model.eval(), resize(example, batch))
    model.train(was)
    parts = tensors(output if isinstance(output, Tensor | tuple | list | Mapping) else tuple(output.values()))
    return [(tuple(t.shape), str(t.dtype)) for t in parts]


def check_frozen(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """What takes the place of a frozen parameter is frozen: of all but the last, no more can be learned than before."""
    for name, make in setups.items():
        setup = make()
        *frozen, last = setup.model.parameters()
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            after = method(setup)
        except NotApplicable:
            continue
        learned = sum(p.numel() for p in after.model.parameters() if p.requires_grad)
        assert learned <= last.numel(), f"{method.name} on {name}: {learned} weights are learned, {last.numel()} were"


def check_training_step(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """After the method, a step of training gives a finite loss and finite weights, and leaves the mode as it was."""
    for name, _, after in applied(method, setups):
        if "TRAIN_DATA" not in after.traits or not any(p.requires_grad for p in after.model.parameters()):
            continue
        was = after.model.training
        loss = one_step(after).loss
        assert math.isfinite(loss), f"{method.name} on {name}: the loss is {loss}"
        assert after.model.training == was


def one_step(setup: Setup, seed: int = 0, batch_size: int | None = None) -> Outcome:
    """One step on a calibration batch, or several on small parts of it; `torch.compile` is left out, it takes minutes."""
    batch = setup.context.calibration[0]
    small = replace(setup.training, batch_size=batch_size or len(batch))
    plain = replace(setup, training=small, runtime=replace(setup.runtime, compile=False, device="cpu"))
    return fit(plain, TensorData(batch.inputs, batch.target), epochs=1, seed=seed)


def check_deterministic(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """Applied to equal setups it gives equal models, and equal models after a step of training.

    One that adds NONDETERMINISTIC may train to other weights each time, and its outcomes have to say so.
    """
    if "NONDETERMINISTIC" in method.adds:
        check_says_so(method, setups)
    for name, make in setups.items():
        marks = []
        for noise in (1, 2):
            torch.manual_seed(noise)  # a method's randomness has to come from the context's seed
            try:
                after = method(make())
            except NotApplicable:
                break
            marks.append(fingerprint(after.model))
            if "TRAIN_DATA" in after.traits and any(p.requires_grad for p in after.model.parameters()):
                one_step(after)
                marks.append(fingerprint(after.model))
        assert marks[: len(marks) // 2] == marks[len(marks) // 2 :], f"{method.name} on {name}: equal seeds, unequal weights"


def check_says_so(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """Equal seeds and some steps in the first setup that it takes: equal weights, or both outcomes are marked as not exact."""
    found = []
    for name, _, after in applied(method, setups):
        if "TRAIN_DATA" not in after.traits:
            continue
        for one in (after, method(setups[name]())):
            outcome = one_step(one, batch_size=2)
            found.append((fingerprint(one.model), outcome.exact))
            assert math.isfinite(outcome.loss), f"{method.name} on {name}: the loss is {outcome.loss}"
        break
    marks, exact = zip(*found, strict=True) if found else ((), ())
    assert len(set(marks)) < 2 or not any(exact), (
        f"{method.name}: equal seeds, unequal weights, and the outcome does not say so"
    )


def check_refusals(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """It applies somewhere, or a reason says why not; what it refuses has a reason that is not empty."""
    reasons = {}
    for name, make in setups.items():
        try:
            method(make())
        except NotApplicable as refusal:
            assert refusal.reason.strip(), f"{method.name} refuses {name} without a reason"
            reasons[name] = str(refusal)
    absent = method.family is Family.HARDWARE  # a backend may not be installed, or the processor may lack it
    assert absent or len(reasons) < len(setups), f"{method.name} applies to none of the setups: {reasons}; give setups="


def check_wraps(method: Method, setups: Mapping[str, MakeSetup]) -> None:
    """What stood in the training and optimizer slots before still acts: wrapped or joined, never replaced."""
    for make in setups.values():
        setup, seen = watched(make())
        try:
            after = method(setup)
        except NotApplicable:
            continue
        if {method.family.slot, *method.writes} & {"training", "optimizer"} and "TRAIN_DATA" in after.traits:
            one_step(after)
            missing = {"loss", "transform", "schedule", "hook", "optimizer"} - seen
            assert not missing, f"{method.name} dropped what stood there before it: {', '.join(sorted(missing))}"


def watched(setup: Setup) -> tuple[Setup, set[str]]:
    """The setup with a loss, transform, schedule, hook and optimizer that note when they act."""
    seen: set[str] = set()
    inner_loss, inner_make = setup.training.loss, setup.optimizer.make

    def loss(output: Tree, batch: Batch) -> Tensor:
        seen.add("loss")
        return inner_loss(output, batch)

    def transform(batch: Batch, moment: Moment) -> Batch:
        seen.add("transform")
        return batch

    def schedule(progress: float) -> Factors:
        seen.add("schedule")
        return Factors()

    class Noting(Hook):
        def after_step(self, model: nn.Module, progress: float) -> None:
            seen.add("hook")

    def make(model: nn.Module) -> Any:
        seen.add("optimizer")
        return inner_make(model)

    training = replace(
        setup.training, loss=loss, transforms=(transform,), schedules=(schedule,), make_hooks=(lambda model: Noting(),)
    )
    return replace(setup, training=training, optimizer=replace(setup.optimizer, make=make)), seen


CHECKS: tuple[Check, ...] = (
    check_declaration,
    check_fields,
    check_input_unchanged,
    check_slots,
    check_interface,
    check_promise,
    check_frozen,
    check_training_step,
    check_deterministic,
    check_refusals,
    check_wraps,
)
