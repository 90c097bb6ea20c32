"""Fixtures for all tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent / "data"
os.environ.setdefault("QUADRIGA_GRANULE", "1")  # networks of tests are narrow, and none is to depend on the machine


@pytest.fixture
def records() -> dict[str, Any]:
    """The records of a verified study, as `quadriga.report.schema` describes them."""
    return json.loads((DATA / "records.json").read_text(encoding="utf-8"))
