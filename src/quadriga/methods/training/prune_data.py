"""Data pruning: pass over examples that are learnt already, and let those like them that are seen count for more."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, device_of
from quadriga.core.data import Data
from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, Moment
from quadriga.methods.training._ending import add_hook


def draw(losses: Tensor, ratio: float, by: str, generator: torch.Generator) -> Tensor:
    """Weights [examples] for one epoch, 0 for those to be passed over; each is 1 on average over the draws.

    Args:
        losses: [examples] float, the last of each; NaN where it is not known.
        ratio: the probability with which one whose loss is below the mean of the known ones is passed over.
        by: "loss", or "random": as many examples as are below the mean, but any.
        generator: on the losses' device.

    Example:
        >>> found = draw(torch.tensor([0.1, 9.0, torch.nan]), 0.5, "loss", torch.Generator().manual_seed(0))
        >>> float(found[0]) in (0.0, 2.0), found[1:].tolist()
        (True, [1.0, 1.0])
    """
    easy = losses < losses.nanmean()
    if by == "random":
        easy = easy[torch.randperm(len(easy), generator=generator, device=easy.device)]
    gone = torch.rand(len(easy), generator=generator, device=easy.device) < ratio
    weights = torch.ones(len(easy), device=easy.device)
    return weights.masked_fill_(easy, 1 / (1 - ratio)).masked_fill_(easy & gone, 0.0)


class Pruning(Hook):
    """Keeps each example's last loss, and decides once an epoch of the stream.

    Losses stay on the device that computes them, and are waited for at the border of two epochs only.

    Attributes:
        losses: [examples], NaN where an example was not seen yet.
        weights: [examples], in main memory, of the epoch `epoch`.
    """

    spreads = True

    def __init__(self, method: PruneData, model: nn.Module) -> None:
        self.method, self.epoch = method, -1
        self.losses, self.weights = torch.empty(0), torch.empty(0)

    def train(self, model: nn.Module, data: Data) -> AbstractContextManager[Any]:
        """Room for every example; data of another length are other data."""
        if len(self.losses) != len(data):
            self.epoch, self.losses, self.weights = -1, torch.full((len(data),), torch.nan), torch.ones(len(data))
        self.losses = self.losses.to(device_of(model))
        return nullcontext()

    def select(self, index: Tensor, moment: Moment) -> Tensor | None:
        """What was decided for the epoch of each entry."""
        if moment.progress >= self.method.full_from:
            return None
        index, epochs, weights = index.cpu(), moment.epoch.cpu(), torch.ones(len(index))
        self._fill(weights, index, epochs)
        if (newest := int(epochs[-1])) != self.epoch:
            self.epoch = newest
            self.weights = draw(self.losses.cpu(), self.method.ratio, self.method.by, moment.generator)
            self._fill(weights, index, epochs)
        return weights

    def _fill(self, weights: Tensor, index: Tensor, epochs: Tensor) -> None:
        here = epochs == self.epoch
        weights[here] = self.weights[index[here]]

    def seen(self, batch: Batch, losses: Tensor) -> None:
        """Note the losses; of an example that a batch has twice, at the border of two epochs, the greater."""
        if losses.dim() == 0:
            raise BadInput("prune_data got one number for a batch of losses", "let the loss return one value per example")
        self.losses.scatter_reduce_(0, batch.index, losses.to(self.losses), "amax", include_self=False)

    def state_dict(self) -> dict[str, Any]:
        """What is known and decided."""
        return {"losses": self.losses, "weights": self.weights, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        self.losses, self.weights, self.epoch = state["losses"].clone(), state["weights"].clone(), state["epoch"]


@dataclass(frozen=True, kw_only=True)
class PruneData(Method):
    """Pass over an example with probability `ratio` in an epoch at whose start its last loss is below the mean of all, and
    give those of them that stay the weight 1 / (1 - ratio). Each example's expected weight is 1, so that the expected sum of
    weighted gradients over an epoch is that of all data. Batches stay full and progress counts examples passed over too:
    a train step of as many epochs has fewer steps.

    A step's gradient is divided by its batch's sum of weights, as always, so its length is that of plain training: the saved
    steps are not made up by longer ones. The first epoch sees everything, and a train step of one epoch saves nothing.

    The loss is the one that is trained with. Smoothed or taught by a teacher it still ranks examples by how hard they are;
    noise from augmentation blurs the ranking; with mixed examples (mixup, cutmix) it is that of the mix, so that the
    ranking says little about the example.

    Args:
        ratio: the probability, in (0, 1).
        full_from: the progress from which all data are seen, in (0, 1].
        by: "loss"; or "random" for the control, in which as many examples as are below the mean are drawn at random, and
            passed over and weighted like them.

    Source: Qin et al. 2024 (InfoBatch), arXiv:2303.04947.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:2303.04947"
    search: ClassVar = {"ratio": (0.5, 0.3, 0.7)}
    control: ClassVar = {"by": "random"}
    requires = frozenset({"PER_EXAMPLE_LOSS", "TRAIN_DATA"})

    ratio: float = 0.5
    full_from: float = 0.875
    by: Literal["loss", "random"] = "loss"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_data.ratio is {self.ratio}", "give a probability in (0, 1)")
        if not 0 < self.full_from <= 1:
            raise BadInput(f"prune_data.full_from is {self.full_from}", "give a part of the train step, in (0, 1]")

    def apply(self, setup: Setup) -> Setup:
        return add_hook(setup, partial(Pruning, self))
