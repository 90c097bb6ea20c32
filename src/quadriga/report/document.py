"""A report as data: sections of paragraphs, tables, figures and code, which HTML, Markdown and JSON all render.

One document behind the three forms is why their numbers cannot differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    """A paragraph; `role` is "" or "note"."""

    text: str
    role: str = ""
    kind: str = "text"


@dataclass(frozen=True)
class Bullets:
    """A list of short texts."""

    items: tuple[str, ...]
    kind: str = "bullets"


@dataclass(frozen=True)
class Table:
    """Rows of strings under `columns`; names in `numeric` are set flush right. `fold` hides it behind its title."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[str, ...] = ()
    title: str = ""
    fold: bool = False
    marked: tuple[int, ...] = ()  # rows that matter most
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """An inline SVG with its caption; `svg` is markup made by `plots` alone, where every name is escaped."""

    name: str
    svg: str
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class Code:
    """A command or a program, to be copied."""

    text: str
    language: str = "console"
    kind: str = "code"


Block = Text | Bullets | Table | Figure | Code


@dataclass(frozen=True)
class Section:
    """A heading with its blocks. `key` is its anchor."""

    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The whole report: a title, a status, the verdict in one sentence, the key figures, and sections."""

    title: str
    status: str
    verdict: str
    figures: tuple[tuple[str, str, str], ...] = ()  # (value, what, detail)
    sections: tuple[Section, ...] = field(default=())

    def plain(self) -> dict[str, Any]:
        """As JSON data, without the figures' markup."""
        data = asdict(self)
        for section in data["sections"]:
            for block in section["blocks"]:
                block.pop("svg", None)
        return data
