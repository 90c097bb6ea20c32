"""records.json: everything that a report shows. The study fills it; this module is its one description.

Directions. `latency_ratio` is opponent ÷ winner (higher: the winner is faster). `bytes_ratio`, `parameters_ratio`,
`memory_ratio`, `train_cost_ratio` and those of `train_cost` are winner ÷ baseline (lower is better). Quality differences
have the sign turned so that positive is better. In an ablation row every ratio is (the recipe without that step) ÷ (with
it), so the step saves above 1; `quality_gain` is with − without, positive when the step helps.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal, NotRequired, TypedDict

from quadriga.core.errors import BadInput

VERSION = 1


class Ratio(TypedDict):
    """A ratio of timings with its interval; `low` and `high` are None where it is an estimate without one."""

    value: float
    low: NotRequired[float | None]
    high: NotRequired[float | None]
    verdict: NotRequired[
        str
    ]  # "faster" | "slower" | "equivalent" | "undecided" | "unmeasured": no result, the machine was busy


class Quality(TypedDict):
    """The winner's quality on `test`, paired with the baseline's on the same n examples."""

    metric: str
    unit: str
    value: float
    baseline: float
    difference: float
    low: float  # one-sided lower bound of the difference
    n: int
    disagreement: float | None  # share of examples predicted differently
    certificate: NotRequired[float | None]  # the loss that this share alone excludes beyond, in the metric's unit; no labels


class Winner(TypedDict):
    """What the study hands over."""

    recipe: list[dict[str, Any]]
    families: list[str]
    quality: Quality
    latency_ratio: dict[str, dict[str, Ratio]]  # opponent → batch → ratio
    bytes_ratio: float
    parameters_ratio: float
    memory_ratio: NotRequired[float | None]  # of peak memory beyond what torch itself takes; None where not measured
    train_cost_ratio: float | None  # of seconds; None where only the baseline needs no training
    train_cost: NotRequired[dict[str, float | None]]  # "samples", "seconds", "flops", "cpu_seconds", each a ratio
    train_speed: NotRequired[Ratio | None]  # the baseline's training cost over the winner's, timed in turn, if minimized


class Result(TypedDict):
    """result.json, and the last line of `quadriga run --json`."""

    status: Literal["verified", "infeasible", "unmeasured", "failed", "interrupted"]  # unmeasured: the machine was too busy
    workload: str
    seconds: float
    baseline: (
        dict[str, Any] | None
    )  # quality, guess, latency {batch: s}, peak_memory (beyond torch), bytes, parameters, train_*
    winner: Winner | None
    ablation: list[dict[str, Any]]
    artifact: str | None
    report: str | None
    nearest_miss: NotRequired[dict[str, Any] | None]  # {"recipe", "why", …} when infeasible
    error: NotRequired[dict[str, str]]  # {"message", "remedy"} when failed
    tried: NotRequired[dict[str, int]]  # "costed", "trained", "scored": candidates whose quality was measured
    reason: NotRequired[str]  # why the study ended early, with "remedy"
    remedy: NotRequired[str]
    no_artifact: NotRequired[str]  # why there is none


class Point(TypedDict):
    """One candidate in the Pareto plot; ratios against the eager baseline, as the search measured them on `val`."""

    name: str
    hash: str
    quality_difference: float
    latency_ratio: float
    bytes_ratio: float
    on_front: bool
    qualified: bool
    winner: NotRequired[bool]


class AblationRow(TypedDict):
    """What one step of the winner gives, on `val`; None where it cannot change, or was not measured."""

    step: NotRequired[str]  # "shrink(kernel=3)"; the method's name when it is missing
    method: str
    family: str
    quality_gain: float | None
    latency_ratio: Ratio | float | None
    bytes_ratio: NotRequired[float | None]
    train_cost_ratio: float | None
    pays: bool | None  # None when it was not measured
    why: str


class Opponent(TypedDict):
    """One strong opponent: "eager", "tuned_eager", "lossless_export", "same_training", "from_scratch",
    "by_chance"."""

    name: str
    about: str
    latency: dict[str, Ratio]  # batch → ratio
    quality: float | None
    bytes: int | None
    control: NotRequired[dict[str, Any] | None]  # a trained control's comparison with the baseline: difference, low, …


class Layer(TypedDict):
    """One layer of the unchanged model in one forward pass, as `measure.roofline.profile` gives it."""

    layer: str
    kind: str
    seconds: float
    share: float  # of the whole pass
    parameters: int
    flops: int
    bytes: int
    bound: str | None  # "compute" | "memory"; None, as fraction, where the bytes are unknown
    fraction: float | None  # of the roofline


class Ceilings(TypedDict):
    """What the machine reaches, a second; `measure.ceilings.Ceilings`. Older records have the first two alone."""

    flops: float  # of the best float32 product
    bytes: float  # read and written by a copy that no cache holds
    products: NotRequired[dict[str, float | None]]  # "default", "fp32", "bf16", "int8"; None where there is none
    copies: NotRequired[list[list[float]]]  # [bytes read and written, bytes a second], small to large
    missing: NotRequired[dict[str, str]]  # why a product is None, or a faster one does not count


class Profile(TypedDict, total=False):
    """Where the time of the unchanged model goes."""

    threads: int
    ceilings: Ceilings
    batches: list[dict[str, Any]]  # batch, seconds, layers: [Layer]


class Records(TypedDict):
    """The whole file. Every key may be missing in a study that ended early; `complete` fills it."""

    version: int
    command: str
    result: Result
    workload: dict[str, Any]  # name, data, splits {train, val, test}, metric, unit, batch
    baseline: dict[str, Any]  # plain facts, shown as they are
    floor: dict[str, Any]  # text, margin, smallest_provable
    budget: dict[str, Any]  # seconds, spent, phases [{name, seconds}]
    profile: Profile | dict[str, Any]
    trials: list[dict[str, Any]]  # Trial.plain()
    pareto: list[Point]
    ablation: list[AblationRow]
    opponents: list[Opponent]
    refused: list[dict[str, Any]]  # method, reason, remedy, count
    not_allowed: list[str]  # what the budget did not allow
    notes: list[str]
    environment: dict[str, Any]
    seeds: list[int]
    splits_opened: list[dict[str, Any]]  # split, when, by
    timing: dict[str, Any]  # of the verification: restarts, planned, others (share of the cores that others took, a restart)


def empty_result(status: str, workload: str = "") -> dict[str, Any]:
    """A result with every key and nothing in it.

    Example:
        >>> empty_result("failed")["winner"] is None
        True
    """
    return {
        "status": status,
        "workload": workload,
        "seconds": 0.0,
        "baseline": None,
        "winner": None,
        "ablation": [],
        "artifact": None,
        "report": None,
    }


_TABLES = ("trials", "pareto", "ablation", "opponents", "refused", "not_allowed", "notes", "seeds", "splits_opened")
_FACTS = ("workload", "baseline", "floor", "budget", "profile", "environment", "timing")


def complete(records: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with every top-level key, so that a study that failed early has a report too.

    Raises:
        BadInput: not records, or of a newer version.
    """
    if not isinstance(records, Mapping) or not isinstance(records.get("result"), Mapping):
        raise BadInput("the records hold no result", "give the records.json that quadriga run wrote")
    if records.get("version", VERSION) > VERSION:
        raise BadInput(f"the records are of version {records['version']}, this is {VERSION}", "upgrade quadriga")
    full = deepcopy(dict(records))
    for key in _TABLES:
        full[key] = list(full.get(key) or [])
    for key in _FACTS:
        full[key] = dict(full.get(key) or {})
    full["version"], full["command"] = VERSION, str(full.get("command") or "")
    full["result"] = {**empty_result("failed"), **full["result"]}
    return full


def finite(value: Any) -> Any:
    """Plain data with NaN and infinities as None, which JSON has no number for.

    Example:
        >>> finite({"loss": float("nan"), "steps": (1, 2)})
        {'loss': None, 'steps': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
