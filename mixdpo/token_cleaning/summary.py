"""A selection in numbers: how much is kept, and from which sources."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def summarise(
    weights: np.ndarray, scores: np.ndarray, offsets: np.ndarray, sources: Sequence[str], threshold: float | None = None
) -> dict[str, Any]:
    """Numbers on M tokens of N samples, fit for JSON; a share of nothing is None.

    Args:
        weights: (M,) >= 0, weight of each token in the loss; 0 = cut.
        scores: (M,); NaN for tokens that were not scored, which are left out of the numbers on scores.
        offsets: (N+1,) int64; the tokens of sample n are offsets[n] to offsets[n+1].
        sources: (N,) str, where each sample is from.
        threshold: above which the selection kept tokens.

    Returns:
        tokens, kept_tokens (weight > 0), kept_share (of the weight), threshold, samples, samples_keeping_nothing,
        mean_abs_score, by_source {source: tokens, kept_share}.
    """
    weights, scores = np.asarray(weights, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    sample = np.repeat(np.arange(len(sources)), np.diff(offsets))
    scored = scores[~np.isnan(scores)]
    names, source = np.unique(np.asarray(sources, dtype=str), return_inverse=True)
    tokens, kept_weight = (np.bincount(source[sample], each, len(names)) for each in (None, weights))
    columns = zip(names.tolist(), tokens.tolist(), kept_weight, strict=True)
    return {
        "tokens": len(weights),
        "kept_tokens": int(np.count_nonzero(weights)),
        "kept_share": _ratio(weights.sum(), len(weights)),
        "threshold": threshold,
        "samples": len(sources),
        "samples_keeping_nothing": len(sources) - len(np.unique(sample[weights > 0])),
        "mean_abs_score": _ratio(np.abs(scored).sum(), len(scored)),
        "by_source": {name: {"tokens": m, "kept_share": _ratio(weight, m)} for name, m, weight in columns},
    }


def describe(stage: dict[str, Any]) -> str:
    """One line on what a stage keeps."""
    if stage["scorer"] is None:
        return f"stage {stage['stage']}: all {stage['tokens']} response tokens"
    line = f"stage {stage['stage']}: {stage['kept_share']:.1%} of {stage['tokens']} response tokens kept"
    if stage["mean_abs_score"] is not None:
        line += f", mean |score| {stage['mean_abs_score']:.3f}"
    if stage["threshold"] is not None:
        line += f", threshold {stage['threshold']:.4g}"
    return line


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
