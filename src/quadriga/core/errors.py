"""Errors that people read: the value, the reason, the remedy, the nearest name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONG = 800  # characters of a message; what was given may be of any length


def brief(text: str) -> str:
    """A text that people can read, without its middle where it is longer than that.

    Example:
        >>> len(brief("x" * 10_000)) <= LONG, brief("short")
        (True, 'short')
    """
    return text if len(text) <= LONG else f"{text[: LONG - 110]} … {text[-100:]}"


class BadInput(ValueError):
    """What the user gave cannot be used. Exit status 2.

    Args:
        problem: what is wrong, with the value.
        remedy: what to do about it, a sentence or a command.

    Example:
        >>> str(BadInput("batch_size is 0", "give a positive integer"))
        'batch_size is 0; give a positive integer'
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        problem = brief(problem)
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy


class Mishap(BadInput):
    """Something that the machine did, and not what was given: a full or failing disk. Another try may go well."""


class NotApplicable(Exception):
    """A method has nothing to do here, or may not act: a recorded result, not a failure.

    Args:
        reason: the fact that stands in the way; it names the layer where there is one.
        remedy: what would change it, if anything would.

    `place` is the number of the step that refused, from 0, once who walks the recipe has set it.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason} ({remedy})" if remedy else reason)
        self.reason, self.remedy = reason, remedy
        self.place: int | None = None


class NotWorthwhile(NotApplicable):
    """A step that was to act only where that pays, and it was measured that it does not: a recipe goes on without it."""


class Failed(Exception):
    """What was asked for was begun, and came to no good end. Exit status 1.

    Args:
        problem: how it ended.
        remedy: what may help, or "".
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy


class Diverged(ArithmeticError):
    """The loss became NaN or infinite.

    Args:
        step: the optimizer step at which it was seen, from 0.
        rate: the learning rate of that step.
        loss: its value.
    """

    def __init__(self, step: int, rate: float, loss: float) -> None:
        super().__init__(f"the loss was {loss} at step {step}, learning rate {rate:g}; lower the rate or clip the gradients")
        self.step, self.rate, self.loss = step, rate, loss

    def __reduce__(self) -> tuple[type, tuple[int, float, float]]:
        return type(self), (self.step, self.rate, self.loss)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known one, else all of them.

    Example:
        >>> did_you_mean("shrnk", ["shrink", "distill"])
        'did you mean "shrink"?'
        >>> did_you_mean("x", ["shrink", "distill"])
        'known: distill, shrink'
    """
    known = sorted(names)
    near = get_close_matches(name, known, n=1)
    return f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}"
