"""Records → the report's document: what is shown, in which order, and in which words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from quadriga.report import plots, text
from quadriga.report.document import Block, Bullets, Code, Document, Figure, Section, Table, Text
from quadriga.report.evidence import against, front, steps
from quadriga.report.layers import profile
from quadriga.report.verdict import key_figures, sentence

Records = Mapping[str, Any]
LOAD = """import sys

sys.path.insert(0, {})
from load import load

model = load()  # checks itself against its probes
outputs = model(inputs)"""


def document(records: Records) -> Document:
    """The whole report of completed records (see `schema.complete`)."""
    makers = (winner, against, floor, front, steps, profile, tried, refused, spent, data, machine, again)
    result = records["result"]
    name = str(result["workload"] or records["workload"].get("name") or "study")
    sections = tuple(s for s in (make(records) for make in makers) if s.blocks)
    return Document(name, result["status"], sentence(records), key_figures(records), sections)


def facts(pairs: Mapping[str, Any], title: str = "") -> Table:
    """Two columns, a name and its value, in the unit that the name says."""
    return Table(("", "value"), tuple((str(k), text.fact(str(k), v)) for k, v in pairs.items()), title=title)


def winner(records: Records) -> Section:
    """The recipe, and the winner beside the baseline."""
    result = records["result"]
    best, base = result["winner"], result["baseline"] or {}
    if not best:
        return nearest_miss(result.get("nearest_miss") or {})
    recipe = recipe_table(best["recipe"])
    unit = best["quality"]["unit"]
    rows = (
        (best["quality"]["metric"], text.quality(base.get("quality"), unit), text.quality(best["quality"]["value"], unit)),
        ("bytes", text.size(base.get("bytes")), _share(base.get("bytes"), best["bytes_ratio"], text.size)),
        (
            "parameters",
            text.number(base.get("parameters")),
            _share(base.get("parameters"), best["parameters_ratio"], text.number),
        ),
        *_memory(best, base),
        *_training(best, base),
    )
    beside = Table(("", "baseline", "winner"), rows, numeric=("baseline", "winner"))
    families = ", ".join(best["families"]) or "none"
    return Section("winner", "The winner", (Text(f"Its steps, in order; families that pay: {families}."), recipe, beside))


def _memory(best: Mapping[str, Any], base: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Peak memory beyond what PyTorch itself takes, where it was measured."""
    whole, share = base.get("peak_memory"), best.get("memory_ratio")
    return (
        []
        if share is None
        else [("peak memory beyond PyTorch, runtime included", text.size(whole), _share(whole, share, text.size))]
    )


def _training(best: Mapping[str, Any], base: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What training costs: in samples, seconds and FLOPs where all are known, else the one ratio."""
    shares = best.get("train_cost") or {}
    if not any(v is not None for v in shares.values()):
        return [("training time", text.ratio(1.0), text.ratio(best["train_cost_ratio"]))]
    writers = {"samples": text.number, "seconds": text.seconds, "flops": text.operations}
    wholes = {key: base.get(f"train_{key}") for key in writers}
    return [
        (f"training, {key.replace('flops', 'FLOPs')}", write(wholes[key]), _share(wholes[key], shares[key], write))
        for key, write in writers.items()
        if shares.get(key) is not None
    ]


def nearest_miss(miss: Mapping[str, Any]) -> Section:
    """What came closest when nothing qualified."""
    rest = {k: v for k, v in miss.items() if k not in ("recipe", "quality") and v is not None} | dict(miss.get("quality") or {})
    blocks = ([recipe_table(miss["recipe"])] if miss.get("recipe") else []) + ([facts(rest)] if rest else [])
    return Section("winner", "The nearest miss", tuple(blocks))


def recipe_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A recipe's steps, numbered."""
    steps = tuple((str(i), str(s.get("method")), text.fields(s) or text.NONE) for i, s in enumerate(rows, 1))
    return Table(("", "step", "fields"), steps, numeric=("",))


def _share(whole: float | None, share: float, write: Any) -> str:
    part = None if whole is None else whole * share
    return text.ratio(share) if part is None else f"{write(round(part) if part >= 100 else part)} ({text.ratio(share)})"


def floor(records: Records) -> Section:
    """What was promised, what the data can prove, and what was found."""
    given, best = records["floor"], records["result"]["winner"]
    if not given:
        return Section("floor", "The floor", ())
    unit = records["workload"].get("unit", "")
    rows = [
        ("the floor asked for", str(given.get("text", text.NONE))),
        ("the loss allowed", text.quality(given.get("margin"), unit)),
        ("the smallest that this data can prove", text.quality(given.get("smallest_provable"), unit)),
    ]
    if best:
        found = best["quality"]
        rows += [
            ("the difference found", text.signed(found["difference"], unit)),
            ("its lower bound, one-sided", text.signed(found["low"], unit)),
            ("confidence of the bound", text.percent(best.get("quality_level") or given.get("level"))),
            ("paired examples", text.number(found["n"])),
            ("examples predicted differently", text.percent(found.get("disagreement"))),
        ]
        if found.get("certificate") is not None:
            rows.append(("lost at most, by that rate alone, without labels", text.quality(found["certificate"], unit)))
    return Section("floor", "The floor", (Table(("", "value"), tuple(rows)),))


def tried(records: Records) -> Section:
    """Every trial, counted and listed."""
    trials, unit = records["trials"], records["workload"].get("unit", "")
    if not trials:
        return Section("trials", "What was tried", ())
    counts = Counter((t["stage"], t["status"]) for t in trials)
    summary = Table(("stage", "how it ended", "trials"), tuple((s, e, str(n)) for (s, e), n in counts.items()), ("trials",))
    rows = []
    for t in trials:
        values = t.get("values", {})
        rows.append(
            (
                str(t["number"]),
                t["stage"],
                t.get("name") or " → ".join(str(s.get("method")) for s in t["recipe"]) or "(unchanged)",
                t["status"],
                text.quality(values.get("quality"), unit),
                text.seconds(values.get("latency/1")),
                text.size(values.get("bytes")),
                text.seconds(values.get("seconds")),
                t.get("reason") or text.NONE,
            )
        )
    columns = ("trial", "stage", "recipe", "ended", "quality", "batch 1", "bytes", "took", "reason")
    numeric = ("trial", "quality", "batch 1", "bytes", "took")
    full = Table(columns, tuple(rows), numeric, title=f"All {len(rows)} trials", fold=True)
    return Section("trials", "What was tried", (summary, full))


def refused(records: Records) -> Section:
    """What could not be used here, and what would change that."""
    rows = tuple(
        (str(r["method"]), str(r["reason"]), str(r.get("remedy") or text.NONE), str(r.get("count", 1)))
        for r in records["refused"]
    )
    table = Table(("method", "why", "what would change it", "times"), rows, ("times",))
    return Section("refused", "What was refused, and why", (table,) if rows else ())


def spent(records: Records) -> Section:
    """Where the time went, and what it did not allow."""
    budget = records["budget"]
    blocks: list[Block] = []
    if phases := budget.get("phases"):
        caption = "One bar a phase, in order; the dashed line is the budget."
        blocks.append(Figure("budget", plots.budget(phases, budget.get("seconds")), caption))
    if budget:
        used = f"Used {text.seconds(budget.get('spent'))} of {text.seconds(budget.get('seconds'))}."
        blocks.append(Text(used))
        rows = tuple((p["name"], text.seconds(p["seconds"])) for p in phases or ())
        blocks += [Table(("phase", "took"), rows, ("took",), title="Phases", fold=True)] if rows else []
    if records["not_allowed"]:
        blocks += [Text("What the budget did not allow:"), Bullets(tuple(map(str, records["not_allowed"])))]
    return Section("budget", "Budget", tuple(blocks))


def data(records: Records) -> Section:
    """The data, its splits, when they were opened, the seeds, the baseline."""
    given = dict(records["workload"])
    blocks: list[Block] = [facts(given)] if given else []
    if records["seeds"]:
        blocks.append(Text(f"Seeds: {text.plain(records['seeds'])}."))
    opened = tuple((str(s["split"]), text.moment(s["when"]), text.plain(s["by"])) for s in records["splits_opened"])
    if opened:
        blocks.append(Table(("split", "opened", "by"), opened, title="Which split was opened when"))
    if records["baseline"]:
        blocks.append(facts(records["baseline"], "The baseline"))
    return Section("data", "Data, splits and seeds", tuple(blocks))


def machine(records: Records) -> Section:
    """What it ran on, and notes."""
    blocks: list[Block] = [facts(records["environment"])] if records["environment"] else []
    if others := records["timing"].get("others"):
        share = text.percent(sum(others) / len(others))
        blocks.append(Text(f"While the verification was timed, other processes took {share} of the machine's cores."))
    if records["notes"]:
        blocks.append(Bullets(tuple(map(str, records["notes"]))))
    return Section("environment", "Environment and notes", tuple(blocks))


def again(records: Records) -> Section:
    """How to repeat the study, and how to use what came out."""
    blocks: list[Block] = [Text("The same study:"), Code(records["command"])] if records["command"] else []
    if folder := records["result"]["artifact"]:
        blocks += [
            Text("The artifact runs without Quadriga, here from the report's folder:"),
            Code(LOAD.format(repr(str(folder))), "python"),
        ]
    return Section("reproduce", "Reproduce it, and load it", tuple(blocks))
