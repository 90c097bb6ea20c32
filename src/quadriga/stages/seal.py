"""A finished study is sealed: what it handed over and what it wrote down are hashed, and looked at each time it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput
from quadriga.core.files import sha256
from quadriga.engine.store import Store
from quadriga.runtime import standalone
from quadriga.runtime.standalone import Damaged

SEAL, RECORDS, ARTIFACT = "seal", "records.json", "artifact"
REMEDY = "restore it from a copy, or run the command with another --out folder"


def seal(store: Store, folder: Path) -> None:
    """Keep the hashes of all that is final; the last thing that a study does."""
    store.put(SEAL, _found(store, folder))


def check(store: Store, folder: Path) -> None:
    """See that a finished study is as it was sealed.

    Raises:
        BadInput: a file is missing or was changed.
    """
    known = store.get(SEAL)
    if known is None:  # killed right before it, or of a version that had none
        seal(store, folder)
        return
    manifest = folder / ARTIFACT / "manifest.json"
    if known.get(ARTIFACT) and not manifest.is_file():
        raise BadInput(f"the artifact of this finished study is gone from {folder / ARTIFACT}", REMEDY)
    try:
        if manifest.is_file():
            standalone.check_files(folder / ARTIFACT)
        found = _found(store, folder)
    except (Damaged, OSError) as error:
        raise BadInput(f"the artifact of this finished study is damaged: {error}", REMEDY) from error
    names = {ARTIFACT: f"{ARTIFACT}/manifest.json", RECORDS: RECORDS, "rows": "study.sqlite"}
    if changed := [names[name] for name in known if known[name] != found.get(name)]:
        raise BadInput(f"{folder / changed[0]} was changed since this study was finished", REMEDY)


def _found(store: Store, folder: Path) -> dict[str, Any]:
    manifest, records = folder / ARTIFACT / "manifest.json", folder / RECORDS
    return {
        ARTIFACT: sha256(manifest) if manifest.is_file() else None,
        RECORDS: sha256(records) if records.is_file() else None,
        "rows": store.digest(),
    }
