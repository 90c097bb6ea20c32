"""The study's memory: one SQLite file that the driver alone writes, one transaction an acknowledged record."""

from __future__ import annotations

import fcntl
import json
import sqlite3
from pathlib import Path
from typing import Any, Self

from quadriga.core.errors import BadInput
from quadriga.core.trial import Trial

VERSION = 1
SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE trials (number INTEGER PRIMARY KEY, record TEXT NOT NULL);
"""


class Store:
    """Facts and trials of one study, safe against a kill at any moment (WAL, synchronous=FULL).

    Args:
        folder: the study's output folder; made if missing, and locked until `close`.

    Raises:
        BadInput: another process has it open, it is damaged or read-only, or from a newer version.

    Example:
        >>> import tempfile
        >>> with Store(Path(tempfile.mkdtemp())) as store:
        ...     store.put("floor", "-0.5pt")
        ...     store.get("floor")
        '-0.5pt'
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "study.lock", "w")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise BadInput(f"{folder} cannot be written: {error.strerror}", "choose another --out folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._connect(folder / "study.sqlite")
        except BlockingIOError:
            self._lock.close()
            raise BadInput(f"another run has {folder} open", "wait for it, or choose another --out folder") from None
        except BadInput:
            self._lock.close()
            raise

    def _connect(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
        except sqlite3.OperationalError as error:  # the file system's doing: full, read-only, an error of the disk
            self._db.close()
            raise BadInput(f"{path} cannot be written: {error}", "free space, or choose another --out folder") from error
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise BadInput(f"{path} is damaged: {error}", "delete the folder to start again") from error
        if found > VERSION:
            raise BadInput(f"{path} was written by a newer Quadriga (schema {found})", "upgrade Quadriga")

    def put(self, key: str, value: Any) -> None:
        """Keep plain data under a key; durable when this returns."""
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value)))

    def get(self, key: str, default: Any = None) -> Any:
        """What `put` kept, or the default."""
        row = self._db.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return default if row is None else json.loads(row[0])

    def add(self, trial: Trial) -> None:
        """Acknowledge a trial; durable when this returns."""
        self._write("INSERT INTO trials VALUES (?, ?)", (trial.number, json.dumps(trial.plain())))

    def trials(self) -> list[Trial]:
        """All acknowledged trials in order."""
        rows = self._db.execute("SELECT record FROM trials ORDER BY number")
        return [Trial.from_plain(json.loads(record)) for (record,) in rows]

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise BadInput(f"the study could not be written: {error}", "free space and run the same command again") from error

    def close(self) -> None:
        """Close the file and give the lock back."""
        self._db.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
