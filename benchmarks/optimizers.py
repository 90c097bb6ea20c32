"""One `step()` of our Muon and schedule-free AdamW against others', on one thread: `python benchmarks/optimizers.py`.

On the parameters of resnet20_fashion and of the 2 M gpt_shakespeare, with random gradients. Muon stands against
pytorch_optimizer's and against torch.optim.Muon with AdamW for what is no matrix (kernels are shown to it flattened);
schedule-free against pytorch_optimizer's and, where it is installed, the authors' own. Each restart is a fresh process in which
all arms step in turn, block by block. Takes two minutes. Prints a table and writes one JSON file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from quadriga.core.files import atomic_write, write_json
from quadriga.measure.machine import facts
from quadriga.measure.stats import ratio
from quadriga.methods.optimizer._groups import roles
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.workloads.ready.gpt_shakespeare import GPT, SIZES
from quadriga.workloads.ready.resnet20_fashion import ResNet20

TABLE = Path(__file__).resolve().parents[1] / "docs/optimizers.md"
LEVEL = 0.99
RATE, DECAY = 1e-3, 0.01
NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet20_fashion": ResNet20, "gpt_shakespeare 2M": lambda: GPT(*SIZES["2M"])}
Step = Callable[[], object]


def ours(kind: str) -> Callable[[nn.Module], Step]:
    """The method's optimizer."""
    return lambda model: Optimizer(kind=kind, lr=RATE, weight_decay=DECAY).make(model).step  # type: ignore[arg-type]


def torch_muon(model: nn.Module) -> Step:
    """torch.optim.Muon on flattened copies of the matrices and kernels, fused AdamW on the rest."""
    found = roles(model)
    chosen = set(found.matrices)
    matrices = [nn.Parameter(p.detach().flatten(1)) for p in found.matrices]
    for p, source in zip(matrices, found.matrices, strict=True):
        p.grad = source.grad.flatten(1)  # type: ignore[union-attr]
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for p in found.all if p not in chosen], lr=RATE, weight_decay=DECAY, fused=True)
    return lambda: (muon.step(), adamw.step())


def package_muon(model: nn.Module) -> Step:
    """pytorch_optimizer's, which holds both parts."""
    from pytorch_optimizer import Muon

    found = roles(model)
    chosen = set(found.matrices)
    rest = [p for p in found.all if p not in chosen]
    groups = [{"params": found.matrices, "use_muon": True, "lr": RATE}, {"params": rest, "use_muon": False, "lr": RATE}]
    return Muon(groups, weight_decay=DECAY).step


def package_schedule_free(model: nn.Module) -> Step:
    """pytorch_optimizer's."""
    from pytorch_optimizer import ScheduleFreeAdamW

    return ScheduleFreeAdamW(model.parameters(), lr=RATE, weight_decay=DECAY).step


def authors_schedule_free(model: nn.Module) -> Step:
    """The authors'."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(model.parameters(), lr=RATE, weight_decay=DECAY)
    optimizer.train()
    return optimizer.step


ARMS: dict[str, Callable[[nn.Module], Step]] = {
    "muon": ours("muon"),
    "torch.optim.Muon + AdamW": torch_muon,
    "pytorch_optimizer.Muon": package_muon,
    "schedule_free": ours("schedule_free"),
    "pytorch_optimizer.ScheduleFreeAdamW": package_schedule_free,
    "schedulefree.AdamWScheduleFree": authors_schedule_free,
    "adamw": ours("adamw"),
}
PAIRS = (
    ("torch.optim.Muon + AdamW", "muon"),
    ("pytorch_optimizer.Muon", "muon"),
    ("pytorch_optimizer.ScheduleFreeAdamW", "schedule_free"),
    ("schedulefree.AdamWScheduleFree", "schedule_free"),
    ("adamw", "muon"),
    ("adamw", "schedule_free"),
)


def available() -> list[str]:
    """Arms whose package is installed."""
    packages = {name: name.partition(".")[0] for name in ARMS if "." in name}
    return [name for name in ARMS if name not in packages or importlib.util.find_spec(packages[name])]


def restart(number: int, network: str, blocks: int, steps: int) -> dict[str, list[float]]:
    """All arms in turn in this process: for each arm seconds per step, a number a block."""
    torch.set_num_threads(1)
    torch.manual_seed(number)
    runs: dict[str, Step] = {}
    times: dict[str, list[float]] = {name: [] for name in available()}
    for name in times:
        model = NETWORKS[network]()
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        runs[name] = ARMS[name](model)
        runs[name]()
    for _ in range(blocks):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(steps):
                run()
            times[name].append((time.perf_counter() - start) / steps)
    return times


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a network and pair."""
    rows = []
    for network in NETWORKS:
        found = []
        for number in range(options.restarts):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found.append(pool.submit(restart, number, network, options.blocks, options.steps).result())
        rows += [row(network, found, *pair) for pair in PAIRS if pair[0] in found[0]]
    return rows


def row(network: str, found: Sequence[Mapping[str, list[float]]], other: str, own: str) -> dict[str, Any]:
    """The medians of two arms and their ratio."""
    arms = [[r[name] for r in found] for name in (other, own)]
    seconds = [median(t for r in arm for t in r) for arm in arms]
    gained = ratio(*arms, level=LEVEL).plain()
    return {
        "network": network,
        "ours": own,
        "other": other,
        "seconds": seconds[1],
        "other_seconds": seconds[0],
        "ratio": gained,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ("network", "ours", "ms a step", "other", "ms a step", f"other / ours ({LEVEL:.0%})")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    for r in rows:
        gained = "{value:.2f} ({low:.2f} to {high:.2f}), {verdict}".format(**r["ratio"])
        mine, theirs = f"{1e3 * r['seconds']:.2f}", f"{1e3 * r['other_seconds']:.2f}"
        lines.append(f"| {' | '.join((r['network'], r['ours'], mine, r['other'], theirs, gained))} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in a block")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/optimizers.json")
    options = parser.parse_args(arguments)
    rows = measure(options)
    print(table(rows), flush=True)
    made = "Made by `python benchmarks/optimizers.py`, on one thread of a CPU; what the arms are stands there."
    atomic_write(TABLE, f"# A step of an optimizer\n\n{made}\n\n{table(rows)}")
    given = {"restarts": options.restarts, "blocks": options.blocks, "steps": options.steps}
    write_json(options.out, {"benchmark": "optimizers", "level": LEVEL, "options": given, "machine": facts(), "rows": rows})
    print(json.dumps({"benchmark": "optimizers", "out": str(options.out)}))


if __name__ == "__main__":
    main()
