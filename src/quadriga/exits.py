"""Errors as people read them, and exit statuses: 0 verified, 1 infeasible or failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from cyclopts import CycloptsError

from quadriga.console import complain, emit, say
from quadriga.core import world
from quadriga.core.errors import BadInput, Diverged, Failed, NotApplicable
from quadriga.parallel.launch import tell
from quadriga.report.schema import empty_result

BAD_INPUT, INTERRUPTED = 2, 130
STATUS = {"verified": 0, "complete": 0, "infeasible": 1, "unmeasured": 1, "failed": 1, "interrupted": INTERRUPTED}


def guarded(app: Callable[..., Any], given: list[str]) -> int:
    """Call the application; whatever happens becomes a message for people and an exit status.

    Args:
        app: a cyclopts application whose verbs return their status.
        given: the words after the program's name.
    """
    try:
        with _stop_on_signals():
            return _call(app, given)
    except KeyboardInterrupt:
        if world.found().size > 1:  # whoever waits for the ranks speaks; torchrun may start them again
            return INTERRUPTED
        return failed(given, "interrupted", "interrupted", f"resume with the same command: {shlex.join(['quadriga', *given])}")


def _call(app: Callable[..., Any], given: list[str]) -> int:
    try:
        return int(app(given, exit_on_error=False, print_error=False) or 0)
    except (BadInput, NotApplicable) as error:
        _trace()
        problem = error.problem if isinstance(error, BadInput) else error.reason
        return failed(given, "failed", problem, error.remedy) if tell(BAD_INPUT) else BAD_INPUT
    except CycloptsError as error:
        hint = "quadriga --help shows the verbs and their options"
        return failed(given, "failed", str(error).strip(), hint) if tell(BAD_INPUT) else BAD_INPUT
    except Failed as error:
        if tell(1):
            failed(given, "failed", error.problem, error.remedy)
    except Diverged as error:
        if tell(1):
            failed(given, "failed", str(error))
    except SystemExit as error:  # of user code: ours returns its status
        failed(given, "failed", f"the code that it ran called sys.exit({error.code!r})", "take the exit out of it")
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # a mistake of ours: people get the message, we get the trace
        traceback.print_exc()
        here = world.found()
        if here.size > 1:  # often that another rank died; all are started again
            say(f"quadriga: rank {here.rank} ended: {type(error).__name__}: {error}")
        else:
            failed(given, "failed", f"an error inside Quadriga: {type(error).__name__}: {error}", "please report it")
    return 1


def failed(given: list[str], status: str, problem: str, remedy: str = "") -> int:
    """Say how a command ended that came to no result, in JSON too where that was asked for; the exit status.

    Args:
        given: the words after the program's name.
        status: "failed" or "interrupted".
    """
    complain(problem, remedy)
    if "--json" in given:
        named = next((word for word in given[1:] if not word.startswith("-")), "")
        emit({**empty_result(status, named), "error": {"message": problem, "remedy": remedy}})
    return INTERRUPTED if status == "interrupted" else BAD_INPUT


def _trace() -> None:
    if os.environ.get("QUADRIGA_DEBUG") == "1":
        traceback.print_exc()


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM interrupt, once, in good order; a second one ends the process at once."""

    def stop(number: int, frame: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
