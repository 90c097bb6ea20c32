"""Silence around tools that tell of every attempt which fails, where we tell ourselves what came of it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

TORCH = (
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
    "torch.onnx._internal.exporter._registration",
)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """No warnings, nothing printed, and only what is worse than an error from these loggers; errors are raised as ever.

    Args:
        loggers: names of further loggers than `TORCH`; "" is the root.

    Example:
        >>> with quiet("a.tool"):
        ...     logging.getLogger("a.tool").error("tried in vain")
        ...     print("a partial graph")
    """
    named = [logging.getLogger(name) for name in (*TORCH, *loggers)]
    levels = [logger.level for logger in named]
    for logger in named:
        logger.setLevel(logging.CRITICAL)
    hidden = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(named, levels, strict=True):
            logger.setLevel(level)
