"""What a person sees: progress on stderr, tables on stdout. rich is imported when it is needed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from types import TracebackType
from typing import Any, Self

from quadriga.report import text
from quadriga.report.document import Section, Table, Text
from quadriga.report.schema import finite

EVERY = 5.0  # seconds between plain lines
WIDE = 400  # columns of a table that goes into a file or a pipe


class Progress:
    """Shows progress events; with a terminal one live line, otherwise a plain line every few seconds.

    Args:
        terminal: whether stderr is one; found out when None.
        clock: monotonic seconds.

    An event is plain data: "stage", "text", and perhaps "done", "total", "best" (a text or number) and "left" (seconds).
    """

    def __init__(self, terminal: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self._clock, self._last, self._stage = clock, -EVERY, ""
        self._live: Any = None  # a rich Status

    def __enter__(self) -> Self:
        if self.terminal:
            from rich.console import Console

            self._live = Console(stderr=True).status("starting")
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        line = describe(event)
        if self._live:
            from rich.markup import escape

            self._live.update(escape(line))
        changed = event.get("stage") != self._stage
        if changed and self._live:
            self._live.console.print(line, markup=False, highlight=False)
        elif not self._live and (changed or self._clock() - self._last >= EVERY):
            print(line, file=sys.stderr, flush=True)
            self._last = self._clock()
        self._stage = str(event.get("stage", ""))


def describe(event: Mapping[str, Any]) -> str:
    """An event in one line.

    Example:
        >>> describe({"stage": "search", "done": 3, "total": 40, "best": "2.1× faster", "left": 312.0, "text": "training"})
        '[search] trial 3 of 40 · training · best 2.1× faster · 5 min 12 s left'
    """
    parts = []
    if event.get("done") is not None:
        parts.append(f"trial {event['done']}" + (f" of {event['total']}" if event.get("total") else ""))
    parts += [str(event["text"])] if event.get("text") else []
    if event.get("best") is not None:
        parts.append(f"best {text.plain(event['best'])}")
    if event.get("left") is not None:
        parts.append(f"{text.seconds(round(event['left']))} left")
    return f"[{event.get('stage', '')}] " + " · ".join(" ".join(p.split()) for p in parts)


def say(line: str) -> None:
    """A line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """A JSON value as one line on stdout; numbers that are not finite become null."""
    print(json.dumps(finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout; where stdout is no terminal, without colour and without folding."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    made = Grid(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", show_header=any(columns), pad_edge=False)
    for name in columns:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*(_plain(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else WIDE).print(made, highlight=False)


def show(section: Section) -> None:
    """A report's section on stdout: its paragraphs and tables; figures need a page."""
    for block in section.blocks:
        if isinstance(block, Table):
            table(block.columns, block.rows, block.title)
        elif isinstance(block, Text):
            print(fill(block.text, 110) + "\n")


def _plain(cell: str) -> str:
    from rich.markup import escape

    return escape(cell)


def tree(value: Mapping[str, Any], title: str = "") -> None:
    """A result as a two-column table; lists of rows become tables of their own."""
    nested = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(r, Mapping) for r in v)}
    table(("", ""), [(k, text.fact(k, v)) for k, v in value.items() if k not in nested], title)
    for name, rows in nested.items():
        columns = list(dict.fromkeys(k for r in rows for k in r))
        table(columns, [[text.fact(c, r.get(c)) for c in columns] for r in rows], name)
