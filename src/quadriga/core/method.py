"""The one protocol: a method is a frozen value that maps a setup to a setup. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

from quadriga.core.errors import BadInput, NotApplicable, did_you_mean

if TYPE_CHECKING:
    from quadriga.core.setup import Setup


class Family(StrEnum):
    """The four families; each owns one slot of the setup."""

    STRUCTURE = "structure"
    TRAINING = "training"
    OPTIMIZER = "optimizer"
    HARDWARE = "hardware"

    @property
    def slot(self) -> str:
        """The name of the setup's slot that this family may write."""
        return {"structure": "model", "hardware": "runtime"}.get(self.value, self.value)


class Numerics(StrEnum):
    """A method's promise about the outputs of a finished model, which selects how it is verified."""

    EXACT = "exact"  # bit-equal
    CLOSE = "close"  # within a tolerance by compute type
    CHANGED = "changed"  # judged by the task's quality


SLOTS = ("model", "training", "optimizer", "runtime")


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of every method. Fields of the dataclass are the hyperparameters; calling it checks the contract.

    Class attributes:
        family: the slot that `apply` may write.
        numerics: the promise about outputs.
        source: the paper or page that it follows.
        search: for each searched field, the choices; the first is where a search starts.
        writes: further slots that it writes.
        control: fields with which the method stands for chance; a recipe that uses it is judged beside itself with these.
        trains: whether a hardware method acts on train steps, so that it has to stand before one.
        common: whether what a hardware method sets is one for the whole artifact or process, so that it holds for both parts
            of a recipe that `batch_of_one` divides.
        ranks: whether it says how several processes train together.
        shapes: whether a structure method changes the network, its shape or its weights, and not its training alone.
        requires, adds, removes: traits, open strings that state facts about the setup.
        name: how recipes call it; from the class name unless given.
    """

    family: ClassVar[Family]
    numerics: ClassVar[Numerics]
    source: ClassVar[str]
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    writes: ClassVar[frozenset[str]] = frozenset()
    control: ClassVar[Mapping[str, Any]] = {}
    trains: ClassVar[bool] = False
    common: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    shapes: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset()
    adds: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset()
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def needs(self) -> frozenset[str]:
        """The traits that this very value requires: those of its class, unless a field takes one away or adds one."""
        return self.requires

    def lays_out(self) -> bool:
        """Whether this very value says only where training is computed and not what: a checkpoint is of the same run
        without it."""
        return False

    @classmethod
    def unsearched(cls) -> str:
        """Why a search on this machine neither proposes it nor lets it stand as an opponent; "" if it does both.

        A recipe may name the method all the same.
        """
        return ""

    @abstractmethod
    def apply(self, setup: Setup) -> Setup:
        """Return the changed setup. Raises NotApplicable(reason, remedy) when there is nothing to do."""

    def __call__(self, setup: Setup) -> Setup:
        """Apply under the contract: requirements before, owned slots and traits after.

        Raises:
            NotApplicable: a required trait is missing, or `apply` refused.
            AssertionError: the method wrote a slot that it neither owns nor declares.
        """
        if missing := sorted(self.needs() - setup.traits):
            raise NotApplicable(f"{self.name} requires {', '.join(missing)}", REMEDIES.get(missing[0], ""))
        after = self.apply(setup)
        allowed = {self.family.slot, *self.writes}
        for slot in SLOTS:
            written = getattr(after, slot) is not getattr(setup, slot)
            assert slot in allowed or not written, f"{self.name} wrote the slot {slot}, which it does not own"
        assert after.context is setup.context, f"{self.name} replaced the context"
        return dataclasses.replace(after, traits=(after.traits - self.removes) | self.adds)

    def insist(self, *rows: tuple[str, bool, str]) -> None:
        """For `__post_init__`: each row is a field, what has to hold of it, and the remedy.

        Raises:
            BadInput: with the first field of which it does not hold.
        """
        for name, holds, remedy in rows:
            if not holds:
                raise BadInput(f"{self.name}.{name} is {getattr(self, name)}", remedy)

    @classmethod
    def fields(cls) -> dict[str, Any]:
        """Field names and defaults; a field without a default has `dataclasses.MISSING`."""
        return {f.name: f.default for f in dataclasses.fields(cls)}

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Build from plain data, with an error that names the field, the value and the remedy.

        Raises:
            BadInput: unknown field, missing field, or a value of the wrong type.
        """
        known = cls.fields()
        hints = get_type_hints(cls)
        for key, value in fields.items():
            if key not in known:
                raise BadInput(f'{cls.name} has no field "{key}"', did_you_mean(key, known))
            if not _fits(value, hints[key]):
                raise BadInput(f"{cls.name}.{key} is {value!r}", f"it takes {_spell(hints[key])}")
        if missing := [k for k, v in known.items() if v is dataclasses.MISSING and k not in fields]:
            raise BadInput(f"{cls.name} needs the field {missing[0]}", f"it takes {_spell(hints[missing[0]])}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def invariant(change: str) -> str:
    """The trait that a change of the input keeps its label, as the workload declares it.

    Example:
        >>> invariant("horizontal_flip")
        'INVARIANT_HORIZONTAL_FLIP'
    """
    return f"INVARIANT_{change.upper()}"


UNDECLARED = 'the workload does not say that {} keeps its label; declare invariances={{"{}"}} if it does'
CHANGED_IMAGES = {
    "horizontal_flip": "a mirrored image",
    "rotation": "a turned image",
    "translation": "a shifted image",
    "color": "a recoloured image",
}
REMEDIES = {
    "TRAINED": "put a train step before it",
    "TRAIN_DATA": "give the workload training data",
    "FLOAT_WEIGHTS": "put it before quantization",
    "TEACHER": "the trained baseline teaches, and this one is not trained: give it a train step, or trained=True",
    "PER_EXAMPLE_LOSS": "let the loss return one value per example",
    "LOGITS": "it needs scores of classes and integer targets [batch, ...]; give classes_dim where shapes do not tell",
    "CUDA": "put the step cuda before it, on a machine with an NVIDIA GPU",
    "CLASSES": "it needs class logits [batch, classes] and integer targets [batch]",
    "TOKENS": "it needs token numbers, int64 [batch, length]",
    "IMAGES": "it needs inputs of shape [batch, channels, height, width]",
    **{invariant(change): UNDECLARED.format(image, change) for change, image in CHANGED_IMAGES.items()},
}


def _fits(value: Any, hint: Any) -> bool:
    import types
    from typing import Literal, Union, get_args, get_origin

    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(v, args[0]) for v in value)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _spell(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint).replace("typing.", "")
