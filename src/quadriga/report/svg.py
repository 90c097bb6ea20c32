"""A small canvas for inline SVG: every text and attribute is escaped here, colours are CSS classes of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

NICE = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000)


@dataclass
class Canvas:
    """A drawing of `width` × `height` units, scaled to the column's width by the browser."""

    width: float
    height: float
    label: str
    parts: list[Markup] = field(default_factory=list)

    def add(self, tag: str, title: str = "", text: str | None = None, /, **attributes: object) -> None:
        """One element; `kind` becomes its class, `_` in a name becomes `-`, and `title` shows on hover."""
        named = {"class" if k == "kind" else k.replace("_", "-"): v for k, v in attributes.items() if v is not None}
        written = Markup("").join(Markup(' {}="{}"').format(k, _short(v)) for k, v in named.items())
        inside = (Markup("<title>{}</title>").format(title) if title else Markup("")) + escape(text or "")
        self.parts.append(Markup("<{}{}>{}</{}>").format(Markup(tag), written, inside, Markup(tag)))

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", title: str = "") -> None:
        """A line of text; anchor is "start", "middle" or "end"."""
        self.add("text", title, text, x=x, y=y, text_anchor=anchor, kind=kind or None)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, kind=kind)

    def bar(self, x1: float, x2: float, y: float, height: float, kind: str, title: str = "") -> None:
        """A horizontal bar from x1 to x2, at least a hair wide."""
        left, right = min(x1, x2), max(x1, x2)
        self.add("rect", title, x=left, y=y, width=max(right - left, 1.5), height=height, rx=2, kind=kind)

    def markup(self, style: str = "") -> Markup:
        """The whole picture; `style` is put inside for a file of its own."""
        space = Markup(' xmlns="http://www.w3.org/2000/svg"') if style else Markup("")  # HTML needs no name space
        sheet = Markup("<style>{}</style>").format(Markup(style)) if style else Markup("")
        head = Markup('<svg{} viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            space, _short(self.width), _short(self.height), self.label
        )
        return head + sheet + Markup("\n").join(self.parts) + Markup("</svg>")


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Scale:
    """Maps values to positions, linearly or by their logarithm, and knows its tick marks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        f: Callable[[float], float] = math.log if self.log else float
        share = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, about: int = 6) -> list[float]:
        """About so many round values within the range."""
        if self.log:
            found = [t for t in NICE if self.low <= t <= self.high]
            return found[:: -(-len(found) // (about + 2))] if found else []
        raw = (self.high - self.low) / about
        power = 10 ** math.floor(math.log10(raw))
        size = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
        first = math.ceil(self.low / size - 1e-9)
        return [k * size for k in range(first, math.floor(self.high / size + 1e-9) + 1)]

    def decades(self) -> list[float]:
        """The powers of ten within the range, and three times them where there are few."""
        first, last = math.floor(math.log10(self.low)), math.floor(math.log10(self.high))
        steps = (1.0, 3.0) if math.log10(self.high / self.low) < 3 else (1.0,)
        return [t for k in range(first, last + 1) for s in steps if self.low <= (t := s * 10.0**k) <= self.high]


def ratio_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """A logarithmic scale over positive ratios that contains 1, with a little room on both sides."""
    kept = [v for v in values if v > 0 and math.isfinite(v)] + [1.0]
    low, high = min(kept), max(kept)
    room = (high / low) ** 0.06 if high > low * 1.2 else 1.1
    return Scale(low / room, high * room, start, end, log=True)


def linear_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A linear scale over finite values that contains 0, with a little room on both sides."""
    kept = [v for v in values if math.isfinite(v)] + [0.0]
    low, high = min(kept), max(kept)
    room = (high - low) * 0.08 or 1.0
    return Scale(low - room, high + room, start, end)


def times(value: float) -> str:
    """A tick of a ratio scale."""
    return f"{value:g}×"
