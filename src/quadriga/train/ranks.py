"""Training by several processes: the runner of a plan, around which the loop is the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quadriga.core import rng
from quadriga.core.batch import Batch, device_of
from quadriga.core.errors import Diverged, NotApplicable
from quadriga.core.half import in_float
from quadriga.core.metric import Loss
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, RuntimeSpec, Schedule
from quadriga.core.spread import alike, layers_over
from quadriga.parallel import group
from quadriga.parallel.away import Away
from quadriga.parallel.pipeline import Pipeline
from quadriga.parallel.recompute import outermost, recomputing
from quadriga.parallel.share import evenly
from quadriga.parallel.team import Team, tensors_of
from quadriga.train.checkpoint import State, compose, read_state
from quadriga.train.config import POINTS
from quadriga.train.factors import product
from quadriga.train.parts import joined_groups, merged, read_spread, save_parts, save_whole
from quadriga.train.state import model_tensors, module_states, optimizer_state
from quadriga.train.step import Runner, named, settings, shares, weight_of

T = torch.optim
# what updates each entry by itself, so that it may be given parts of matrices
ELEMENTWISE = (T.SGD, T.Adam, T.AdamW, T.NAdam, T.RAdam, T.Adamax, T.Adagrad, T.Adadelta, T.RMSprop, T.ASGD, T.Rprop)


class Ranks(Runner):
    """Executes a step on this rank's part of the model and of the batch; loss and gradients are those of the whole batch.

    Args:
        team: the ranks.
        loss, spec, micro: as of `Runner`; `micro` is the most examples that one rank works off at once.
        original: the whole model, whose memory is given back meanwhile.

    Raises:
        NotApplicable: the plan and these settings do not go together.
    """

    def __init__(self, team: Team, loss: Loss, spec: RuntimeSpec, micro: int | None, original: nn.Module) -> None:
        if spec.compile:
            raise NotApplicable("a plan for several processes is not compiled", "leave compile out")
        if spec.autocast == "fp16" and not team.replicated:
            raise NotApplicable("loss scaling for fp16 sees the gradients of one rank", 'use kind = "bf16"')
        super().__init__(team.model, loss, spec, micro)
        self.original, self.aliases = original, model_tensors(original)[1]
        self.away = Away(original)
        self.team, self.forward, self.share = team, team.forward, team.share
        self.scale = float(team.share.size)  # gradients are averaged over ranks, and are to be summed

    def forward_backward(self, batch: Batch) -> Tensor:
        """Add the gradients of the reduced loss of the whole batch, and return that loss, detached, the same on all ranks."""
        examples = batch.of or len(batch)
        whole: Tensor | int = examples if batch.weight is None else self.team.total(weight_of(batch))
        if self.team.pipe is not None:
            return self.team.total(self._through(self.team.pipe, batch, whole))
        count = -(-self.share.largest(examples) // self.micro) if self.micro else 1
        done = []
        for number, part in enumerate(evenly(batch, count) if count > 1 else (batch,)):
            with self.team.synced(number + 1 == count):
                done.append(self._backward(part, whole))
        self.team.settle_gradients()
        loss = torch.stack([part_of_loss for _, part_of_loss in done]).sum()
        self.losses = torch.cat([losses for losses, _ in done]) if done[0][0].dim() else loss
        return self.team.total(loss)

    def _through(self, pipe: Pipeline, batch: Batch, whole: Tensor | int) -> Tensor:
        """The same by a pipeline."""

        def losses_of(output: Any, part: Batch) -> tuple[Tensor, Tensor]:
            losses = self.loss(in_float(output), part)
            return losses, shares(losses, part, whole)

        with torch.autocast(self.device.type, self.half) if self.half else nullcontext():
            self.losses, loss = pipe.step(batch, losses_of, self.scale)
        return loss

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The whole model, put together from the parts where there are only parts."""
        if self.team.replicated:
            yield self.model
            return
        home = device_of(self.original)
        self.away.back(tensors_of(self.original).values())
        self.team.give_back(self.original)
        try:
            yield self.original.to(self.device)
        finally:
            self.original.to(home)
            self.away = Away(self.original)

    def close(self, *, complete: bool) -> None:
        """Give the original its memory back, and what was trained, if all ranks come so far."""
        self.away.back(tensors_of(self.original).values())
        if complete:
            self.team.give_back(self.original)

    def observed(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Index, weight and losses of the whole batch."""
        examples = batch.of or len(batch)
        losses = self.team.joined(self.losses, examples) if self.losses.dim() else self.team.total(self.losses)
        weight = None if batch.weight is None else self.team.joined(batch.weight, examples)
        return Batch(None, None, self.team.joined(batch.index, examples), weight, batch.augmented), losses

    def finite(self) -> bool:
        """Of all ranks' parts."""
        return group.every(super().finite())

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From all ranks' parts, in all ranks."""
        return dict(self.team.whole(tensors))

    def agreed(self, value: float) -> float:
        """The first rank's number."""
        told = torch.tensor(float(value), dtype=torch.float64)
        dist.broadcast(told, 0)
        return float(told)

    def generators(self) -> dict[str, Any]:
        """Of the first rank, and under "ranks" of those that see other examples."""
        every = group.gathered((self.team.speaks, rng.capture()))
        return {**every[0][1], "ranks": [state for speaks, state in every if speaks]}

    def restore(self, states: Mapping[str, Any]) -> None:
        """The states of as many ranks; of another number, new ones that depend on them."""
        rng.restore(states)
        own = states.get("ranks", [])
        if len(own) == self.share.size:
            rng.restore(own[self.share.rank])
        else:
            self.part()

    def part(self) -> None:
        """From now on ranks that see other examples draw other numbers; the first goes on as one process would."""
        if self.share.rank:
            rng.seed_all(rng.derive("rank", self.share.rank, torch.initial_seed(), int(torch.randint(2**31, ()))))

    def accept(self, optimizer: torch.optim.Optimizer, hooks: Sequence[Hook]) -> None:
        """Refuse what needs whole weights where ranks have parts of them; tell the optimizer how to take these.

        Raises:
            NotApplicable: naming the optimizer or the hook.
        """
        if self.team.replicated:
            return
        remedy = "train with data_parallel alone, where each process has all weights"
        if not (type(optimizer) in ELEMENTWISE or getattr(optimizer, "spreads", False)):
            raise NotApplicable(
                f"{type(optimizer).__name__} works on whole weights, and each process has parts of them", remedy
            )
        steps = (*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values())
        for acting in (*hooks, *steps):
            if not getattr(acting, "spreads", False):
                name = getattr(acting, "__qualname__", type(acting).__qualname__)
                raise NotApplicable(f"{name} works on whole weights, and each process has parts of them", remedy)
        for entries in optimizer.param_groups:
            one = len(alike(entries["params"])) == 1
            entries.update({name: on for name, on in (("fused", False), ("foreach", one)) if name in entries})

    def groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """An optimizer's groups with the names of all ranks' parameters, in the model's order."""
        own = optimizer_state(self.model, optimizer)["groups"]
        return own if self.team.layers is None else joined_groups(group.gathered(own), self.team.order)

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]) -> None:
        """Write a complete state: every rank its parts; of a finished train step the first one everything, as one process."""
        weights = self.team.tensors()
        state = {**optimizer_state(self.model, optimizer), "groups": self.groups(optimizer)}
        body, other = compose(self.aliases, module_states(self.model), state, extra)
        if self.team.layers is not None:
            body = reduce(merged, group.gathered(body))
        spread = self.team.spread(weights, other)
        (save_whole if extra["finished"] else save_parts)(folder, body, spread, self.device)

    def read(self, folder: Path, *, fall_back: bool = False) -> State | None:
        """A state of which this rank takes its parts, whoever wrote it."""
        return read_state(folder, fall_back=fall_back, reader=partial(read_spread, self.team))


def schedules_of(setup: Setup) -> tuple[Schedule, ...]:
    """All that act in a train step."""
    return (*setup.training.schedules, *setup.optimizer.schedules)


@contextmanager
def ranked(setup: Setup) -> Iterator[Ranks]:
    """This rank's part of the model in training mode; afterwards the model has what was trained, in all ranks.

    Where it is broken off by anything else than a loss that all ranks saw, the model's weights are lost.
    """
    model, spec, training = setup.model, setup.runtime, setup.training
    was = model.training
    assert spec.parallel is not None
    if training.asynchronous is not None:
        asked = training.asynchronous.asked_by
        raise NotApplicable(f"{asked} starts workers of its own, beside which ranks cannot train", "leave one of the two out")
    if spec.parallel.pipeline > 1 and any(product(schedules_of(setup), k / POINTS).batch != 1 for k in range(POINTS + 1)):
        raise NotApplicable("a pipeline's batches have one size, and a schedule changes it", "leave that schedule out")
    group.join(spec.device)  # which says what this rank's GPU is
    with settings(spec):
        try:
            args = (spec.parallel, named(spec.device), setup.context.example, training.batch_size, training.micro)
            team = Team(model.train(), *args)
        finally:
            model.train(was)
        blocks = team.pipe.modules if team.pipe else outermost(team.model)
        with warnings.catch_warnings(), layers_over(team.layers), recomputing(blocks, spec.parallel.recompute):
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returns a view: nothing here works on it in place
            runner = Ranks(team, training.loss, spec, training.micro, model)
            complete = False
            try:
                yield runner
                complete = True
            except Diverged:
                complete = True
                raise
            finally:
                runner.close(complete=complete)
