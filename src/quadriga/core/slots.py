"""The values of the four slots, one per family, and what acts in the training loop: schedules, transforms and hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch
from quadriga.core.data import Data
from quadriga.core.metric import Loss


@dataclass(frozen=True)
class Factors:
    """What a schedule returns: multipliers of learning rate, momentum, decay and batch size. Schedules multiply."""

    lr: float = 1.0
    momentum: float = 1.0
    decay: float = 1.0
    batch: float = 1.0

    def __mul__(self, other: Factors) -> Factors:
        mine, theirs = (self.lr, self.momentum, self.decay, self.batch), (other.lr, other.momentum, other.decay, other.batch)
        return Factors(*(a * b for a, b in zip(mine, theirs, strict=True)))


PLAIN = Factors()
Schedule = Callable[[float], Factors]  # progress in [0, 1] = samples seen / samples of this train step


@dataclass(frozen=True)
class Moment:
    """When and with which random numbers a batch is transformed; equal for equal (seed, step).

    Args:
        generator: on the batch's device, seeded from (seed, step).
        progress: of this train step, in [0, 1].
        epoch: [batch] int64, how often the stream of examples has passed over each of them before.
    """

    generator: torch.Generator
    progress: float
    epoch: Tensor

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1) on the batch's device."""
        return torch.rand(shape, generator=self.generator, device=self.generator.device)


Transform = Callable[[Batch, Moment], Batch]


@dataclass(frozen=True)
class Look:
    """What a hook is shown when it asked for a look.

    Args:
        progress: in [0, 1].
        loss: mean of the last training losses.
        quality: measures the metric on val, as the hooks want the model evaluated; computed once a look, when first called.
            None where there is no such service.
        gain: (quality, other) → how much better the first is, in the metric's unit.
    """

    progress: float
    loss: float
    quality: Callable[[], float] | None
    gain: Callable[[float, float], float]


class Hook:
    """Places in the loop where a method may act. Every method does nothing unless overridden.

    Attributes:
        spreads: whether it may act on a model whose weights are spread over processes: tensors are then DTensors, or the model
            has a part of the layers. What combines several weights asks `core.spread`; state that is as large as weights is
            kept under their names.
        interval: of progress, after which `look` is called; 0 for never.
        stopped: whether the train step is to end now.
        factors: multiply the schedules' factors.
    """

    spreads: bool = False
    interval: float = 0.0
    stopped: bool = False
    factors: Factors = PLAIN

    def select(self, index: Tensor, moment: Moment) -> Tensor | None:
        """Weights [n] of the examples that come next in the stream, of which those of weight 0 are passed over; None: all."""
        return None

    def seen(self, batch: Batch, losses: Tensor) -> None:
        """The losses of a batch's examples, detached: [batch], or one number of a scalar loss.

        Where several processes share a batch, all see all losses; the batch has index and weight then, and no inputs.
        """

    def train(self, model: nn.Module, data: Data) -> AbstractContextManager[Any]:
        """Entered around all steps of a train step, and left however they end; `data` is the split, untransformed."""
        return nullcontext()

    def after_backward(self, model: nn.Module, progress: float) -> None:
        """Gradients are there; the optimizer has not stepped."""

    def after_step(self, model: nn.Module, progress: float) -> None:
        """The optimizer has stepped."""

    def look(self, model: nn.Module, look: Look) -> None:
        """Another `interval` of progress is over."""

    def eval(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Entered around an evaluation, such as one with averaged weights."""
        return nullcontext()

    def end(self, model: nn.Module, data: Iterable[Batch]) -> None:
        """The train step is over; `data` gives training batches."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers to be kept in a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""


@dataclass(frozen=True)
class Asynchronous:
    """A train step by several processes that update one set of weights in shared memory without locks.

    Args:
        workers: processes, that of the loop among them.
        scale: whether an update's rate is multiplied by 1 / (1 + its staleness).
        alone: the part of the train step, in [0, 1], that the loop's own process makes before the others join it.
        asked_by: the method that wants it, for messages.
    """

    workers: int
    scale: bool = False
    alone: float = 0.0
    asked_by: str = ""


@dataclass(frozen=True)
class Training:
    """The training slot: how a batch becomes a step.

    `transforms` act in order on each training batch; `make_hooks` are called at the start of a train step,
    with the model, so that hooks have state per run. A batch of more than `micro` examples is worked off in parts of at most
    so many, whose gradients add up to its own. `finish` is called once a train step and those that continue it are
    over, in every process that rebuilds the network: model → the model that later steps see, such as one without the units
    that faded out. `asynchronous` says how many processes make the steps, if it is more than the loop's own.
    """

    loss: Loss
    batch_size: int
    transforms: tuple[Transform, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    make_hooks: tuple[Callable[[nn.Module], Hook], ...] = ()
    finish: tuple[Callable[[nn.Module], nn.Module], ...] = ()
    micro: int | None = None
    asynchronous: Asynchronous | None = None


MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class OptimizerSlot:
    """The optimizer slot: how a gradient becomes an update.

    `make` is called with the model when `train` starts. `schedules` act like the training slot's; their decay
    factor scales the group entries weight_decay, l1, l2 and group_l1. `make_hooks` are called with the model and its
    optimizer, for one that keeps other weights while it trains than those to be evaluated.
    """

    make: MakeOptimizer
    schedules: tuple[Schedule, ...] = ()
    make_hooks: tuple[Callable[[nn.Module, torch.optim.Optimizer], Hook], ...] = ()


@dataclass(frozen=True)
class QuantSpec:
    """What to quantize, for each runtime to realise in its own best form.

    Args:
        weights: bits of weights, 8; or 4 in the matrices of linear layers, while others have 8.
        activations: "static" (calibrated), "dynamic" or "none" (weights only: a smaller file, float products).
        per_channel: one scale per output channel.
        calibration: of the range of static activations: "minmax", "percentile" or "mse".
        keep_float: names of layers left out.
        group: inputs that share a scale, of 4-bit weights.
    """

    weights: int = 8
    activations: str = "static"
    per_channel: bool = True
    calibration: str = "minmax"
    keep_float: tuple[str, ...] = ()
    group: int = 32


@dataclass(frozen=True)
class ParallelSpec:
    """How the processes that torchrun or Slurm started train one model together; see `quadriga.parallel`.

    The ranks are a mesh of `pipeline` × data × `tensor`; the data dimension is what is left. Nothing of it changes what is
    computed, up to the rounding of sums, unless `precision` is not "fp32".

    Args:
        data: how the ranks that see different examples keep the weights: "replicate" (DDP), "shard" (FSDP2), or "" where
            there must be none.
        tensor: ranks that share each matrix.
        pipeline: ranks that share the layers.
        recompute: activations are computed again in the backward pass: "" none, "blocks" all inside a block, "cheap" all
            there but matrix products and attention.
        options: of the methods: "precision", "reduce" and "reshard" (shard), "unused" and "sync_batchnorm" (replicate),
            "sequence" and "plan" (tensor), "schedule", "microbatches", "cuts" and "chunks" (pipeline).
    """

    data: str = ""
    tensor: int = 1
    pipeline: int = 1
    recompute: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def but(self, *, options: Mapping[str, Any] | None = None, **fields: Any) -> ParallelSpec:
        """With other fields, and further options."""
        return replace(self, **fields, options={**self.options, **(options or {})})


@dataclass(frozen=True)
class RuntimeSpec:
    """The runtime slot: where and how the model executes, realised once after the last step.

    Args:
        name: of the runtime: "cuda_graphs", "eager", "executorch", "inductor", "onnxruntime", "opencl", "openvino".
        threads: of the CPU; None leaves the runtime's default.
        channels_last: memory format of 4-d tensors, in training and in PyTorch runtimes.
        matmul: "highest", "high" (TF32 on a GPU, which has it for convolutions too) or "medium" (through oneDNN on the CPU):
            torch.set_float32_matmul_precision.
        compile: torch.compile the training step.
        compile_mode: "default", or "reduce-overhead": kernels of a step are replayed as CUDA graphs.
        autocast: "none", "bf16" or "fp16": in training, operations that allow it compute in that type.
        quant: quantization, or None.
        weights: "fp32", "bf16" or "fp16": type of the finished weights, in which products are computed where the runtime can.
        device: "cpu" or "cuda": where PyTorch computes, in training and in its runtimes; other runtimes have their own.
        storage: "plain", or "entropy": weights are entropy-coded in the files and decoded when they are loaded.
        parallel: how several processes train together, or None.
        options: further plain data for the runtime.
        alone: how a batch of one executes, where that is another way than that of larger batches; None: the same.
    """

    name: str = "eager"
    threads: int | None = None
    channels_last: bool = False
    matmul: str = "highest"
    compile: bool = False
    compile_mode: str = "default"
    autocast: str = "none"
    quant: QuantSpec | None = None
    weights: str = "fp32"
    device: str = "cpu"
    storage: str = "plain"
    options: Mapping[str, Any] = field(default_factory=dict)
    parallel: ParallelSpec | None = None
    alone: RuntimeSpec | None = None

    @property
    def by_torch(self) -> bool:
        """Whether PyTorch executes it, in the type of the weights, and not a runtime that reads an ONNX file."""
        return self.name in ("cuda_graphs", "eager", "inductor")

    @property
    def int8(self) -> tuple[str, ...]:
        """The kinds of activations with which it runs int8 models, named as in `QuantSpec.activations`."""
        if self.by_torch and (self.name != "inductor" or self.device != "cpu"):
            return ("none",)
        return ("static", "dynamic") if self.name == "executorch" else ("static", "dynamic", "none")

    @property
    def bits(self) -> int:
        """That most weights take in the files, those for a batch of one and those for more together."""
        own = 32 if self.weights == "fp32" else 16
        own = own if self.quant is None else self.quant.weights
        return own if self.alone is None else own + self.alone.bits

    @property
    def exact(self) -> bool:
        """Whether it computes what the model does, up to the rounding of float32."""
        own = self.quant is None and self.weights == "fp32" and not self.tf32
        return own and (self.alone is None or self.alone.exact)

    @property
    def tf32(self) -> bool:
        """Whether float32 products are rounded to TF32, 11 bits of precision: an error of about 1e-3."""
        return self.by_torch and self.device != "cpu" and self.matmul != "highest"
