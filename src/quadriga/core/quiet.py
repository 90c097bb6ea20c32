"""Silence around tools that tell of every attempt which fails, where we tell ourselves what came of it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

TORCH = {
    "torch._subclasses.fake_tensor": logging.CRITICAL,  # it tells of every failing operator as an error, which is raised too
    "torch.fx.experimental.symbolic_shapes": logging.ERROR,
    "torch.onnx": logging.ERROR,
    "torch.onnx._internal.exporter._registration": logging.ERROR,
}


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """No warnings and nothing printed; errors are raised as ever.

    Args:
        loggers: names of loggers, besides those of `TORCH`, whose warnings are left out; "" is the root.

    Example:
        >>> with quiet("a.tool"):
        ...     logging.getLogger("a.tool").warning("tried in vain")
        ...     print("a partial graph")
    """
    named = {logging.getLogger(name): TORCH.get(name, logging.ERROR) for name in (*TORCH, *loggers)}
    levels = {logger: logger.level for logger in named}
    for logger, level in named.items():
        logger.setLevel(level)
    hidden = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
