"""One network of timm under one test: equal exports, folding, pruning, low rank, int8. Used by `timm_networks.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from networks.of_timm import load_timm
from torch import Tensor, nn

from quadriga import runtime
from quadriga.core.batch import call, evaluating, tensors
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Numerics
from quadriga.core.norms import BATCH_NORMS, reestimate
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.engine.walk import walk
from quadriga.methods.hardware._simulate import products, roundings, simulated, watch
from quadriga.verify.equal import equal
from quadriga.verify.promise import stirred_copy

LARGEST = 60e6  # parameters
SIZES = (64, 96, 128, 160, 192, 224, 256)  # of the image, the first that the network takes
CLASSES, BATCHES, EXAMPLES = 10, (1, 2, 3), 16
INT8_ERROR = 0.5  # ‖int8 − float‖ / ‖float‖, centred over the examples, that needs no explanation
TIMES_SIMULATED = 3  # more than that many times what rounding in float says is wrong; ONNX Runtime rounds the terms of sums too
Result = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """A network and how it is called.

    Args:
        name: in timm.
        size: of its images, height and width.
        given: whether its constructor is told the size.
        parameters: with ten classes.
    """

    name: str
    size: int
    given: bool
    parameters: int


def choose(module: str) -> Choice:
    """The smallest network of a module of timm's, at the smallest image that it takes.

    Raises:
        NotApplicable: none is below the limit, or runs.
    """
    timm = load_timm()
    counts = {name: _count(timm, name) for name in timm.list_models(module=module)}
    small = sorted((n, name) for name, n in counts.items() if n is not None and n <= LARGEST)
    reasons = []
    for count, name in small[:3]:
        default = timm.get_pretrained_cfg(name).input_size[-1]
        for size in (*SIZES, default):
            for given in (False, True):
                choice = Choice(name, size, given, count)
                try:
                    _tried(choice)
                    return choice
                except Exception as error:  # whatever a constructor or forward raises at that size
                    reasons.append(f"{name} at {size}: {_brief(error)}")
    raise NotApplicable("; ".join(reasons[-2:]) or f"none of {len(counts)} has fewer than {LARGEST:.0f} parameters")


def _count(timm: Any, name: str) -> int | None:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, pretrained=False, num_classes=CLASSES).parameters())
    except Exception:  # a constructor that computes with its tensors
        return None


def _tried(choice: Choice) -> None:
    model, x = _created(choice), _images(8, choice.size, 0)
    with torch.no_grad():
        model.train()(x)
        out = model.eval()(x[:2])
    if not isinstance(out, Tensor) or not bool(out.isfinite().all()):
        raise ValueError(f"it returns {type(out).__name__}, or numbers that are not finite")


def _created(choice: Choice) -> nn.Module:
    size = {"img_size": choice.size} if choice.given else {}
    torch.manual_seed(0)
    return load_timm().create_model(choice.name, pretrained=False, num_classes=CLASSES, **size)


def _images(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def network(choice: Choice) -> nn.Module:
    """Random weights without zero matrices or constant vectors, and statistics of random images, disturbed."""
    model, generator = _created(choice), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and not bool(p.any()):
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
        model = stirred_copy(model) or model
        setup = _setup_data(choice)
        reestimate(model, [setup])
        for module in model.modules():
            if isinstance(module, BATCH_NORMS) and module.running_var is not None:
                noise = [torch.rand(module.running_var.shape, generator=generator) for _ in range(2)]
                module.running_mean.add_((noise[0] - 0.5) * module.running_var.sqrt())
                module.running_var.mul_(0.7 + 0.6 * noise[1]).clamp_(min=1e-6)
    return model.eval()


def _setup_data(choice: Choice) -> Any:
    from quadriga.core.batch import Batch

    return Batch(_images(8, choice.size, 2), None, torch.arange(8))


def workload(choice: Choice) -> Workload:
    """Random images and classes for it; it passes as trained."""
    x, y = _images(EXAMPLES, choice.size, 3), torch.arange(EXAMPLES) % CLASSES
    return Workload(
        model=network(choice), train=(x, y), val=(x, y), test=(x, y), batch_size=8, trained=True, name=f"timm_{choice.name}"
    )


class Cells:
    """The tests of one network, each by name: → {"status", "reason", "number"}.

    A test works, is refused with a reason, or is wrong; whatever it raises else is a crash.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice, self.workload = choice, workload(choice)
        self.before = self.workload.build(0).eval()
        self.inputs = _images(3, choice.size, 4)

    def run(self, name: str) -> Result:
        """One test."""
        try:
            return TESTS[name](self)
        except NotApplicable as refusal:
            reason = " ".join(str(refusal).split())
            return {"status": "refused" if refusal.reason.strip() else "wrong", "reason": reason or "refused without a reason"}
        except Exception as error:
            return {"status": "crashed", "reason": _brief(error)}

    def exported(self, name: str) -> Result:
        """The unchanged network in a runtime."""
        setup = self.walked(step(name))
        return self.equal_export(setup.model, setup)

    def changed(self, method: str, **fields: Any) -> Result:
        """A structure method: as many outputs, finite, the export equal; the number is the share of parameters left."""
        setup = self.walked(step(method, **fields))
        for batch in BATCHES:
            found, was = (self._outputs(m, batch) for m in (setup.model, self.before))
            if [t.shape for t in found] != [t.shape for t in was] or not all(bool(t.isfinite().all()) for t in found):
                return {"status": "wrong", "reason": f"outputs at batch {batch} are of another shape, or not finite"}
        result = self.equal_export(setup.model, self.walked_to(setup))
        count = sum(p.numel() for p in setup.model.parameters()) / sum(p.numel() for p in self.before.parameters())
        return {**result, "number": round(count, 3)}

    def folded(self) -> Result:
        """Equal outputs on other images than the method saw; the number is the share of normalizations that stay."""
        setup = self.walked(step("fold_batchnorm"))
        found = equal(self._caller(self.before), self._caller(setup.model), self.inputs, batches=BATCHES)
        norms = [sum("running_mean" in m._buffers for m in model.modules()) for model in (setup.model, self.before)]
        if not found.holds:
            return {"status": "wrong", "reason": found.failures[0]}
        return {"status": "works", "reason": "", "number": round(norms[0] / norms[1], 3)}

    def int8(self) -> Result:
        """Static int8 in ONNX Runtime; the number is the error of the outputs, centred, as a share.

        Random weights stand rounding badly. So a large error is held against layers that round in float, in PyTorch.
        """
        setup = self.walked(step("quantize_int8", activations="static"), step("onnxruntime"))
        with tempfile.TemporaryDirectory() as folder:
            run = runtime.build(setup.model, setup.runtime, setup.context, folder, BATCHES).run()
            found, was = (tensors(run(self.inputs))[0], self._outputs(self.before, 3)[0])
        if found.shape != was.shape or not bool(found.isfinite().all()):
            return {"status": "wrong", "reason": "outputs are of another shape, or not finite"}
        error = _centred(found, was)
        result: Result = {"status": "works", "reason": "", "number": round(error, 3)}
        if error > INT8_ERROR:
            expected = result["simulated"] = round(_centred(self._rounded(setup), was), 3)
            if error > TIMES_SIMULATED * expected:
                result |= {"status": "wrong", "reason": f"error {error:.2g}, where rounding in float gives {expected:.2g}"}
        return result

    def _rounded(self, setup: Setup) -> Tensor:
        """The outputs with every linear and convolution layer rounding its weight and input to 8 bits."""
        model, batches = setup.model, setup.context.calibration
        layers = roundings(watch(model, list(products(model)), batches), "static")
        with simulated(model, layers):
            return self._outputs(model, 3)[0]

    def walked(self, *steps: Any) -> Setup:
        """The setup behind these steps, applied as a study applies them."""
        return walk(self.workload, Recipe(steps), seed=0, store=None).setup

    def walked_to(self, setup: Setup) -> Setup:
        """The setup with ONNX Runtime as its runtime."""
        return replace(setup, runtime=replace(setup.runtime, name="onnxruntime"))

    def equal_export(self, model: nn.Module, setup: Setup) -> Result:
        """Whether the setup's runtime gives what the model gives, on other images, at batch 1, 2 and 3."""
        with tempfile.TemporaryDirectory() as folder:
            built = runtime.build(model.eval(), setup.runtime, setup.context, folder, BATCHES)
            found = equal(self._caller(model), built.run(), self.inputs, numerics=Numerics.CLOSE, batches=BATCHES)
        if not found.holds:
            return {"status": "wrong", "reason": f"{setup.runtime.name}: {found.failures[0]}"}
        return {"status": "works", "reason": "", "number": float(f"{found.max_rel:.1g}")}

    def _outputs(self, model: nn.Module, batch: int) -> list[Tensor]:
        return tensors(self._caller(model)(self.inputs[:batch]))

    def _caller(self, model: nn.Module) -> Callable[[Any], Any]:
        def run(inputs: Any) -> Any:
            with torch.no_grad(), evaluating(model):
                return call(model, inputs)

        return run


TESTS: dict[str, Callable[[Cells], Result]] = {
    "onnxruntime": lambda c: c.exported("onnxruntime"),
    "openvino": lambda c: c.exported("openvino"),
    "fold_batchnorm": Cells.folded,
    "prune_channels": lambda c: c.changed("prune_channels"),
    "prune_blocks": lambda c: c.changed("prune_blocks"),
    "prune_heads": lambda c: c.changed("prune_heads"),
    "prune_hidden": lambda c: c.changed("prune_hidden"),
    "low_rank": lambda c: c.changed("low_rank", ratio=0.5),
    "static_int8": Cells.int8,
}


def _centred(found: Tensor, was: Tensor) -> float:
    return float((found - was).norm() / (was - was.mean(0)).norm().clamp_min(1e-12))


def _brief(error: BaseException) -> str:
    text = (str(error).strip() or "(no message)").splitlines()[0]
    return f"{type(error).__name__}: {text}"[:300]
