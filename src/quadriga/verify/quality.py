"""Kept quality: two models' scores on the same examples, compared in pairs against a margin."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quadriga.core.batch import tensors, tree_map
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric
from quadriga.measure.quality import Scores, whole_value
from quadriga.measure.stats import Bound, bootstrap_lower, certificate, divided, paired_bootstrap_lower, tango_lower

TANGO = "Tango's score bound (1998)"
PAIRED = "paired bootstrap-t over examples"
SET = "BCa bootstrap over examples"


def compare(
    baseline: Scores,
    candidate: Scores,
    metric: Metric,
    margin: float,
    level: float = 0.99,
    *,
    finalists: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether the candidate is not worse than the baseline by more than the margin.

    Right-or-wrong metrics of equal weight use Tango's score bound, other per-example metrics the paired bootstrap, set
    metrics a bootstrap over examples. Each is one-sided, at `level` divided among the finalists (Bonferroni).

    Args:
        baseline, candidate: scores on the same split, in the same order.
        metric: that both were scored with.
        margin: the loss allowed, in the metric's unit (`Floor.margin`); negative when a gain is demanded.
        level: confidence of all finalists' statements together.
        finalists: how many were named before the split was opened; 1 to 3.
        seed: of the bootstrap.

    Returns:
        Plain data {"metric", "unit", "value", "baseline", "difference", "low", "n", "disagreement", "margin", "level",
        "finalists", "holds", "method"}: value and baseline as the metric gives them; difference and its lower bound low
        signed so that positive is better; holds is low ≥ −margin; disagreement is the rate at which predictions differ,
        or, where there are none, the per-example values; None for a set metric without predictions.

    Raises:
        BadInput: the scores are of different splits.
    """
    if len(baseline) != len(candidate) or (baseline.values is None) != (candidate.values is None):
        raise BadInput(f"scores of {len(baseline)} and {len(candidate)} examples cannot be paired", "score both on one split")
    bound, method = _bound(baseline, candidate, metric, divided(level, finalists), seed)
    return {
        "metric": metric.name,
        "unit": metric.unit,
        "value": candidate.value,
        "baseline": baseline.value,
        "difference": metric.gain(candidate.value, baseline.value),
        "low": bound.low,
        "n": len(baseline),
        "disagreement": disagreement(baseline, candidate),
        "margin": margin,
        "level": level,
        "finalists": finalists,
        "holds": bool(bound.low >= -margin),
        "method": method,
    }


def disagreement(baseline: Scores, candidate: Scores) -> float | None:
    """The fraction of examples whose predictions differ; their values where there are no predictions; None if neither."""
    for name in ("predictions", "values"):
        a, b = getattr(baseline, name), getattr(candidate, name)
        if a is not None and b is not None:
            return float((a != b).mean())
    return None


def standard_error(baseline: Scores, candidate: Scores, metric: Metric) -> float:
    """Of the difference of two models on one split, from pairs of examples, in the metric's unit; 0 for a set metric."""
    if baseline.values is None or candidate.values is None:
        return 0.0
    a, b = (s.weights / s.weights.mean() * s.values for s in (baseline, candidate))
    return float(metric.scale * (b - a).std(ddof=1) / np.sqrt(len(a)))


def without_labels(baseline: Scores, candidate: Scores, metric: Metric, level: float, finalists: int = 1) -> float | None:
    """What the candidate can have lost at most, going by the rate alone at which predictions differ: no label is looked at.

    It holds for metrics that count right predictions. Weak for a network trained anew, sharp for one that was only
    quantized or exported.

    Returns:
        Upper bound of the loss in the metric's unit, one-sided at `level` divided among the finalists; None where a score
        has no predictions, or the metric does not count right ones.
    """
    a, b = baseline.predictions, candidate.predictions
    if a is None or b is None or len(a) != len(b) or baseline.values is None or not _right_or_wrong(baseline, candidate):
        return None
    return float(metric.scale * certificate(int((a != b).sum()), len(a), divided(level, finalists)))


def _bound(baseline: Scores, candidate: Scores, metric: Metric, level: float, seed: int) -> tuple[Bound, str]:
    if baseline.values is None or candidate.values is None:
        return _set_bound(baseline, candidate, metric, level, seed), SET
    sign = 1.0 if metric.higher_is_better else -1.0
    b, c = sign * baseline.values, sign * candidate.values
    if _right_or_wrong(baseline, candidate):
        gained, lost, n = int((c > b).sum()), int((c < b).sum()), len(b)
        low = metric.scale * tango_lower(gained, lost, n, level)
        return Bound(metric.scale * (gained - lost) / n, low, level), TANGO
    bound = paired_bootstrap_lower(
        metric.scale * b, metric.scale * c, baseline.weights, candidate_weights=candidate.weights, level=level, seed=seed
    )
    return bound, PAIRED


def _right_or_wrong(baseline: Scores, candidate: Scores) -> bool:
    weights = np.concatenate([baseline.weights, candidate.weights])
    values = np.concatenate([baseline.values, candidate.values])
    return bool(np.isin(values, (0.0, 1.0)).all() and (weights == weights[0]).all())


def _set_bound(baseline: Scores, candidate: Scores, metric: Metric, level: float, seed: int) -> Bound:
    """Both models' outputs are resampled together; a resample on which the metric cannot be had is left out."""
    outputs = tensors(baseline.outputs) + tensors(candidate.outputs)
    if any(t.dim() == 0 or len(t) != len(baseline) for t in outputs):
        raise BadInput(f'the metric "{metric.name}" keeps outputs that have no row per example', "return one row per example")

    def difference(index: np.ndarray) -> float:
        rows = torch.from_numpy(index)
        parts = [tree_map(lambda t: t[rows], tree) for tree in (candidate.outputs, baseline.outputs, baseline.targets)]
        try:
            return metric.scale * metric.gain(whole_value(metric, parts[0], parts[2]), whole_value(metric, parts[1], parts[2]))
        except BadInput:
            return float("nan")

    return bootstrap_lower(difference, len(baseline), level=level, seed=seed)
