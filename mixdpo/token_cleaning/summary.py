"""A selection in numbers: how much is kept, from which sources, and how much of the planted noise is cut."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixdpo.token_cleaning.selection import Kept


def summarise(
    weights: np.ndarray,
    scores: np.ndarray,
    offsets: np.ndarray,
    sources: Sequence[str] | np.ndarray,
    kept: Kept | None = None,
    planted: np.ndarray | None = None,
) -> dict[str, Any]:
    """Numbers on M tokens of N samples, fit for JSON; a share of nothing is None.

    Args:
        weights: (M,) >= 0, weight of each token in the loss; 0 = cut.
        scores: (M,); NaN for tokens that were not scored, which are left out of the numbers on scores.
        offsets: (N+1,) int64; the tokens of sample n are offsets[n] to offsets[n+1].
        sources: (N,) str, where each sample is from.
        kept: threshold and ties of the selection that made the weights.
        planted: (M,) bool, the tokens that are planted noise.

    Returns:
        tokens, kept_tokens (weight > 0), kept_share (of the weight), threshold, ties, ties_kept, samples,
        samples_keeping_nothing, mean_abs_score, by_source {source: tokens, kept_share}, by_position
        (kept shares of the ten tenths of the responses) and with `planted` also planted (see `_find_planted`).
    """
    weights, scores = np.asarray(weights, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    lengths = np.diff(offsets)
    sample = np.repeat(np.arange(len(lengths)), lengths)
    scored = scores[~np.isnan(scores)]
    summary: dict[str, Any] = {
        "tokens": len(weights),
        "kept_tokens": int(np.count_nonzero(weights)),
        "kept_share": _ratio(weights.sum(), len(weights)),
        "threshold": kept.threshold if kept else None,
        "ties": int(kept.ties) if kept else None,
        "ties_kept": int(kept.ties_kept) if kept else None,
        "samples": len(lengths),
        "samples_keeping_nothing": int(len(lengths) - len(np.unique(sample[weights > 0]))),
        "mean_abs_score": _ratio(np.abs(scored).sum(), len(scored)),
        "by_source": _by_source(weights, sample, sources),
        "by_position": _by_position(weights, sample, offsets),
    }
    if planted is not None:
        summary["planted"] = _find_planted(weights, scores, np.asarray(planted, dtype=bool))
    return summary


def describe(stage: dict[str, Any]) -> str:
    """One line on what a stage keeps."""
    if stage["scorer"] is None:
        return f"stage {stage['stage']}: all {stage['tokens']} response tokens"
    line = f"stage {stage['stage']}: {stage['kept_share']:.1%} of {stage['tokens']} response tokens kept"
    if stage["mean_abs_score"] is not None:
        line += f", mean |score| {stage['mean_abs_score']:.3f}"
    if stage["threshold"] is not None:
        line += f", threshold {stage['threshold']:.4g} ({stage['ties']} ties)"
    planted = stage.get("planted", {})
    names = {"auc": "AUC", "share": "share before", "kept_noise_rate": "among the kept"}
    known = [f"{name} {planted[key]:.3f}" for key, name in names.items() if planted.get(key) is not None]
    return line + ("; planted noise: " + ", ".join(known) if known else "")


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _by_source(weights: np.ndarray, sample: np.ndarray, sources: Sequence[str] | np.ndarray) -> dict[str, Any]:
    names, source = np.unique(np.asarray(sources, dtype=str), return_inverse=True)
    rows = zip(names.tolist(), *_kept_shares(weights, source[sample], len(names)), strict=True)
    return {name: {"tokens": count, "kept_share": share} for name, count, share in rows}


def _by_position(weights: np.ndarray, sample: np.ndarray, offsets: np.ndarray) -> list[float | None]:
    """Token i of a sample's m is in tenth ⌊10 i / m⌋."""
    tenth = 10 * (np.arange(len(weights)) - offsets[sample]) // np.diff(offsets)[sample]
    return _kept_shares(weights, tenth, 10)[1]


def _kept_shares(weights: np.ndarray, group: np.ndarray, groups: int) -> tuple[list[int], list[float | None]]:
    """Tokens of each group, and the share of their weight that is kept."""
    tokens, kept = np.bincount(group, minlength=groups).tolist(), np.bincount(group, weights, minlength=groups)
    return tokens, list(map(_ratio, kept, tokens))


def _find_planted(weights: np.ndarray, scores: np.ndarray, planted: np.ndarray) -> dict[str, float | None]:
    """Cutting as a detector of planted tokens: `share` of them before and weighted share after (`kept_noise_rate`),
    precision and recall, and the threshold-free `auc`."""
    cut, is_scored = np.count_nonzero(planted & (weights == 0)), ~np.isnan(scores)
    return {
        "share": _ratio(np.count_nonzero(planted), len(planted)),
        "auc": _auc(scores[is_scored & ~planted], scores[is_scored & planted]),
        "precision": _ratio(cut, np.count_nonzero(weights == 0)),
        "recall": _ratio(cut, np.count_nonzero(planted)),
        "kept_noise_rate": _ratio(weights[planted].sum(), weights.sum()),
    }


def _auc(clean: np.ndarray, noise: np.ndarray) -> float | None:
    """Probability that a clean token's score is above a planted one's, ties ½; exact."""
    noise = np.sort(noise)
    wins = np.searchsorted(noise, clean, "left").sum() + np.searchsorted(noise, clean, "right").sum()
    return _ratio(wins, 2 * len(clean) * len(noise))
