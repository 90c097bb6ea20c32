"""What a worker does: probe a recipe's cost, or train it and measure its quality. Plain data in and out."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quadriga import artifact, runtime
from quadriga.core.batch import Tree, call
from quadriga.core.copies import copy_model
from quadriga.core.errors import BadInput, Diverged, Mishap, NotApplicable, NotWorthwhile
from quadriga.core.files import disk_is_full
from quadriga.core.folders import BUILT, TIMING
from quadriga.core.metric import Metric
from quadriga.core.products import products_kept
from quadriga.core.recipe import Recipe
from quadriga.core.setup import PROBE, Arm, Context, Setup
from quadriga.core.slots import RuntimeSpec
from quadriga.core.trial import Status
from quadriga.core.workload import Workload
from quadriga.engine.decisions import settled
from quadriga.engine.granules import Granules
from quadriga.engine.pace import Paces, paced
from quadriga.engine.timing import ROUGH, in_turn, timed
from quadriga.engine.walk import Walked, walk
from quadriga.measure.arm import load_folder
from quadriga.measure.ceilings import Ceilings, ceilings
from quadriga.measure.flops import flops as forward_flops
from quadriga.measure.guess import guess
from quadriga.measure.latency import paired
from quadriga.measure.machine import fingerprint
from quadriga.measure.quality import Scores, score
from quadriga.measure.roofline import profile
from quadriga.measure.size import parameters, weight_bytes
from quadriga.parallel import group
from quadriga.runtime.standalone.folder import tidy
from quadriga.train.loop import fit
from quadriga.verify.equal import equal
from quadriga.verify.fake import fakes
from quadriga.verify.quality import standard_error

PATIENCE = 6.0  # seconds, after which training steps are not timed again
Progress = Callable[[float], None]
Run = Callable[[Tree], Tree]


class Desk:
    """One worker's place: the workload, and the reference that latencies are measured against in turn.

    Args:
        workload: loaded once.
        folder: the study's folder; checkpoints, builds and scores are kept below it.
        seed: of every trial.
        progress: called now and then with the done fraction of a train step.
    """

    def __init__(self, workload: Workload, folder: Path, seed: int, progress: Progress | None = None) -> None:
        self.workload, self.folder, self.seed, self.progress = workload, folder, seed, progress
        self._reference: Run | None = None
        self._context: Context | None = None  # for timings: made when one is asked for
        self._plain: Setup | None = None
        self._floor: Mapping[str, Any] | None = None  # {"quality", "margin", "scores"} of the baseline on val, once known
        self._scrap: list[Path] = []
        self.granules = Granules()
        self.machine = fingerprint()

    def do(self, task: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a task by name; every way to fail is a plain record with `status` and `reason`. Each names the machine."""
        return {**self._done(task, args), "machine": self.machine}

    def _done(self, task: str, args: Mapping[str, Any]) -> dict[str, Any]:
        recipe = Recipe.from_plain(args.get("recipe", []))
        self._floor = args.get("floor")
        try:
            return {"status": Status.COMPLETE, **getattr(self, f"_{task}")(recipe, args)}
        except NotApplicable as refusal:
            step = getattr(refusal, "__notes__", [None])[-1]
            told = {"reason": refusal.reason, "remedy": refusal.remedy, "step": step, "place": refusal.place}
            return {"status": Status.REFUSED, **told, "idle": isinstance(refusal, NotWorthwhile)}
        except Diverged as error:
            return {"status": Status.DIVERGED, "reason": str(error)}
        except Mishap as error:
            return {"status": Status.LOST, "reason": error.problem, "remedy": error.remedy}
        except BadInput as error:
            return {"status": Status.FAILED, "reason": str(error), "bad_input": [error.problem, error.remedy]}
        except MemoryError as error:
            return {"status": Status.OUT_OF_MEMORY, "reason": f"out of memory: {error}"}
        except (Exception, SystemExit) as error:  # a trial's failure is a result; the search goes on
            if group.together():  # another rank died, or will have to: all start again
                raise
            return _ended(error)
        finally:
            while self._scrap:
                shutil.rmtree(self._scrap.pop(), ignore_errors=True)
            tidy()
            gc.collect()

    def _cost(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Bytes, parameters and speed of a recipe whose train steps are skipped; its weights are not trained."""
        paces = self._paces(recipe) if args.get("objective") == "train_cost" else None
        walked = self._probe(recipe, before_train=paces.note if paces else None)
        pace = {"pace": paces.ratio(PATIENCE)} if paces else {}
        left = {"left": [list(pair) for pair in walked.left]} if walked.left else {}
        return {"values": {**self._measure(walked, args), **pace}, "info": left}

    def _measure(self, walked: Walked, args: Mapping[str, Any]) -> dict[str, float]:
        model = walked.setup.model.eval()
        values = {"parameters": float(parameters(model)), "flops": float(forward_flops(model, self.workload.inputs(1)))}
        run, size = self._executable(walked, args.get("name", f"cost-{args['hash']}"), keep="name" in args)
        values["bytes"] = float(size)
        for batch in args["batches"]:
            values[f"speed/{batch}"] = self._speed(run, batch, args.get("seconds", 0.3))
        return values

    def _executable(self, walked: Walked, name: str, *, keep: bool) -> tuple[Run, int]:
        folder = self.folder / BUILT / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        setup = walked.setup
        try:
            built = runtime.build(setup.model.eval(), setup.runtime, setup.context, folder, (1, self.workload.batch_size))
        except NotApplicable as refusal:
            if setup.runtime.name != "eager" or setup.runtime.quant is not None or setup.runtime.alone is not None:
                raise _blamed(refusal, walked) from refusal.__cause__
            return _Live(runtime.prepare(setup.model.eval(), setup.runtime)), weight_bytes(setup.model)
        run = built.run()
        if not keep:
            self._scrap.append(folder)  # a runtime may read its files when it is first called
        return run, built.bytes

    def _speed(self, run: Run, batch: int, seconds: float) -> float:
        """How many times faster than the reference, blocks in turn; for ranking, not for claims."""
        inputs = self.workload.inputs(batch)
        reference = self._reference or self._make_reference()
        with torch.inference_mode():
            slow, fast = in_turn([lambda: reference(inputs), lambda: run(inputs)], rounds=ROUGH, seconds=seconds / (2 * ROUGH))
        return slow / fast

    def _make_reference(self) -> Run:
        """The unchanged model in ONNX Runtime on one thread, else in eager PyTorch.

        Candidates mostly run there too, so that what disturbs one disturbs the other alike: against eager PyTorch, a
        neighbour on the other core made the same candidate 7.9 or 15 times faster.
        """
        model = self.workload.build(self.seed).eval()
        self._reference = lambda inputs: call(model, inputs)
        spec = RuntimeSpec("onnxruntime", threads=1)
        folder = self.folder / BUILT / f"reference-{os.getpid()}"
        with suppress(Exception):  # whatever stands behind it, the candidates for that runtime say so themselves
            run = runtime.build(model, spec, Setup.of(self.workload, self.seed).context, folder).run()
            run(self.workload.inputs(self.workload.batch_size))
            self._reference = run
        return self._reference

    def _eager_variant(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Speed of the unchanged model in eager PyTorch under a runtime specification."""
        setup = self._probe(recipe).setup
        threads = torch.get_num_threads()
        with products_kept():
            try:
                run = runtime.prepare(setup.model.eval(), setup.runtime)
                speeds = {f"speed/{b}": self._speed(run, b, args.get("seconds", 0.3)) for b in args["batches"]}
            finally:
                torch.set_num_threads(threads)
        return {"values": speeds, "spec": asdict(setup.runtime)}

    def _profile(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Where the time of the unchanged model goes in eager PyTorch, layer by layer, at each batch size."""
        threads, model = torch.get_num_threads(), self.workload.build(self.seed)
        limits = ceilings(threads)
        batches = [self._layers(model, batch, limits) for batch in args["batches"]]
        found = {"threads": threads, "ceilings": limits.plain(), "batches": batches}
        return {"values": {f"latency/{b['batch']}": b["seconds"] for b in batches}, "info": {"profile": found}}

    def _layers(self, model: nn.Module, batch: int, limits: Ceilings) -> dict[str, Any]:
        rows = profile(model, self.workload.inputs(batch), repeats=50, seconds=1.0, ceiling=limits)
        return {"batch": batch, "seconds": sum(row["seconds"] for row in rows), "layers": rows}

    def _rehearse(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """What a training of the recipe would be refused for, found on untrained weights: its steps, optimizers and export."""
        walked = self._probe(recipe, rehearsal=True, before_train=_begun)
        if PROBE in walked.setup.traits:  # else it was trained before
            self._executable(walked, f"rehearsal-{recipe.hash}", keep=False)
        return {"values": {}}

    def _follow(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Train, and nothing else: what all processes do that train together."""
        self._walk(recipe)
        return {"values": {}}

    def _train(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Train, realise, and measure quality on val through the very runtime that the recipe names.

        With "keep" what was realised stays in work/built/train-HASH, so that it can become the artifact.
        """
        walked = self._walk(recipe)
        run, size = self._executable(walked, f"train-{args['hash']}", keep=bool(args.get("keep")))
        parts = self._scored_parts(run, "val", f"{args['hash']}.npz", walked.setup.runtime.alone is not None)
        scores = min(parts, key=lambda part: self.workload.metric.gain(part["quality"], 0.0))
        model = walked.setup.model
        sizes = {"bytes": float(size), "parameters": float(parameters(model))}
        values = {"quality": scores["quality"], **sizes, **self._training_cost(walked)}
        kept = {
            "checkpoint": _name(walked),
            "decisions": list(walked.decisions),
            "notes": [*walked.notes, *_passed_over(walked)],
        }
        if args.get("guess"):
            kept["guess"] = self._guess(run, scores["path"])
        if walked.staleness:
            kept["staleness"] = list(walked.staleness)
        return {"values": values, "info": {"scores": scores["path"], **kept}}

    def _guess(self, run: Run, scores: str) -> dict[str, Any] | None:
        """What guessing reaches on val, and whether the model is better, whose scores are in a file."""
        metric = self.workload.metric
        assert isinstance(metric, Metric), "a workload replaces names when it is made"
        found = guess(run, self.workload.val, metric, Scores.load(self.folder / scores))
        return found and found.plain()

    def _training_cost(self, walked: Walked) -> dict[str, float]:
        """Samples, seconds, and FLOPs: forward and backward of the finished network are three forward passes a sample."""
        forward = forward_flops(walked.setup.model, self.workload.inputs(1))
        seconds = {"seconds": walked.seconds, "cpu_seconds": walked.cpu_seconds}
        return {"samples": float(walked.samples), **seconds, "train_flops": 3.0 * walked.samples * forward}

    def _walk(self, recipe: Recipe) -> Walked:
        store = self.folder / "checkpoints"
        return walk(self.workload, recipe, seed=self.seed, store=store, progress=self.progress, **self._places())

    def _probe(self, recipe: Recipe, **options: Any) -> Walked:
        """A walk that trains nothing. What it decides by measurement, a training of the same recipe takes over."""
        ready = self.folder / "checkpoints"
        return walk(self.workload, recipe, seed=self.seed, store=None, ready=ready, **self._places(), **options)

    def _places(self) -> dict[str, Any]:
        """What methods may ask of a model on their way, its quality on val and its latency; and where decisions are kept."""
        enough = self._enough if self._floor else None
        services = {"evaluate": self._quality, "enough": enough, "time": self._time, "pace": self._step_seconds}
        return {"services": {**services, "granules": self.granules}, "decisions": self.folder / "decisions"}

    def _quality(self, model: nn.Module) -> float:
        return score(model, self.workload.val, self.workload.metric).value

    def _enough(self, model: nn.Module, own: float | None = None) -> bool:
        """Whether a model's quality on val is within the floor, or misses it by no more than one standard error: what chance
        takes away in one choice of layers it gives back in the next, and a search for few layers would follow it.

        Args:
            own: quality of the model as it was before the change that is judged. Where that misses the floor itself, as at an
                early training length, the change may lose as much of it as the floor allows.
        """
        assert self._floor is not None
        metric = self.workload.metric
        assert isinstance(metric, Metric), "a workload replaces names when it is made"
        found, kept = score(model, self.workload.val, metric), self.folder / (self._floor.get("scores") or ".")
        doubt = standard_error(Scores.load(kept), found, metric) if kept.is_file() else 0.0  # another machine has no file
        base = self._floor["quality"]
        if own is not None and metric.gain(own, base) < 0:
            base = own
        return metric.gain(found.value, base) + doubt >= -self._floor["margin"]

    def _step_seconds(self, setups: Sequence[Setup]) -> list[float]:
        """Seconds of training per example of each setup; for decisions and for ranking."""
        return paced(setups, self.workload.train, seconds=PATIENCE, seed=self.seed)

    def _time(self, arms: Sequence[Arm], spec: RuntimeSpec) -> list[float]:
        """Seconds per call of each arm; for decisions inside a method, not for claims."""
        if self._context is None:
            self._context = Setup.of(self.workload, self.seed).context
        return timed(arms, spec, self._context, self.folder / BUILT)

    def plain_setup(self) -> Setup:
        """The baseline as it stands before its train step; or the untouched model, where it needs none."""
        if self._plain is None:
            recipe = self.workload.baseline or Recipe()
            first = next((i for i, s in enumerate(recipe.steps) if s.is_train), None)
            self._plain = self._probe(recipe, until=first).setup
        return self._plain

    def _scored_parts(self, run: Run, split: str, name: str, alone: bool) -> list[dict[str, Any]]:
        """In batches; and one by one, where another runtime executes a batch of one."""
        return [self._scored(run, split, name), *([self._scored(run, split, f"alone-{name}", 1)] if alone else [])]

    def _scored(self, run: Run, split: str, name: str, batch: int = 256) -> dict[str, Any]:
        with torch.inference_mode():
            scores = score(run, getattr(self.workload, split), self.workload.metric, batch)
        path = self.folder / "scores" / name
        scores.save(path)
        return {"quality": scores.value, "path": str(path.relative_to(self.folder))}

    def _pace(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds that a recipe's training will take, going by a few steps."""
        first = next(i for i, s in enumerate(recipe.steps) if s.is_train)
        setup = self._probe(recipe, until=first).setup
        setup = replace(setup, training=replace(setup.training, asynchronous=None))  # workers take long to come up
        size = setup.training.batch_size
        few = min(len(self.workload.train), 4 * size)
        fit(setup, self.workload.train, epochs=few / len(self.workload.train), seed=self.seed)
        outcome = fit(setup, self.workload.train, epochs=2 * few / len(self.workload.train), seed=self.seed)
        epochs = sum(s.fields.get("epochs", 10) for s in recipe.steps if s.is_train)
        whole = outcome.seconds / outcome.samples * epochs * len(self.workload.train)
        return {"values": {"seconds": whole, "step": outcome.seconds / outcome.steps}}

    def _export(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Export the untrained model for the runtime that asks least of it; refused, there is none that could run it."""
        setup, folder = self._probe(recipe).setup, self.folder / BUILT / f"export-{args['hash']}"
        self._scrap.append(folder)
        runtime.build(setup.model.eval(), RuntimeSpec(), setup.context, folder, (1, self.workload.batch_size))
        return {"values": {}}

    def _build(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Realise an untrained recipe in a folder that stays, for timing."""
        self._executable(self._probe(recipe), args["name"], keep=True)
        return {"values": {}}

    def _realize(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Realise a trained recipe in a folder that stays, and compare it with the model that it came from."""
        walked = self._walk(recipe)
        run, size = self._executable(walked, args["name"], keep=True)
        setup = walked.setup
        if setup.runtime.exact and not isinstance(run, _Live):
            largest = max(args["batches"])
            inputs, compute = (
                self.workload.inputs(largest),
                runtime.open_built(self.folder / BUILT / args["name"]).entry["computes"],
            )
            found = equal(lambda x: call(setup.model, x), run, inputs, compute=compute, batches=(1, 2, largest))
            if not found.holds:
                raise NotApplicable(f"the exported model differs from the trained one: {found.failures[0]}", runtime.PYTORCH)
        values = {"bytes": float(size), "parameters": float(parameters(setup.model)), **self._training_cost(walked)}
        info = {"checkpoint": _name(walked), "live": isinstance(run, _Live), "decisions": list(walked.decisions)}
        told = {"bytes": size, "baseline_bytes": args.get("baseline_bytes"), "bits": setup.runtime.bits}
        found = fakes(setup.model, self.workload.build(self.seed), **told)
        return {"values": values, "info": {**info, "fakes": found, "realized": [_names(setup.runtime), setup.runtime.storage]}}

    def _score(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Quality of a realised folder, or of a trained recipe as eager PyTorch runs it, on a split."""
        alone = False
        if args.get("folder"):
            folder = self.folder / args["folder"]
            run, alone = load_folder(folder), runtime.open_built(folder).spec.alone is not None
        else:
            model = self._walk(recipe).setup.model.eval()
            run = lambda inputs: call(model, inputs)  # noqa: E731
        parts = self._scored_parts(run, args["split"], f"{args['split']}-{args['name']}.npz", alone)
        info = {"scores": parts[0]["path"], **({"alone": parts[1]["path"]} if alone else {})}
        return {"values": {"quality": parts[0]["quality"]}, "info": info}

    def _artifact(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Write the artifact of a trained recipe, from what was realised and verified where there is such a folder."""
        walked = self._walk(recipe)
        setup = walked.setup
        built = runtime.open_built(self.folder / args["folder"], setup.runtime) if args.get("folder") else None
        source = self.workload.calibration_source
        probes = source.fixed(torch.arange(min(64, len(source)))).inputs
        written_out = len(recipe.on(self.workload.baseline or Recipe()).steps) - len(recipe.steps)
        folder = artifact.write(
            self.folder / "artifact", setup.model.eval(), setup.runtime, setup.context,
            recipe=settled(recipe, walked.decisions, written_out), built=built,
            evidence=args["evidence"], probes_inputs=probes, batches=args["batches"], card=args.get("card"),
        )  # fmt: skip
        return {"values": {"bytes": float(artifact.bytes_of(folder))}}

    def _paces(self, recipe: Recipe) -> Paces:
        return Paces(recipe, self.workload.baseline or Recipe(), self.plain_setup(), self.workload.train, self.seed)

    def _step_cost(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Blocks of training steps of the baseline and of a recipe in turn: seconds per example, for a claim."""
        paces = self._paces(recipe)
        self._probe(recipe, before_train=paces.note)
        return {"values": {}, "info": {"blocks": paces.blocks(args["blocks"], args["seconds"])}}

    def _timings(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Latency of arms in turn, each in its own process, as plain `Timings`: for a driver on another machine."""
        inputs = {batch: self.workload.inputs(batch) for batch in args["batches"]}
        found = paired(args["arms"], inputs, folder=self.folder / TIMING, **args["how"])
        return {"values": {}, "info": {"timings": found.plain()}}

    def _hello(self, recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing, for so many seconds: engines are tested and measured with it."""
        time.sleep(args.get("seconds", 0.0))
        return {"values": {}}


class _Live:
    """A model that cannot be exported, run as it is; the bytes of its weights stand for its file."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, inputs: Tree) -> Tree:
        return self.run(inputs)


def _ended(error: Exception | SystemExit) -> dict[str, Any]:
    """How a task ended that raised: by the machine; refused, where a runtime cannot take the model; or failed."""
    if isinstance(error, SystemExit):
        return {"status": Status.FAILED, "reason": f"the code that it ran called sys.exit({error.code!r})"}
    if isinstance(error, RuntimeError) and ("not enough memory" in str(error) or "out of memory" in str(error)):
        return {"status": Status.OUT_OF_MEMORY, "reason": _brief(error)}
    if disk_is_full(error):
        return {"status": Status.LOST, "reason": f"the disk is full: {_brief(error)}", "remedy": "free space and try again"}
    if refused := runtime.refusal(error):
        return {"status": Status.REFUSED, "reason": refused.reason, "remedy": refused.remedy, "step": None}
    return {"status": Status.FAILED, "reason": _brief(error)}


def _blamed(refusal: NotApplicable, walked: Walked) -> NotApplicable:
    """The refusal of a runtime, with the step that it can be laid to: that of the rounding, where there is one."""
    if walked.rounds is not None and refusal.place is None:
        refusal.place = walked.rounds[0]
        refusal.add_note(walked.rounds[1])
    return refusal


def _passed_over(walked: Walked) -> list[str]:
    return [f"{step} passed over what does not apply: {why}" for step, why in walked.left]


def _begun(setup: Setup, index: int) -> None:
    """Begin a train step on a copy of the model, for what its optimizer and its hooks refuse."""
    model = copy_model(setup.model)
    optimizer = setup.optimizer.make(model)
    for hook in setup.optimizer.make_hooks:
        hook(model, optimizer)
    for make in setup.training.make_hooks:
        make(model)


def _name(walked: Walked) -> str | None:
    return walked.checkpoint.name if walked.checkpoint else None


def _names(spec: RuntimeSpec) -> str:
    return " and ".join(dict.fromkeys([*([spec.alone.name] if spec.alone else []), spec.name]))


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
