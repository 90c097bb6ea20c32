"""Forms in which a module is wrapped, hooked, compiled, shared or built in an unusual way."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from user_forms import CLASSES, Plain, cnn, fitted, form, images, mlp, seeded, tokens, vectors


def each(model: nn.Module, wrap: object, kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> nn.Module:
    """Apply a function of torch.nn.utils to the layers that it is for."""
    for module in list(model.modules()):
        if type(module) in kinds:
            wrap(module)
    return model


@form("`torch.nn.utils.weight_norm`, of hooks")
def weight_norm_old() -> Plain:
    return {"model": seeded(lambda: each(mlp(), torch.nn.utils.weight_norm)), **vectors()}


@form("`parametrizations.weight_norm`")
def weight_norm_new() -> Plain:
    return {"model": seeded(lambda: each(cnn(), parametrizations.weight_norm)), **images()}


@form("`torch.nn.utils.spectral_norm`, of hooks")
def spectral_norm_old() -> Plain:
    return {"model": seeded(lambda: each(mlp(), torch.nn.utils.spectral_norm)), **vectors()}


@form("`parametrizations.spectral_norm`")
def spectral_norm_new() -> Plain:
    return {"model": seeded(lambda: each(mlp(), parametrizations.spectral_norm)), **vectors()}


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(0, 1)


@form("a parametrization of the user's own")
def parametrized() -> Plain:
    def build() -> nn.Module:
        layer = nn.Linear(12, 12)
        parametrize.register_parametrization(layer, "weight", Symmetric())
        return nn.Sequential(layer, nn.ReLU(), nn.Linear(12, CLASSES))

    return {"model": seeded(build), **vectors()}


@form("`torch.nn.utils.prune` masks, not made permanent")
def pruned() -> Plain:
    def mask(layer: nn.Module) -> None:
        prune.l1_unstructured(layer, "weight", amount=0.5)

    return {"model": seeded(lambda: each(mlp(), mask)), **vectors()}


def _trained() -> tuple[nn.Module, Plain]:
    data = vectors()
    return seeded(lambda: fitted(mlp(), *data["train"])), data


@form("`torch.jit.script`, trained", out="plain")
def scripted() -> Plain:
    model, data = _trained()
    return {"model": torch.jit.script(model), **data, "trained": True}


@form("`torch.jit.trace`, trained", out="plain")
def traced() -> Plain:
    model, data = _trained()
    return {"model": torch.jit.trace(model, data["val"][0][:2]), **data, "trained": True}


@form("the plain module that a scripted one was made of")
def plain() -> Plain:
    model, data = _trained()
    return {"model": model, **data, "trained": True}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


@form("`torch.compile` of a Sequential")
def compiled_sequential() -> Plain:
    return {"model": torch.compile(seeded(mlp)), **vectors()}


@form("`torch.compile` of a module")
def compiled_module() -> Plain:
    return {"model": torch.compile(seeded(Net)), **vectors()}


class Bank(Net):
    def __len__(self) -> int:
        return 0


@form("a module whose `__len__` is 0")
def length_zero() -> Plain:
    return {"model": seeded(lambda: nn.Sequential(nn.Dropout(0.2), Bank())), **vectors()}


@form("the same module, not wrapped, with dropout")
def bank_alone() -> Plain:
    class Dropping(Bank):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(functional.dropout(x, 0.3, self.training))

    return {"model": seeded(Dropping), **vectors()}


@form("`nn.DataParallel` on the CPU")
def data_parallel() -> Plain:
    return {"model": nn.DataParallel(seeded(Net)), **vectors()}


@form("lazy modules")
def lazy() -> Plain:
    return {"model": lambda: nn.Sequential(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(CLASSES)), **vectors()}


@form("lazy modules that have seen a batch")
def lazy_ready() -> Plain:
    def build() -> nn.Module:
        model = nn.Sequential(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(CLASSES))
        model(torch.zeros(2, 12))
        return model

    return {"model": build, **vectors()}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.table(x[:, 0]))))[:, :CLASSES]


@form("tied weights")
def tied() -> Plain:
    return {"model": seeded(Tied), **tokens()}


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.block, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.blocks = nn.ModuleList([self.block, self.block, self.block])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x)


@form("one module used three times")
def shared_module() -> Plain:
    return {"model": seeded(Repeated), **vectors()}


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(12, 12) / 4) for _ in range(2)])
        self.out = nn.ParameterDict({"w": nn.Parameter(torch.randn(12, CLASSES) / 4)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.relu(x @ weight)
        return x @ self.out["w"]


@form("`ParameterList` and `ParameterDict`")
def parameter_list() -> Plain:
    return {"model": seeded(Listed), **vectors()}


class Lora(nn.Module):
    """A hand-written adapter of the shape that peft gives a linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


@form("LoRA adapters over frozen layers (hand-written, of peft's shape)")
def lora() -> Plain:
    model = seeded(mlp)
    return {"model": nn.Sequential(*(Lora(m) if isinstance(m, nn.Linear) else m for m in model)), **vectors()}


@form("a frozen body under a trainable head")
def frozen_body() -> Plain:
    model = seeded(cnn)
    for part in model[:4]:
        part.requires_grad_(False)
    return {"model": model, **images()}


@form("`torch.ao` dynamic int8, quantized already", out="plain")
def quantized_already() -> Plain:
    import warnings

    model, data = _trained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    return {"model": small, "val": data["val"], "test": data["test"], "trained": True}


@form("in training mode when given")
def training_mode() -> Plain:
    model, data = _trained()
    return {"model": nn.Sequential(nn.Dropout(0.4), *model).train(), **data, "trained": True}
