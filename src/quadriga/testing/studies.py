"""A study looked at from outside, while another process works at it."""

from __future__ import annotations

import sqlite3
from pathlib import Path


def acknowledged(folder: Path) -> list[str]:
    """The trials in a study's store, as text, in their order; none before the store is there."""
    if not (folder / "study.sqlite").exists():
        return []
    try:
        with sqlite3.connect(f"file:{folder / 'study.sqlite'}?mode=ro", uri=True) as db:
            return [row[0] for row in db.execute("SELECT record FROM trials ORDER BY number")]
    except sqlite3.OperationalError:  # killed before the tables were made
        return []
