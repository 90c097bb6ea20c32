"""The artifact's README: what it is, how good, how fast, its limits, how to load it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from quadriga.core.recipe import Recipe
from quadriga.runtime import Built


def escape(value: object) -> str:
    """Text for Markdown: no HTML, no markup, one line.

    Example:
        >>> escape("<b>a|b</b>")
        '&lt;b&gt;a\\\\|b&lt;/b&gt;'
    """
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", html.escape(line, quote=False))


def render(card: Mapping[str, Any], built: Built, recipe: Recipe) -> str:
    """The card as Markdown with a YAML header.

    Args:
        card: "title", "about", "limits" (list) and "winner" (as in result.json), each optional.
        built: gives runtime, structure and bytes.
        recipe: its steps are listed.
    """
    title = str(card.get("title") or "model")
    winner = card.get("winner") or {}
    entry = built.entry
    head = {
        "library_name": "quadriga",
        "title": title,
        "tags": ["quadriga", entry["runtime"]],
        "runtime": entry["runtime"],
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
    ]
    lines += _quality(winner.get("quality")) + _latency(winner.get("latency_ratio")) + _sizes(winner, built)
    lines += ["## Limits", "", *(f"- {escape(item)}" for item in _limits(card, entry)), ""]
    return "\n".join([*lines, *_loading(entry), ""])


def _quality(quality: Mapping[str, Any] | None) -> list[str]:
    if not quality:
        return []
    unit = quality.get("unit", "")
    rows = [
        f"- {escape(quality.get('metric', 'metric'))}: {_number(quality.get('value'))} {escape(unit)}"
        f" (baseline {_number(quality.get('baseline'))})",
        f"- difference {_number(quality.get('difference'))}, not below {_number(quality.get('low'))} {escape(unit)}",
        f"- {_number(quality.get('n'))} examples, predictions differ on {_number(quality.get('disagreement'))}",
    ]
    return ["## Quality, on the sealed test data", "", *rows, ""]


def _latency(ratios: Mapping[str, Any] | None) -> list[str]:
    if not ratios:
        return []
    rows = [
        f"| {escape(opponent)} | {escape(batch)} | {_number(r.get('value'))} "
        f"| {_number(r.get('low'))} to {_number(r.get('high'))} | {escape(r.get('verdict', ''))} |"
        for opponent, batches in ratios.items()
        for batch, r in batches.items()
    ]
    head = ["| opponent | batch | times as fast | interval | verdict |", "|---|---|---|---|---|"]
    return ["## Speed, measured in turn with each opponent", "", *head, *rows, ""]


def _sizes(winner: Mapping[str, Any], built: Built) -> list[str]:
    ratios = [
        f"- {label}: {_number(winner[key])} of the baseline"
        for key, label in (("bytes_ratio", "bytes"), ("parameters_ratio", "parameters"), ("train_cost_ratio", "training cost"))
        if winner.get(key) is not None
    ]
    return ["## Size", "", f"- {built.bytes} bytes in {', '.join(f'`{f}`' for f in built.files)}", *ratios, ""]


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
        f"model = load()  # checks its files and its outputs; threads: {entry['threads'] or 'all cores'}",
        f"outputs = model({example.replace('`', '')})  # torch tensors, batch first",
        "```",
        "",
        "`python load.py` checks the folder and exits with 0 or 1.",
    ]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape("–" if value is None else value)
