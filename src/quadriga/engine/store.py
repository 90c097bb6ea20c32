"""The study's memory: one SQLite file that the driver alone writes, one transaction an acknowledged record."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from quadriga.core.errors import BadInput, Mishap
from quadriga.core.files import parse_json
from quadriga.core.folders import claim
from quadriga.core.secrets import redacted
from quadriga.core.trial import Trial

VERSION = 1
UNSEALED = ("seal", "spent", "phases")  # facts that a finished study may still change
SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE trials (number INTEGER PRIMARY KEY, record TEXT NOT NULL);
"""


class Store:
    """Facts and trials of one study, safe against a kill at any moment (WAL, synchronous=FULL).

    Args:
        folder: the study's output folder; made if missing, and locked until `close`.

    Raises:
        BadInput: another process has it open, it is damaged, from a newer version, or the folder is not ours.
        Mishap: it cannot be written.

    Example:
        >>> import tempfile
        >>> with Store(Path(tempfile.mkdtemp())) as store:
        ...     store.put("floor", "-0.5pt")
        ...     store.get("floor")
        '-0.5pt'
    """

    def __init__(self, folder: Path) -> None:
        self._lock, self._path = claim(folder, "study"), folder / "study.sqlite"
        try:
            self._connect(self._path)
        except BaseException:
            self._lock.close()
            raise

    def _connect(self, path: Path) -> None:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise BadInput(f"{path} is no file", "remove it, or choose another --out folder")
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            with self._named():
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                found = self._db.execute("PRAGMA user_version").fetchone()[0]
                if found == 0:
                    self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
            if found > VERSION:
                raise BadInput(f"{path} was written by a newer Quadriga (schema {found})", "upgrade Quadriga")
        except BaseException:
            self._db.close()
            raise

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the database as people read them."""
        try:
            yield
        except sqlite3.OperationalError as error:  # the file system's doing: full, read-only, an error of the disk
            problem = f"{self._path} cannot be read or written: {error}"
            raise Mishap(problem, "free space and run the same command again, or choose another --out folder") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: object) -> BadInput:
        return BadInput(f"{self._path} is damaged: {error}", "restore it, or delete the folder to start again")

    def put(self, key: str, value: Any) -> None:
        """Keep plain data under a key; durable when this returns."""
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, redacted(json.dumps(value))))

    def get(self, key: str, default: Any = None) -> Any:
        """What `put` kept, or the default.

        Raises:
            BadInput: the file is damaged.
        """
        with self._named():
            row = self._db.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return default if row is None else self._parsed(row[0])

    def add(self, trial: Trial) -> None:
        """Acknowledge a trial; durable when this returns."""
        self._write("INSERT INTO trials VALUES (?, ?)", (trial.number, redacted(json.dumps(trial.plain()))))

    def trials(self) -> list[Trial]:
        """All acknowledged trials in order.

        Raises:
            BadInput: the file is damaged.
        """
        with self._named():
            rows = self._db.execute("SELECT record FROM trials ORDER BY number").fetchall()
        return [Trial.from_plain(self._parsed(record)) for (record,) in rows]

    def clear(self) -> None:
        """Forget everything."""
        for table in ("facts", "trials"):
            self._write(f"DELETE FROM {table}", ())

    def digest(self) -> str:
        """SHA-256 of all trials and facts but those that are named, as they lie on disk."""
        total = hashlib.sha256()
        with self._named():
            for row in self._db.execute("SELECT number, record FROM trials ORDER BY number"):
                total.update(repr(row).encode())
            for row in self._db.execute("SELECT key, value FROM facts WHERE key NOT IN (?, ?, ?) ORDER BY key", UNSEALED):
                total.update(repr(row).encode())
        return total.hexdigest()

    def _parsed(self, text: Any) -> Any:
        try:
            return parse_json(text)
        except BadInput as error:
            raise self._damaged(error.problem) from error

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._named():
            self._db.execute(statement, values)

    def close(self) -> None:
        """Close the file and give the lock back."""
        self._db.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
