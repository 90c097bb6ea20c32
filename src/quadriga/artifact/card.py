"""The artifact's README: what it is, how good, how fast, its limits, how to load it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from quadriga.core.recipe import Recipe
from quadriga.runtime import Built
from quadriga.runtime.standalone import runtimes


def escape(value: object) -> str:
    """Text for Markdown: no HTML, no markup, one line.

    Example:
        >>> escape("<b>a|b</b>")
        '&lt;b&gt;a\\\\|b&lt;/b&gt;'
    """
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", html.escape(line, quote=False))


OPPONENTS = {
    "eager": "the unchanged model in eager PyTorch",
    "tuned_eager": "the unchanged model in tuned eager PyTorch",
    "lossless_export": "the unchanged model's best lossless export",
}


def render(card: Mapping[str, Any], built: Built, recipe: Recipe) -> str:
    """The card as Markdown with a YAML header.

    Args:
        card: "title", "about", "limits" (list), "winner" and "baseline" (as in result.json), "machine" (facts), "command"
            and "seed", each optional.
        built: gives runtime, structure and bytes.
        recipe: its steps are listed.
    """
    title = str(card.get("title") or "model")
    winner = card.get("winner") or {}
    entry = built.entry
    head = {
        "library_name": "quadriga",
        "title": title,
        "tags": ["quadriga", *runtimes(entry)],
        "runtime": " and ".join(runtimes(entry)),
        "bytes": built.bytes,
        "recipe": recipe.hash,
    }
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=True)}" for key, value in head.items()), "---", ""]
    lines += [f"# {escape(title)}", "", escape(card.get("about") or "A model made cheaper by Quadriga."), ""]
    lines += [
        "## How it was made",
        "",
        *(f"{n}. {escape(s)}" for n, s in enumerate(recipe.steps, 1)),
        *([] if recipe.steps else ["The model as it was."]),
        "",
        *_again(card),
    ]
    lines += _quality(winner.get("quality")) + _latency(winner.get("latency_ratio"), card.get("machine") or {})
    lines += _sizes(winner, card.get("baseline") or {}, built)
    lines += ["## Limits", "", *(f"- {escape(item)}" for item in _limits(card, entry)), ""]
    return "\n".join([*lines, *_loading(entry), ""])


def _again(card: Mapping[str, Any]) -> list[str]:
    """The command that made it, which no name in it can leave."""
    if not card.get("command"):
        return []
    command = " ".join(str(card["command"]).split())
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", command))])
    return [f"By the seed {escape(card.get('seed', 0))} and this command:", "", fence, command, fence, ""]


def _quality(quality: Mapping[str, Any] | None) -> list[str]:
    if not quality:
        return []
    unit = quality.get("unit", "")
    rows = [
        f"- {escape(quality.get('metric', 'metric'))}: {_number(quality.get('value'))} {escape(unit)}"
        f" (baseline {_number(quality.get('baseline'))})",
        f"- difference {_number(quality.get('difference'))}, not below {_number(quality.get('low'))} {escape(unit)}",
        f"- {_number(quality.get('n'))} examples, predictions differ on {_percent(quality.get('disagreement'))} of them",
    ]
    if quality.get("certificate") is not None:
        rows.append(f"- by that rate alone, without labels: at most {_number(quality['certificate'])} {escape(unit)} lost")
    return ["## Quality, on the sealed test data", "", *rows, ""]


def _latency(ratios: Mapping[str, Any] | None, machine: Mapping[str, Any]) -> list[str]:
    if not ratios:
        return []
    rows = [
        f"| {escape(OPPONENTS.get(opponent, opponent))} | {escape(batch)} | {_number(r.get('value'))} "
        f"| {_number(r.get('low'))} to {_number(r.get('high'))} | {escape(r.get('verdict', ''))} |"
        for opponent, batches in ratios.items()
        for batch, r in batches.items()
    ]
    where = [f"On {escape(_machine(machine))}, each in its own process.", ""] if machine else []
    head = [*where, "| opponent | batch | times as fast | interval | verdict |", "|---|---|---|---|---|"]
    return ["## Speed, measured in turn with each opponent", "", *head, *rows, ""]


SIZES = {
    "bytes_ratio": "bytes",
    "parameters_ratio": "parameters",
    "memory_ratio": "peak memory beyond PyTorch, the runtime's own library included",
    "train_cost_ratio": "training time",
}


def _machine(facts: Mapping[str, Any]) -> str:
    """The machine in a few words.

    Example:
        >>> _machine({"processor": "AMD EPYC", "instructions": "AVX512", "cores": 2})
        'AMD EPYC, AVX512, 2 cores'
    """
    known = [str(facts[k]) for k in ("processor", "instructions", "accelerator") if facts.get(k)]
    return ", ".join([*known, *([f"{facts['cores']} cores"] if facts.get("cores") else [])])


def _sizes(winner: Mapping[str, Any], baseline: Mapping[str, Any], built: Built) -> list[str]:
    shares = {label: winner.get(key) for key, label in SIZES.items()}
    cost = winner.get("train_cost") or {}
    shares |= {"training samples": cost.get("samples"), "training FLOPs": cost.get("flops")}
    ratios = [f"- {escape(label)}: {_number(v)} of the baseline" for label, v in shares.items() if v is not None]
    before = f" (baseline {escape(baseline['bytes'])})" if baseline.get("bytes") else ""
    files = ", ".join(f"`{f}`" for f in built.files)
    return ["## Size and training cost", "", f"- {built.bytes} bytes{before} in {files}", *ratios, ""]


def _limits(card: Mapping[str, Any], entry: Mapping[str, Any]) -> list[object]:
    own: list[object] = [
        f"Its outputs may differ from the recorded ones by {entry['tolerance']:g} of their largest value on another processor.",
        "Speed was measured on one machine; measure it on yours.",
        "The manifest shows damage, not malice: it is not a signature.",
    ]
    return [*card.get("limits", ()), *own]


def _loading(entry: Mapping[str, Any]) -> list[str]:
    inputs = entry["inputs"]
    example = {"tensor": "x", "dict": "{" + ", ".join(f'"{n}": …' for n in entry["names"]) + "}"}.get(inputs["kind"], "(x, …)")
    return [
        "## How to load it",
        "",
        "```python",
        f"# pip install {' '.join(entry['needs'])}",
        "from load import load",
        "",
        f"model = load()  # checks its files and its outputs; threads: {_threads(entry)}",
        f"outputs = model({example.replace('`', '')})  # torch tensors, batch first",
        "```",
        "",
        "`python load.py` checks the folder and exits with 0 or 1.",
    ]


def _threads(entry: Mapping[str, Any]) -> str:
    most = str(entry["threads"] or "all cores")
    return f"{most}, {entry['alone']['threads'] or 'all cores'} for a batch of one" if "alone" in entry else most


def _percent(value: object) -> str:
    return f"{100 * value:.3g} %" if isinstance(value, float) else "–"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape("–" if value is None else value)
