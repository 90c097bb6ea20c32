"""All forms of `networks/user_forms_*.py`, by name. Nothing of Quadriga is imported."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "networks"


def forms() -> dict[str, Any]:
    """Name → `user_forms.Form`, file by file, in the order in which they are written."""
    sys.path.insert(0, str(FOLDER))
    for path in sorted(FOLDER.glob("user_forms_*.py")):
        importlib.import_module(path.stem)
    return dict(importlib.import_module("user_forms").FORMS)
