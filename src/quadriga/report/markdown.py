"""A document as Markdown, with the same numbers as the HTML."""

from __future__ import annotations

import re

from quadriga.report.document import Block, Bullets, Code, Document, Figure, Table, Text


def escape(value: str) -> str:
    """Text that Markdown shows as it is: no HTML, no link, no image, no table cell ends in it.

    Example:
        >>> escape("<b>|![x](y)")
        '&lt;b&gt;\\\\|!\\\\[x](y)'
    """
    line = re.sub(r"\s+", " ", value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\|`*]|(?<!\w)_|_(?!\w))", r"\\\1", line)
    return re.sub(r"\[(?=[^\]]*\]\s*[(\[:])", r"\\[", line)  # a bracket that would begin a link


def render(document: Document, pictures: tuple[str, ...] = ("pareto",)) -> str:
    """The whole document; the figures named in `pictures` are files beside it."""
    parts = [f"# {escape(document.title)}", f"**{escape(document.status)}.** {escape(document.verdict)}"]
    parts += ["\n".join(f"- **{escape(v)}** {escape(w)}{f' ({escape(d)})' * bool(d)}" for v, w, d in document.figures)]
    for section in document.sections:
        parts.append(f"## {escape(section.title)}")
        parts += [_block(b, pictures) for b in section.blocks]
    return "\n\n".join(p for p in parts if p) + "\n"


def _block(block: Block, pictures: tuple[str, ...]) -> str:
    match block:
        case Text():
            return escape(block.text)
        case Bullets():
            return "\n".join(f"- {escape(i)}" for i in block.items)
        case Table():
            return _table(block)
        case Figure():
            picture = f"![{block.name}]({block.name}.svg)\n\n" if block.name in pictures else ""
            return picture + escape(block.caption)
        case Code():
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", block.text))])
            return f"{fence}{block.language}\n{block.text}\n{fence}"


def _table(table: Table) -> str:
    head = [f"**{escape(table.title)}**\n"] if table.title else []
    rule = " | ".join("---:" if c in table.numeric else "---" for c in table.columns)
    rows = [" | ".join(map(escape, row)) for row in (table.columns, *table.rows)]
    return "\n".join([*head, f"| {rows[0]} |", f"| {rule} |", *(f"| {r} |" for r in rows[1:])])
