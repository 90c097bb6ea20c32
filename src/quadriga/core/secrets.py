"""Nothing that looks secret leaves: passwords in addresses, values of variables whose name says so. Imports no torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

HIDDEN = "***"
NAME = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
ADDRESS = re.compile(r"(?<=://)([^/\s:@\"']*):([^/\s@\"']+)@")  # user:password@ of a URL
TOKENS = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16})\b")
LEAST = 8  # characters of a value that is looked for: shorter ones would hit words


def redacted(text: str, environ: Mapping[str, str] | None = None) -> str:
    """A text without what looks secret.

    Args:
        environ: variables; this process's by default.

    Example:
        >>> redacted("pip install -i https://me:hunter22@host/simple", {})
        'pip install -i https://me:***@host/simple'
        >>> redacted("401: the token abcdefgh1 is wrong", {"HF_TOKEN": "abcdefgh1"})
        '401: the token *** is wrong'
    """
    if "://" in text:
        text = ADDRESS.sub(rf"\1:{HIDDEN}@", text)
    text = TOKENS.sub(HIDDEN, text)
    for value in values(environ):
        if value in text:
            text = text.replace(value, HIDDEN)
    return text


def values(environ: Mapping[str, str] | None = None) -> list[str]:
    """Values of variables that look secret, the longest first; places of files are none."""
    given = os.environ if environ is None else environ
    found = {v for k, v in given.items() if NAME.search(k) and len(v) >= LEAST and not os.path.exists(v)}
    return sorted(found, key=len, reverse=True)


class Redacting:
    """A text stream that hides what looks secret, and is the stream else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what is left of a text."""
        return self._stream.write(redacted(text))

    def writelines(self, lines: Any) -> None:
        """Write what is left of some."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def hidden() -> Iterator[None]:
    """While the block runs, stdout and stderr of this process hide what looks secret."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Redacting(before[0]), Redacting(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
