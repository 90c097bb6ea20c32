"""A document as one self-contained HTML page: no request leaves it, no script runs in it, every name is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from quadriga import __version__
from quadriga.report.document import Document

ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def render(document: Document, records: Mapping[str, Any], name: str = "report") -> str:
    """The page. Its policy allows this one style sheet, by its hash, and nothing else; `name` is its file's and its kind's."""
    style = sheet()
    digest = "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_read("report.html.j2")).render(
        doc=document,
        digest=Markup(digest),
        style=Markup(style),
        records=script_json(records),
        version=__version__,
        name=name,
        markup=Markup,
    )


def script_json(value: Any) -> Markup:
    """JSON that may stand in a `script` element: nothing in it can end the element.

    Example:
        >>> print(script_json("</script>"))
        "\\u003c/script\\u003e"
    """
    return Markup(json.dumps(value, ensure_ascii=False, allow_nan=False).translate(ESCAPES))


def sheet() -> str:
    """The style of the page and its plots."""
    return _read("style.css") + _read("plot.css")


def picture_sheet() -> str:
    """The style of a plot that is a file of its own: the colours, light and dark, and the plots' rules."""
    colours = _read("style.css")
    return colours[: colours.index("* {")] + _read("plot.css") + "svg { background: var(--sheet); }\n"


def _read(name: str) -> str:
    return files("quadriga.report").joinpath(name).read_text(encoding="utf-8")
