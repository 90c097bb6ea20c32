"""Which widths run fast: staircases of every kind of layer, the granules found, and networks pruned with and without them.

    python benchmarks/widths.py                        # go on where the last call stopped; 25 minutes on two quiet cores
    python benchmarks/widths.py --only "openvino int8" # one runtime and precision
    python benchmarks/widths.py --only resnet20        # one network

Staircases: one layer, one example, one thread; the widths of a side are timed in turn in one process, by the processor's
time, without that of a call which computes nothing. The other side has 64 channels, maps are 28×28; matrices have 64 rows, and
256 on the other side; depthwise layers come as a chain of four. *Granule* is what `round_to = "auto"` takes, *least* the width
down to which halves of a granule pay, measured on chains. ExecuTorch and TorchInductor build every layer by itself, so they are
timed at fewer sides, by the clock; `round_to` takes defaults for the one, and what eager PyTorch has for the other. Networks:
channels, or in the transformer hidden units, are pruned alike in all layers (`scope = "layer"`), once by single units and once
by granules, to equal parameters; both and the unpruned network are then timed in fresh processes, in turn, on one thread,
restarts as the unit of the 99 % interval. Their weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from networks.of_timm import load_timm
from torch import nn

from quadriga import methods, runtime, workloads
from quadriga.core.copies import copy_model
from quadriga.core.errors import NotApplicable
from quadriga.core.files import atomic_write, read_json, write_json
from quadriga.core.granules import LEASTS, SIDES, WIDTHS, found, least
from quadriga.core.recipe import step
from quadriga.core.setup import Setup
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.engine.granules import Granules
from quadriga.engine.staircases import Times, branch, staircases
from quadriga.engine.timing import timed
from quadriga.measure.latency import paired
from quadriga.measure.machine import facts
from quadriga.measure.size import parameters

ROOT = Path(__file__).resolve().parents[1]
STATE, RESULTS, TABLE = Path("out/widths.json"), ROOT / "benchmarks/results/widths.json", ROOT / "docs/widths.md"
INT8 = QuantSpec()
RUNTIMES = {
    "onnxruntime float32": RuntimeSpec("onnxruntime", threads=1),
    "onnxruntime int8": RuntimeSpec("onnxruntime", threads=1, quant=INT8),
    "openvino float32": RuntimeSpec("openvino", threads=1),
    "openvino bfloat16": RuntimeSpec("openvino", threads=1, weights="bf16"),
    "openvino int8": RuntimeSpec("openvino", threads=1, quant=INT8),
    "executorch float32": RuntimeSpec("executorch", threads=1),
    "eager float32": RuntimeSpec("eager", threads=1),
    "inductor float32": RuntimeSpec("inductor", threads=1),
}
SHOWN = (8, 12, 16, 20, 24, 28, 32, 33, 36, 40, 48, 56, 64, 65, 68, 72, 80, 96, 112, 128, 144, 160, 192, 224, 256)  # columns
FEW, SLOW_SIDES = (8, 16, *WIDTHS), ("dense_out", "pointwise_out", "depthwise", "linear_out")
BATCHES, RESTARTS, LEFT = (1, 32), 6, 0.5
Row = dict[str, Any]


def steps_of(spec: RuntimeSpec) -> Row:
    """Staircases and granules of one runtime and precision; a side that fails has its reason in place of times."""
    state = runtime.probe()[spec.name]
    if not state.ok:
        return {"skipped": f"{state.reason}; {state.remedy}"}
    each = spec.name in ("executorch", "inductor")  # they build every layer by itself, which takes seconds
    rows: Row = {}
    for side in SLOW_SIDES if each else (*SIDES, *LEASTS):
        try:
            wide = None if side in LEASTS else {*WIDTHS, *SHOWN}
            times = one_by_one(side, spec) if each else staircases([side], spec, widths=wide)[side]
        except Exception as error:  # runtimes raise their own types
            rows[side] = {"skipped": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        granule = least(times) if side in LEASTS else found({w: t for w, t in times.items() if w in WIDTHS})
        rows[side] = {"granule": granule, "times": times}
    return {"sides": rows}


def one_by_one(side: str, spec: RuntimeSpec) -> Times:
    """Seconds at a few widths, where each has to be exported or compiled by itself."""
    arms = [(model, x[:1]) for model, x in (branch(side, width) for width in FEW)]
    setup = Setup.of(_images(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)), 3, 16))
    with tempfile.TemporaryDirectory() as folder:
        return dict(zip(FEW, timed(arms, spec, setup.context, Path(folder)), strict=True))


def _images(model: nn.Module, channels: int, size: int) -> Workload:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(64, channels, size, size, generator=draw), torch.arange(64) % 10
    return Workload(model=model, train=(x, y), val=(x, y), test=(x, y), trained=True)


def _timm(name: str, channels: int, size: int, **more: Any) -> Callable[[], Workload]:
    def make() -> Workload:
        timm = load_timm()
        torch.manual_seed(0)
        return _images(timm.create_model(name, num_classes=10, in_chans=channels, **more), channels, size)

    return make


# name → workload, the method that prunes it, runtimes
NETWORKS: dict[str, tuple[Callable[[], Workload], str, tuple[str, ...]]] = {
    "resnet20": (
        lambda: workloads.load("resnet20_fashion"), "prune_channels",
        ("onnxruntime float32", "openvino float32", "onnxruntime int8", "openvino int8"),
    ),
    "mobilenetv3_small_050": (
        _timm("mobilenetv3_small_050", 3, 64), "prune_channels", ("onnxruntime float32", "openvino float32"),
    ),
    "lcnet_050": (_timm("lcnet_050", 3, 64), "prune_channels", ("onnxruntime float32", "openvino float32")),
    "vit_tiny": (
        _timm("vit_tiny_patch16_224", 3, 96, img_size=96, depth=6), "prune_hidden", ("onnxruntime float32", "openvino float32"),
    ),
    "lenet": (lambda: workloads.load("lenet_fashion"), "prune_channels", ("onnxruntime float32", "openvino float32")),
}  # fmt: skip


def network(name: str, arm: str, granules: Granules) -> Row:
    """One network in one runtime: the unpruned one, and both pruned ones with nearly equal parameters, timed in turn."""
    make, method, _ = NETWORKS[name]
    spec = RUNTIMES[arm]
    if not runtime.probe()[spec.name].ok:
        return {"skipped": runtime.probe()[spec.name].reason}
    try:
        setup = Setup.of(make(), granules=granules)
    except ImportError as error:
        return {"skipped": f"{error}; pip install --no-deps timm"}
    setup = replace(setup, context=replace(setup.context, runtime=spec))
    whole = parameters(setup.model)
    wanted = 0.7 if method == "prune_hidden" else LEFT
    whole_granules, share = nearest(setup, method, "auto", wanted)
    single_units, plain = nearest(setup, method, 1, share)
    arms = {"unpruned": setup.model, "single units": single_units, "granules": whole_granules}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for label, model in arms.items():
            runtime.build(model.eval(), spec, setup.context, folder / label, BATCHES)
        given = {label: {"kind": "folder", "path": str(folder / label)} for label in arms}
        inputs = {batch: _inputs(setup, batch) for batch in BATCHES}
        timings = paired(given, inputs, restarts=RESTARTS, block_seconds=0.05, folder=folder / "timing")
    pairs = {"units": ("unpruned", "single units"), "granules": ("unpruned", "granules"), "gain": ("single units", "granules")}
    ratios = {f"{key} {batch}": _told(timings.ratio(*pair, batch)) for batch in BATCHES for key, pair in pairs.items()}
    sizes = {"parameters": whole, "left": share, "left in single units": plain}
    return {**sizes, "ratios": ratios, "disturbed": timings.disturbed, "errors": timings.errors}


def _inputs(setup: Setup, batch: int) -> Any:
    from quadriga.core.batch import resize

    return resize(setup.context.example, batch)


def _told(ratio: Any) -> list[float] | None:
    return [ratio.value, ratio.low, ratio.high] if ratio is not None and ratio.high < float("inf") else None


def nearest(setup: Setup, method: str, round_to: int | str, share: float) -> tuple[nn.Module, float]:
    """The pruned network whose share of parameters comes nearest, by bisection of the ratio, and that share."""
    low, high, tried = 0.02, 0.95, dict[float, nn.Module]()
    whole = parameters(setup.model)
    for _ in range(8):
        ratio = (low + high) / 2
        pruned = methods.build(step(method, ratio=ratio, scope="layer", round_to=round_to))
        try:
            model = pruned(replace(setup, model=copy_model(setup.model))).model
        except NotApplicable:  # so small a share that nothing goes
            low = ratio
            continue
        left = parameters(model) / whole
        tried[left] = model
        low, high = (ratio, high) if left > share else (low, ratio)
    best = min(tried, key=lambda left: abs(left - share))
    return tried[best], best


def table(known: Mapping[str, Row]) -> str:
    """Markdown."""
    return "\n".join(_lines(known)) + "\n"


def _lines(known: Mapping[str, Row]) -> Iterator[str]:
    yield "# Widths that run fast\n"
    yield "Made by `make bench-widths`. " + " ".join((__doc__ or "").split("\n\n")[2].split("\n")) + "\n"
    yield "## Granules found\n"
    yield "| runtime | " + " | ".join(side.replace("_", " ") for side in (*SIDES, *LEASTS)) + " |"
    yield "|---" * (len(SIDES) + len(LEASTS) + 1) + "|"
    for name, row in ((name, known[name]) for name in RUNTIMES if name in known):
        cells = [str(row.get("sides", {}).get(side, {}).get("granule", "–")) for side in (*SIDES, *LEASTS)]
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
    for name in RUNTIMES:
        yield from _skipped(name, known.get(name, {}))
    yield "## Networks pruned to equal parameters\n"
    yield "How many times as fast as the unpruned network, at batch 1 and 32; *gain* is granules over single units.\n"
    yield "| network | runtime | left | single units | granules | gain |"
    yield "|---|---|---|---|---|---|"
    for key, row in known.items():
        if "ratios" in row:
            name, arm = key.split(" in ")
            cells = [" / ".join(_cell(row["ratios"][f"{what} {b}"]) for b in BATCHES) for what in ("units", "granules", "gain")]
            yield f"| {name} | {arm} | {row['left in single units']:.2f}, {row['left']:.2f} | " + " | ".join(cells) + " |"
    yield ""
    for name in RUNTIMES:
        yield from _staircase(name, known.get(name, {}))


def _skipped(name: str, row: Row) -> Iterator[str]:
    if "skipped" in row:
        yield f"{name} was left out: {row['skipped']}\n"
    for side, one in row.get("sides", {}).items():
        if "skipped" in one:
            yield f"{name}, {side.replace('_', ' ')}: {one['skipped']}\n"


def _cell(ratio: list[float] | None) -> str:
    return "–" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def _staircase(name: str, row: Row) -> Iterator[str]:
    sides = {side: one for side, one in row.get("sides", {}).items() if "times" in one and side not in LEASTS}
    if not sides:
        return
    yield f"## Staircases: {name}\n"
    yield "Seconds over those at width 64.\n"
    widths = [w for w in SHOWN if all(str(w) in one["times"] for one in sides.values())]
    yield "| side | µs at 64 | " + " | ".join(map(str, widths)) + " |"
    yield "|---" * (len(widths) + 2) + "|"
    for side, one in sides.items():
        base = one["times"]["64"]
        cells = [f"{one['times'][str(w)] / base:.2f}" for w in widths]
        yield f"| {side.replace('_', ' ')} | {1e6 * base:.0f} | " + " | ".join(cells) + " |"
    yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runtimes with precision, or networks, comma-separated")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--state", type=Path, default=STATE, help="rows so far; a stopped call goes on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known: dict[str, Row] = read_json(asked.state) if asked.state.exists() else {}
    granules = Granules(asked.state.parent / "granules")
    for key, job in jobs(asked.only.split(",") if asked.only else [], granules):
        if key in known and not asked.fresh:
            continue
        start = time.monotonic()
        known[key] = json.loads(json.dumps({**job(), "seconds": round(time.monotonic() - start, 1)}))
        write_json(asked.state, known)
        print(f"{key}: {known[key]['seconds']} s", file=sys.stderr, flush=True)
    write_json(asked.out, {"benchmark": "widths", "machine": facts(), "rows": known})
    atomic_write(asked.table, table(known))
    print(json.dumps({"benchmark": "widths", "out": str(asked.out), "rows": len(known)}))
    return 0


def jobs(only: list[str], granules: Granules) -> Iterator[tuple[str, Callable[[], Row]]]:
    """What is to be measured, by the name that it is kept under."""
    for name, spec in RUNTIMES.items():
        if not only or name in only:
            yield name, lambda spec=spec: steps_of(spec)  # type: ignore[misc]
    for name, (_, _, arms) in NETWORKS.items():
        for arm in arms if not only or name in only else ():
            yield f"{name} in {arm}", lambda name=name, arm=arm: network(name, arm, granules)  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main())
