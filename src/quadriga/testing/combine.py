"""Do these methods, in this order, work together on this network? Applied, run, trained a step, exported, run again."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from quadriga import runtime
from quadriga.core.batch import Tree, call, evaluating, tensors
from quadriga.core.errors import NotApplicable
from quadriga.core.recipe import Recipe
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.engine.walk import walk
from quadriga.testing.contract import one_step, shapes
from quadriga.testing.setups import fingerprint

WORKS, REFUSED, FAILS = "works", "refused", "fails"
OTHERS = ("onnxruntime", "openvino")  # where a recipe chose no runtime and eager refuses


@dataclass(frozen=True)
class Outcome:
    """How a combination ended.

    Args:
        status: "works", "refused" (by a method or a runtime, with a reason, before any training) or "fails".
        at: the method that refused; else "apply", "outputs", "step" or "export".
        reason: of the refusal or failure.
        parameters: of the finished network; 0 unless it works.
    """

    status: str
    at: str = ""
    reason: str = ""
    parameters: int = 0


class Combiner:
    """Tries recipes without `train` steps on one trained workload; equal networks are exported once.

    Args:
        workload: with `trained=True`, small.
        services: of the context, such as `time`; gradients are there.
        export: whether to realise the result in its runtime; where no step chose one, in eager, or else in another
            that takes it (static int8 needs one).
    """

    def __init__(self, workload: Workload, services: Mapping[str, Any] | None = None, *, export: bool = True) -> None:
        self.workload, self.services, self.export = workload, dict(services or {}), export
        self.was = {n: shapes(workload.build(0), workload.example, n) for n in (1, 2)}
        self._exported: dict[str, Outcome] = {}

    def __call__(self, recipe: Recipe) -> Outcome:
        """Apply every step, then check outputs, a step of training, and the export. Never raises."""
        try:
            setup = walk(self.workload, recipe, seed=0, store=None, services=self.services).setup
        except NotApplicable as refusal:
            at = (getattr(refusal, "__notes__", None) or ["recipe"])[-1]
            told = refusal.reason.strip()
            return Outcome(REFUSED, at, str(refusal)) if told else Outcome(FAILS, at, "it refuses without a reason")
        except Exception as error:  # whatever it raises is what this looks for
            return Outcome(FAILS, "apply", _brief(error))
        return self._checked(setup)

    def _checked(self, setup: Setup) -> Outcome:
        stages: list[tuple[str, Callable[[], Outcome | None]]] = [
            ("outputs", lambda: self._outputs(setup)),
            ("export", lambda: self._export(setup) if self.export else None),
            ("step", lambda: self._step(setup)),  # the last, since it changes the weights
        ]
        count = sum(p.numel() for p in setup.model.parameters())
        for name, stage in stages:
            try:
                outcome = stage()
            except Exception as error:
                return Outcome(FAILS, name, _brief(error))
            if outcome is not None:
                return outcome
        return Outcome(WORKS, parameters=count)

    def _outputs(self, setup: Setup) -> Outcome | None:
        now = {n: shapes(setup.model, self.workload.example, n) for n in (1, 2)}
        if now != self.was:
            return Outcome(FAILS, "outputs", f"outputs {now}, were {self.was}")
        return None if finite(setup.model, self.workload.example) else Outcome(FAILS, "outputs", "outputs are not finite")

    def _step(self, setup: Setup) -> Outcome | None:
        if not any(p.requires_grad for p in setup.model.parameters()):
            return None
        try:
            loss = one_step(setup).loss
        except NotApplicable as refusal:
            return Outcome(REFUSED, (getattr(refusal, "__notes__", None) or ["step"])[-1], str(refusal))
        if math.isfinite(loss) and finite(setup.model, self.workload.example):
            return None
        return Outcome(FAILS, "step", f"after one step the loss is {loss}")

    def _export(self, setup: Setup) -> Outcome | None:
        found = self._realized(setup)
        for name in () if "RUNTIME" in setup.traits else OTHERS:
            if found.status == REFUSED:
                found = self._realized(replace(setup, runtime=replace(setup.runtime, name=name)))
        return None if found.status == WORKS else found

    def _realized(self, setup: Setup) -> Outcome:
        key = f"{fingerprint(setup.model)} {replace(setup.runtime, compile=False)}"
        if key not in self._exported:
            self._exported[key] = _exported(setup, self.workload.inputs(2))
        return self._exported[key]


def _exported(setup: Setup, inputs: Tree) -> Outcome:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        try:
            built = runtime.build(setup.model.eval(), setup.runtime, setup.context, folder, (1, 2))
        except NotApplicable as refusal:
            return Outcome(REFUSED, setup.runtime.name, str(refusal))
        outputs = tensors(built.run()(inputs))
    good = all(bool(t.isfinite().all()) for t in outputs if t.is_floating_point())
    return Outcome(WORKS) if good else Outcome(FAILS, "export", "exported outputs are not finite")


def finite(model: nn.Module, inputs: Tree) -> bool:
    """Whether all outputs are, in evaluation mode."""
    with evaluating(model), torch.no_grad():
        return all(bool(t.isfinite().all()) for t in tensors(call(model, inputs)) if t.is_floating_point())


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[0][:300]}"
