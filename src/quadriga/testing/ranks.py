"""Plans for several processes, held against one process: gradients, and weights after ten steps of SGD.

    torchrun --standalone --nproc-per-node 2 -m quadriga.testing.ranks OUT.json [CASE …]

runs every case for that many ranks in one launch; each rank computes the reference by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from quadriga import workloads
from quadriga.core.batch import call
from quadriga.core.files import write_json
from quadriga.core.recipe import Recipe, Step, step
from quadriga.core.setup import Setup
from quadriga.core.slots import PLAIN
from quadriga.core.spread import local
from quadriga.core.workload import Workload
from quadriga.methods import build
from quadriga.parallel import group
from quadriga.parallel.inference import Spread
from quadriga.parallel.team import Team
from quadriga.parallel.traffic import Traffic, peak_added
from quadriga.train.loop import fit
from quadriga.train.ranks import Ranks
from quadriga.train.run import Run
from quadriga.train.runners import runner_for
from quadriga.train.step import entered
from quadriga.workloads.ready.gpt_shakespeare import GPT

STEPS, LIMIT = 10, 1e-5


@dataclass(frozen=True)
class Case:
    """A plan on a network.

    Args:
        network: "gpt", "cnn" or "llama".
        plan: the steps that say how the ranks train.
        ranks: in which it is run.
        more: further steps, which the reference has too.
        infer: only call the network, with batches of several sizes.
        broken: "no-sync" (gradients stay each rank's own) or "doubled" (every gradient twice): has to be found unequal.
    """

    network: str
    plan: tuple[Step, ...]
    ranks: int
    more: tuple[Step, ...] = ()
    broken: str = ""
    infer: bool = False


DDP, FSDP, TP, PP = (step(n) for n in ("data_parallel", "fully_sharded", "tensor_parallel", "pipeline_parallel"))
SP, EMA = step("tensor_parallel", sequence=True), step("ema", decay=0.9)
CLIP, PARTS = step("clip_gradients", limit=0.05), step("accumulate", steps=4, keep_batch=True)
CASES: dict[str, Case] = {
    "ddp": Case("gpt", (DDP,), 2),
    "ddp cnn": Case("cnn", (DDP,), 2),
    "ddp, clipped, in parts": Case("gpt", (DDP,), 2, (CLIP, PARTS)),
    "ddp, augmented, pruned data": Case("cnn", (DDP,), 2, (step("mixup"), step("prune_data"))),
    "ddp, no-sync": Case("gpt", (DDP,), 2, broken="no-sync"),
    "ddp, doubled": Case("gpt", (DDP,), 2, broken="doubled"),
    "fsdp": Case("gpt", (FSDP,), 2),
    "fsdp cnn": Case("cnn", (FSDP,), 2),
    "fsdp, clipped, in parts, averaged": Case("gpt", (FSDP,), 2, (CLIP, PARTS, EMA)),
    "fsdp, recomputed": Case("gpt", (FSDP, step("activation_checkpointing")), 2),
    "tp": Case("gpt", (TP,), 2),
    "tp, clipped, averaged": Case("gpt", (TP,), 2, (CLIP, EMA)),
    "tp + sequence": Case("gpt", (SP,), 2),
    "tp llama, by its own plan": Case("llama", (TP,), 2),
    "pp 1f1b": Case("gpt", (PP,), 2),
    "pp 1f1b, recomputed": Case("gpt", (PP, step("activation_checkpointing")), 2),
    "tp, recomputed, all but products": Case("gpt", (TP, step("activation_checkpointing", recompute="cheap")), 2),
    "pp gpipe": Case("gpt", (step("pipeline_parallel", schedule="gpipe"),), 2),
    "pp interleaved": Case("gpt", (step("pipeline_parallel", schedule="interleaved"),), 2),
    "pp 1f1b, clipped, averaged": Case("gpt", (PP,), 2, (CLIP, EMA)),
    "inference: replicas": Case("cnn", (DDP,), 2, infer=True),
    "inference: tp": Case("gpt", (TP,), 2, infer=True),
    "inference: pp": Case("gpt", (PP,), 2, infer=True),
    "inference: dp × tp": Case("gpt", (DDP, TP), 4, infer=True),
    "inference: dp × pp": Case("gpt", (DDP, PP), 4, infer=True),
    "ddp 4": Case("gpt", (DDP,), 4),
    "ddp cnn 4": Case("cnn", (DDP,), 4),
    "fsdp 4": Case("gpt", (FSDP,), 4),
    "fsdp cnn 4": Case("cnn", (FSDP,), 4),
    "tp 4": Case("gpt", (step("tensor_parallel", degree=4),), 4),
    "pp 1f1b 4": Case("gpt", (step("pipeline_parallel", degree=4),), 4),
    "dp × tp": Case("gpt", (DDP, TP), 4),
    "dp × tp + sequence, clipped": Case("gpt", (DDP, SP), 4, (CLIP,)),
    "fsdp × tp": Case("gpt", (FSDP, TP), 4),
    "pp × fsdp": Case("gpt", (PP, FSDP), 4),
    "pp × fsdp, clipped, averaged": Case("gpt", (PP, FSDP), 4, (CLIP, EMA)),
    "pp × dp": Case("gpt", (PP, DDP), 4),
}


def llama() -> nn.Module:
    """A small one of transformers, which brings its own plan for tensor parallelism; two query heads a key-value head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))


_known: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], float]] = {}


@cache
def network(name: str) -> Workload:
    """A small one of the ready-made workload, with few examples."""
    if name == "gpt":
        whole = workloads.load("gpt_shakespeare", examples=64)
        return replace(whole, model=partial(GPT, 4, 64, 4), batch_size=8)
    if name == "llama":
        whole = workloads.load("gpt_shakespeare", examples=64)
        return replace(whole, model=llama, batch_size=8)
    whole = workloads.load("lenet_fashion")
    return replace(whole, train=whole.train.part(torch.arange(128)), batch_size=16)


def setup_of(name: str, steps: Sequence[Step]) -> Setup:
    """A fresh setup after these steps."""
    setup = Setup.of(network(name), seed=0)
    for one in steps:
        setup = build(one)(setup)
    return setup


def trained(name: str, steps: Sequence[Step]) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Gradients of the first step, weights after ten steps of SGD and the mean of the ten losses; whole, in every rank."""
    task, setup = network(name), setup_of(name, steps)
    with runner_for(setup, None) as runner:
        run = Run(setup, task.train, runner, 1, 0, time.monotonic).opened(None, None)
        with entered(hook.train(run.model, run.data) for hook in run.hooks):
            batch, _ = run.loader.draw(0, 0, run.size(PLAIN), 0.0)
            runner.forward_backward(batch)
            for hook in run.hooks:
                hook.after_backward(runner.model, 0.0)
        found = {n: p.grad for n, p in runner.model.named_parameters() if p.grad is not None}
        gradients = {n: g.detach().cpu().clone() for n, g in runner.whole(found).items()}
    setup = setup_of(name, steps)
    outcome = fit(setup, task.train, epochs=STEPS * task.batch_size / len(task.train), seed=0)
    return gradients, dict(setup.model.named_parameters()), outcome.loss


def costs(name: str, steps: Sequence[Step]) -> dict[str, int]:
    """Of a step's forward and backward pass: bytes that a rank sends, and the most bytes of its weights, gradients and
    activations at once; of the rank where they are largest."""
    task, setup = network(name), setup_of(name, steps)
    with runner_for(setup, None) as runner:
        run = Run(setup, task.train, runner, 1, 0, time.monotonic).opened(None, None)
        with entered(hook.train(run.model, run.data) for hook in run.hooks):
            batch, _ = run.loader.draw(0, 0, run.size(PLAIN), 0.0)
            runner.forward_backward(batch)  # what is made once is made here
            runner.model.zero_grad(set_to_none=True)
            with Traffic() as traffic:
                runner.forward_backward(batch)
            runner.model.zero_grad(set_to_none=True)
            weights = sum(local(p.detach()).nbytes for p in runner.model.parameters())
            memory = weights + peak_added(lambda: runner.forward_backward(batch))
    found = group.gathered((traffic.total, memory))
    return {"sent": max(sent for sent, _ in found), "memory": max(held for _, held in found)}


def reference(name: str, steps: tuple[Step, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """What one process computes."""
    key = name + str(Recipe(steps).plain())
    if key not in _known:
        with group.apart():
            _known[key] = trained(name, steps)
    return _known[key]


@contextmanager
def broken(how: str) -> Iterator[None]:
    """A mistake, for the comparison to find."""
    plain = Ranks.forward_backward

    def doubled(self: Ranks, batch: Any) -> Tensor:
        loss = plain(self, batch)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.mul_(2)
        return loss

    with ExitStack() as stack:
        if how == "no-sync":
            synced = Team.synced
            stack.enter_context(patch.object(Team, "synced", lambda self, wanted: synced(self, False)))
        elif how == "doubled":
            stack.enter_context(patch.object(Ranks, "forward_backward", doubled))
        yield


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of any entry; infinite where something is missing."""
    if set(found) != set(expected):
        return float("inf")
    return max(float((found[n].detach() - expected[n].detach()).abs().max()) for n in expected)


def inferred(case: Case) -> dict[str, Any]:
    """How far the outputs of a spread network are from its own, for batches of its size, of fewer and of more examples."""
    task, setup = network(case.network), setup_of(case.network, case.plan)
    assert setup.runtime.parallel is not None
    spread = Spread(setup.model, setup.runtime.parallel, setup.context.example, task.batch_size)
    apart = []
    for count in (1, 5, task.batch_size, 2 * task.batch_size + 3):
        inputs = task.inputs(count)
        with torch.no_grad():
            expected = call(setup.model.eval(), inputs)
        found = spread(inputs)
        apart.append(float((found - expected).abs().max()) if found.shape == expected.shape else float("inf"))
    return {"outputs": max(apart), "equal": max(apart) <= LIMIT, "good": group.every(max(apart) <= LIMIT)}


def compare(case: Case) -> dict[str, Any]:
    """How far a plan's gradients, weights and losses are from one process's."""
    if case.infer:
        return inferred(case)
    expected = reference(case.network, case.more)
    with broken(case.broken):
        found = trained(case.network, (*case.plan, *case.more))
    gradients, weights = (worst(found[i], expected[i]) for i in (0, 1))
    equal = max(gradients, weights) <= LIMIT
    size = max(float(g.abs().max()) for g in expected[0].values())
    spent = {} if case.broken else costs(case.network, (*case.plan, *case.more))
    row = {"gradients": gradients, "largest": size, "weights": weights, "loss": abs(found[2] - expected[2])}
    return {**row, **spent, "equal": equal, "good": equal is not bool(case.broken)}


def main(out: str, *names: str) -> int:
    """Run cases, all of this number of ranks by default; the first rank writes a row each. 0 if all are as they should be."""
    torch.set_num_threads(1)
    group.join()
    rows: dict[str, Any] = {}
    alone = {}
    with group.apart():
        for name in ("gpt", "cnn", "llama") if not names else ():
            alone[name] = costs(name, ())
    for name, case in CASES.items():
        if case.ranks == torch.distributed.get_world_size() and (not names or name in names):
            start = time.monotonic()
            rows[name] = {
                "ranks": case.ranks,
                **compare(case),
                "alone": alone.get(case.network),
                "seconds": round(time.monotonic() - start, 1),
            }
            if group.rank() == 0:
                print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
                write_json(Path(out), rows)
    return 0 if rows and all(r["good"] for r in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
