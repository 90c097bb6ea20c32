"""Training steps of a convolutional network on an OpenCL device, by tinygrad's derivatives of PyTorch's operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.quiet import quiet
from quadriga.runtime._capture import reason
from quadriga.runtime._opencl_ops import ELSEWHERE, OPERATIONS, Array
from quadriga.runtime.standalone import opencl


class Trainer:
    """Train a classifier on the OpenCL device: forward, mean cross entropy, backward, SGD with momentum.

    Weights, momenta and running statistics stay on the device; kernels are compiled at the first step of each batch size and
    recorded at the second. One step equals one of `torch.optim.SGD` with `cross_entropy`, up to the rounding of float32.

    Args:
        model: float32 on the CPU, one tensor to logits [batch, classes]; trained in the mode that it is in, and not changed.
        example: inputs [batch >= 2, ...]; every other dimension stays as it is.
        lr: learning rate, > 0.
        momentum: in [0, 1).
        decay: of weights, added to the gradient as decay · weight.

    Raises:
        BadInput: a bad number, or an example of fewer than two.
        NotApplicable: no OpenCL device, or an operation that has no form here, such as dropout; the reason names it.

    Source: docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, lr: float, momentum: float = 0.0, decay: float = 0.0) -> None:
        _check(model, example, lr, momentum, decay)
        self.lr, self.momentum, self.decay = lr, momentum, decay
        self._program = _exported(model, example)
        _device()
        self._names = {**self._program.graph_signature.inputs_to_parameters, **self._program.graph_signature.inputs_to_buffers}
        state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        self._state = {name: opencl.to_cl(state[name].detach()) for name in self._names.values()}
        learned = [name for name, p in model.named_parameters() if p.requires_grad and name in self._state]
        self._momenta = {name: opencl.to_cl(torch.zeros_like(state[name])) for name in learned}
        self._steps: dict[torch.Size, Any] = {}
        opencl.on_cl(self._forward, opencl.to_cl(example))  # nothing is computed: what is refused, is refused here

    def step(self, inputs: Tensor, target: Tensor) -> float:
        """Learn from one batch, and return its mean loss before that.

        Args:
            inputs: [batch, ...] float32.
            target: [batch] int64, class numbers.
        """
        from tinygrad import TinyJit

        made = self._steps.setdefault(inputs.shape, TinyJit(self._step))
        loss = opencl.on_cl(made, opencl.to_cl(inputs), opencl.to_cl(target.int()))
        return float(opencl.from_cl(loss))

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and running statistics as copies on the CPU, for the model's `load_state_dict(strict=False)`."""
        return {name: opencl.from_cl(x) for name, x in self._state.items()}

    def _step(self, inputs: Array, target: Array) -> Array:
        """One step; everything that it changes is realized in it, as recording needs."""
        logits, statistics = self._forward(inputs)
        loss = logits.sparse_categorical_crossentropy(target).contiguous()
        learned = [self._state[name] for name in self._momenta]
        changed = [*self._updated(loss.gradient(*learned)), *(self._state[n].assign(v) for n, v in statistics.items())]
        loss.realize(*changed)
        return loss

    def _updated(self, gradients: list[Array]) -> list[Array]:
        """buffer ← momentum · buffer + gradient + decay · weight, then weight ← weight - lr · buffer."""
        changed = []
        for (name, buffer), gradient in zip(self._momenta.items(), gradients, strict=True):
            weight = self._state[name]
            full = gradient if not self.decay else gradient + self.decay * weight.detach()
            buffer.assign(self.momentum * buffer + full)
            changed += [buffer, weight.assign(weight.detach() - self.lr * buffer)]
        return changed

    def _forward(self, inputs: Array) -> tuple[Array, dict[str, Array]]:
        """Interpret the program: logits, and the new values of buffers by name."""
        known: dict[Any, Any] = {}
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                name = self._names.get(node.name)
                known[node] = inputs if name is None else self._state[name]
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = OPERATIONS[node.target](*args, **kwargs)
        results = [known[node] for node in self._program.graph.output_node().args[0]]
        mutated = self._program.graph_signature.buffers_to_mutate
        outputs = zip(self._program.graph_signature.output_specs, results, strict=True)
        statistics = {mutated[spec.arg.name]: y for spec, y in outputs if spec.arg.name in mutated}
        return results[-1], statistics


def _check(model: nn.Module, example: Tensor, lr: float, momentum: float, decay: float) -> None:
    rules = (
        ("lr", lr, lr > 0, "a positive number"),
        ("momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)"),
        ("decay", decay, decay >= 0, "0 or more"),
        ("the number of examples", len(example), len(example) > 1, "at least two, so that the batch can vary"),
    )
    for name, value, good, wanted in rules:
        if not good:
            raise BadInput(f"{name} is {value}", f"give {wanted}")
    if any(p.dtype is not torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise BadInput("a parameter is not float32 on the CPU", "model.float().cpu()")
    if len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters())):
        raise NotApplicable("two layers share a weight", ELSEWHERE)
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is None for m in model.modules()):
        raise NotApplicable("a BatchNorm averages cumulatively (momentum=None)", "give it a momentum")


def _exported(model: nn.Module, example: Tensor) -> Any:
    """The graph of the model in its present mode, without mutation, its batch dynamic; every operation is one of ours."""
    try:
        with quiet():
            program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
            program = program.run_decompositions({})
    except Exception as error:  # whatever a user's forward can raise while it is traced
        raise NotApplicable(f"the model cannot be exported: {reason(error)}", "make the forward traceable") from error
    foreign = sorted({str(n.target) for n in program.graph.nodes if n.op == "call_function" and n.target not in OPERATIONS})
    if foreign:
        raise NotApplicable(f"OpenCL training has no form of {', '.join(foreign)}", ELSEWHERE)
    if program.graph_signature.inputs_to_lifted_tensor_constants:
        raise NotApplicable("the forward makes a tensor of constants", "register it as a buffer")
    if len(program.graph_signature.user_outputs) != 1:
        raise NotApplicable("the model returns more than one tensor", "return the logits alone")
    return program


def _device() -> None:
    try:
        opencl.cl_device({"needs": ["quadriga[opencl]"]})
    except (ImportError, RuntimeError) as error:
        raise NotApplicable(str(error), "quadriga doctor says what is missing") from error
