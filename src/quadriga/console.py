"""What a person sees: progress on stderr, tables on stdout. rich is imported when it is needed."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from textwrap import fill
from types import TracebackType
from typing import Any, Self

from quadriga.report import text
from quadriga.report.document import Section, Table, Text
from quadriga.report.schema import finite

EVERY = 5.0  # seconds between plain lines
LOOK = 0.5  # seconds between looks at whether a phase has been silent for long
WIDE = 110  # columns of a table that goes into a file or a pipe
GAP = 3  # columns between two of a table


class Progress:
    """Shows progress events; with a terminal one live line, otherwise a plain line every few seconds.

    A phase that reports nothing for a while is shown again, with how long it has been going on. It stays visible where
    `sys.stderr` is silenced for a while, as around exports.

    Args:
        terminal: whether stderr is one; found out when None.
        clock: monotonic seconds.
        look: seconds between looks at the clock by a thread of its own; None for no thread, then `beat` is the caller's.

    An event is plain data: "stage", "text", and perhaps "done", "total", "best" (a text or number), "left" (seconds),
    "limit" (seconds that this phase may take at most) and "keep" (it has to be seen, and stays on screen).
    """

    def __init__(
        self, terminal: bool | None = None, clock: Callable[[], float] = time.monotonic, look: float | None = LOOK
    ) -> None:
        self._stream = sys.stderr
        self.terminal = self._stream.isatty() if terminal is None else terminal
        self._clock, self._look, self._printed = clock, look, -EVERY
        self._event: Mapping[str, Any] = {}
        self._since = 0.0  # when the event came
        self._shown = True  # whether the event has been on screen
        self._live: Any = None  # a rich Status
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        if self.terminal:
            from rich.console import Console

            self._live = Console(file=self._stream).status("starting")
            self._live.start()
        if self._look is not None:
            threading.Thread(target=self._watch, args=(self._look,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        with self._lock:
            if self._live:
                self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        with self._lock:
            now, changed = self._clock(), bool(event.get("keep")) or event.get("stage") != self._event.get("stage")
            self._event, self._since, self._shown = event, now, False
            if self._live:
                self._update(describe(event))
                if changed:
                    self._live.console.print(describe(event), markup=False, highlight=False)
            elif changed or now - self._printed >= EVERY:
                self._print(describe(event))

    def beat(self) -> None:
        """Show the last event again if nothing was shown for a while."""
        with self._lock:
            now = self._clock()
            if self._ended.is_set() or not self._event:
                return
            line = describe(self._event, now - self._since if self._shown or self._live else 0.0)
            if self._live:
                self._update(line)
            elif now - self._printed >= EVERY:
                self._print(line)

    def _watch(self, look: float) -> None:
        with suppress(OSError, ValueError):  # nobody reads any more: the thread that works will find out
            while not self._ended.wait(look):
                self.beat()

    def _update(self, line: str) -> None:
        from rich.markup import escape

        self._live.update(escape(line))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
        self._printed, self._shown = self._clock(), True


def describe(event: Mapping[str, Any], elapsed: float = 0.0) -> str:
    """An event in one line.

    Args:
        event: as of `Progress`.
        elapsed: seconds since it came; told from one second on.

    Example:
        >>> describe({"stage": "search", "done": 3, "total": 40, "best": "2.1× faster", "left": 312.0, "text": "training"})
        '[search] trial 3 of 40 · training · best 2.1× faster · 5 min 12 s left'
        >>> describe({"stage": "load", "text": "reading the workload", "limit": 60}, 12.3)
        '[load] reading the workload · for 12 s, at most 1 min'
    """
    parts = []
    if event.get("done") is not None:
        parts.append(f"trial {event['done']}" + (f" of {event['total']}" if event.get("total") else ""))
    parts += [str(event["text"])] if event.get("text") else []
    if event.get("best") is not None:
        parts.append(f"best {text.plain(event['best'])}")
    lasting = [f"for {text.seconds(round(elapsed))}"] if elapsed >= 1 else []
    lasting += [f"at most {text.seconds(event['limit'])}"] if event.get("limit") is not None else []
    parts += [", ".join(lasting)] if lasting else []
    if event.get("left") is not None:
        parts.append(f"{text.seconds(max(0, round(event['left'] - elapsed)))} left")
    return f"[{event.get('stage', '')}] " + " · ".join(" ".join(p.split()) for p in parts)


def say(line: str) -> None:
    """A line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


def complain(problem: str, remedy: str = "") -> None:
    """What went wrong, and what may help, as every verb says it."""
    say(f"quadriga: {problem}{f'; {remedy}' * bool(remedy)}")


def emit(value: Any) -> None:
    """A JSON value as one line on stdout; numbers that are not finite become null."""
    print(json.dumps(finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout, as wide as the terminal, or `WIDE` columns where there is none; long cells are folded.

    Where it is too narrow to read a table in, each row becomes a paragraph.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    out = Console(width=width())
    needs = [_need(column, number == 0) for number, column in enumerate(zip(columns, *rows, strict=True))]
    if sum(needs) + GAP * len(needs) > out.width and any(columns):
        return paragraphs(columns, rows, title)
    made = Grid(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", show_header=any(columns), pad_edge=False)
    for name, cells, need in zip(columns, zip(*rows, strict=True) if rows else [()] * len(columns), needs, strict=True):
        made.add_column(name, overflow="fold", min_width=need, no_wrap=max(map(len, cells), default=0) <= need)
    for row in rows:
        made.add_row(*(_plain(cell) for cell in row))
    out.print(made, highlight=False)


def width() -> int:
    """Columns of the terminal that stdout is; of a file or a pipe as many as a page has."""
    return shutil.get_terminal_size((WIDE, 24)).columns if sys.stdout.isatty() else WIDE


def _need(column: Sequence[str], first: bool) -> int:
    """The fewest columns that a heading and its cells can be read in: short cells whole, a heading by its words."""
    heading, *cells = column
    words = max((len(word) for word in heading.split()), default=0)
    return max(words, min(max(map(len, cells), default=0), 28 if first else 12))


def paragraphs(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A row's first cell on stdout, and below it what the others say; what is missing is left out, no word is broken."""
    print("\n".join(filter(None, ["", title])))
    for first, *others in rows:
        told = [f"{name} {cell}".strip() for name, cell in zip(columns[1:], others, strict=True) if cell not in ("", text.NONE)]
        for line, before in ((first, ""), (" · ".join(told), "  ")):
            if line:
                whole = {"break_on_hyphens": False, "break_long_words": False}
                print(fill(line, width(), initial_indent=before, subsequent_indent=before, **whole))
    print()


def show(section: Section) -> None:
    """A report's section on stdout: its paragraphs and tables; figures need a page."""
    for block in section.blocks:
        if isinstance(block, Table):
            table(block.columns, block.rows, block.title)
        elif isinstance(block, Text):
            print(fill(block.text, min(WIDE, width())) + "\n")


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
