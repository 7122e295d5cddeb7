"""A gold score before and after training: greedy answers to held-out prompts, scored without a judge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixdpo.evaluation.bootstrap import paired_bootstrap
from mixdpo.evaluation.generation import Generation, generate
from mixdpo.make_pairs import scores_of

Scorer = Callable[[dict[str, Any], list[str]], list[float]]
"""Scores of several answers to one prompt row; larger is better."""


@dataclass(frozen=True)
class Answers:
    """Of one model to P prompts.

    Attributes:
        texts: P answers.
        scores: (P,) gold scores.
        tokens: (P,) lengths in tokens, the end token counted.
        ended: (P,) bool, False where the answer was cut at the limit of new tokens.
    """

    texts: list[str]
    scores: np.ndarray
    tokens: np.ndarray
    ended: np.ndarray

    def rows(self) -> list[dict[str, Any]]:
        """One answer a row, in JSON's types; no score is null."""
        scores = [None if np.isnan(score) else float(score) for score in self.scores]
        columns = zip(self.texts, scores, self.tokens.tolist(), self.ended.tolist(), strict=True)
        return [dict(zip(("text", "score", "tokens", "ended"), values, strict=True)) for values in columns]


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[dict[str, Any]], scorer: Scorer | None, **options: Any
) -> Answers:
    """Generate one greedy answer to each prompt row (key `prompt`) and score it; options as for `generate`.

    Without a scorer the scores are NaN, and only lengths and end tokens can be compared.
    """
    return scored(prompts, greedy(model, tokenizer, prompts, **options), scorer)


def greedy(model: Any, tokenizer: Any, prompts: Sequence[dict[str, Any]], **options: Any) -> list[Generation]:
    """One answer to each prompt row; options as for `generate`."""
    return [g for (g,) in generate(model, tokenizer, [row["prompt"] for row in prompts], **options)]


def scored(prompts: Sequence[dict[str, Any]], generations: Sequence[Generation], scorer: Scorer | None) -> Answers:
    """Answers with their scores; NaN without a scorer."""
    scores = [np.nan] * len(prompts)
    if scorer:
        scores = [
            score for row, g in zip(prompts, generations, strict=True) for score in scores_of(scorer, row, [g.text])
        ]
    return Answers(
        [g.text for g in generations],
        np.array(scores, dtype=float),
        np.array([g.tokens for g in generations], dtype=float),
        np.array([g.ended for g in generations], dtype=bool),
    )


def compare(before: Answers, after: Answers, parts: Sequence[str], *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Rows of the table: name -> n, before, after, difference, and its paired bootstrap 95 % interval (low, high).

    Args:
        parts: P names; each part of the prompts is reported apart as well.
        seed: of the bootstrap.
    """
    everything = np.ones(len(parts), dtype=bool)
    groups = {"all prompts": everything} | {part: np.array(parts) == part for part in dict.fromkeys(parts)}
    rows = {
        f"gold score, {name}": _row(before.scores[group], after.scores[group], seed)
        for name, group in groups.items()
        if not np.isnan(before.scores[group]).any()
    }
    rows["answer length, tokens"] = _row(before.tokens, after.tokens, seed)
    rows["ended by itself"] = _row(before.ended.astype(float), after.ended.astype(float), seed)
    return rows


def _row(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, float]:
    interval = paired_bootstrap(before, after, seed=seed)
    means = {"n": len(before), "before": float(before.mean()), "after": float(after.mean())}
    return means | {"difference": float(interval.mean), "low": float(interval.low), "high": float(interval.high)}


def markdown(rows: Mapping[str, Mapping[str, float]], facts: Mapping[str, str]) -> str:
    """The table that a run ends with: `compare`'s rows, then single facts."""
    lines = ["| held-out prompts | n | before | after | difference [95 % interval] |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        digits = 1 if "tokens" in name else 3
        change = f"{row['difference']:+.{digits}f} [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
        lines.append(f"| {name} | {row['n']} | {row['before']:.{digits}f} | {row['after']:.{digits}f} | {change} |")
    lines += ["", "| training and held-out pairs | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in facts.items()])
