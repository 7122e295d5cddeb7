"""Gold scores, which need no judge: of greedy responses before and after training, and of a model's responses to a
benchmark."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixdpo.errors import InputError, located
from mixdpo.evaluation.bootstrap import Interval, paired_bootstrap
from mixdpo.evaluation.formats import PromptResponses
from mixdpo.evaluation.generation import Response, generate
from mixdpo.storage.files import Row

Scorer = Callable[[dict[str, Any], list[str]], Any]
"""(prompt row, responses) -> a score for each; larger is better."""


class Responses(NamedTuple):
    """P responses of one model, and their gold scores (P,); NaN without a scorer."""

    given: Sequence[Response]
    scores: np.ndarray

    def rows(self) -> list[Row]:
        """A row for each response, in JSON's types; no score is null."""
        scores = [None if np.isnan(score) else float(score) for score in self.scores]
        return [{**vars(response), "score": score} for response, score in zip(self.given, scores, strict=True)]


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Row], **options: Any) -> list[Response]:
    """One response to each prompt row (key `prompt`); options as for `generate`."""
    return [response for (response,) in generate(model, tokenizer, prompts, **options)]


def scored(prompts: Sequence[Row], given: Sequence[Response], scorer: Scorer | None) -> Responses:
    """One response to each prompt row, with its score."""
    pairs = zip(prompts, given, strict=True)
    return Responses(given, np.array([scores_of(scorer, row, [r.text])[0] if scorer else np.nan for row, r in pairs]))


def compare(before: Responses, after: Responses, parts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Rows of the table: name -> n, before, after, difference, and its paired bootstrap 95 % interval (low, high).

    Args:
        parts: P names; each part of the prompts is reported apart as well.
    """
    groups = {} if np.isnan(before.scores).any() else _groups(parts)
    rows = {f"gold score, {name}": _row(before.scores[g], after.scores[g]) for name, g in groups.items()}
    for name, field in (("response length, tokens", "tokens"), ("ended by itself", "ended")):
        rows[name] = _row(*([getattr(each, field) for each in responses.given] for responses in (before, after)))
    return rows


def _groups(parts: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> (P,) bool: all prompts, then each part that has a name."""
    named = {part: np.array(parts) == part for part in dict.fromkeys(parts) if part}
    return {"all prompts": np.ones(len(parts), dtype=bool)} | named


def _row(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> dict[str, float]:
    interval = paired_bootstrap(before, after)
    means = {"n": len(before), "before": float(np.mean(before)), "after": float(np.mean(after))}
    return means | {"difference": interval.mean, "low": interval.low, "high": interval.high}


def markdown(rows: Mapping[str, Mapping[str, float]], summary: Mapping[str, str]) -> str:
    """The table that a run ends with: `compare`'s rows, then the single values of a summary."""
    head = ["| held-out prompts | n | before | after | difference [95 % interval] |", "|---|---|---|---|---|"]
    lines = head if rows else []
    for name, row in rows.items():
        form, change = ".1f" if "tokens" in name else ".3f", Interval(row["difference"], row["low"], row["high"])
        lines.append(f"| {name} | {row['n']} | {row['before']:{form}} | {row['after']:{form}} | {change:+{form}} |")
    lines += ["" for _ in lines[:1]] + ["| training and held-out rows | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in summary.items())])


def gold_table(answered: Sequence[PromptResponses], scores: np.ndarray) -> str:
    """A Markdown table: the mean score with its bootstrap 95 % interval over prompts, by category too, then lengths.

    Args:
        answered: P prompts with their responses.
        scores: (P,) of these responses.
    """
    lines = ["| gold score | n | mean [95 % interval] |", "|---|---|---|"]
    for name, group in _groups([a.prompt.category for a in answered]).items():
        lines.append(f"| {name} | {group.sum()} | {paired_bootstrap(np.zeros(group.sum()), scores[group]):.3f} |")
    texts, tokens, ended = zip(*(vars(a.responses[-1]).values() for a in answered), strict=True)
    means = {"response length, tokens": f"{np.mean(tokens):.1f}", "ended by itself": f"{np.mean(ended):.3f}"}
    means["empty responses"] = f"{np.mean([not text.strip() for text in texts]):.3f}"
    return "\n".join([*lines, *(f"| {name} | {len(texts)} | {mean} |" for name, mean in means.items())]) + "\n"


def scores_of(scorer: Scorer, row: Row, texts: list[str]) -> list[float]:
    """Scores of responses to one prompt row.

    Raises:
        InputError: the scorer refuses the row, or gives other than one finite number for each text.
    """
    prompt = f"prompt {row['prompt']!r:.80}"
    with located(prompt):
        scores = [float(score) for score in scorer(row, texts)]
    if len(scores) != len(texts) or not np.isfinite(scores).all():
        raise InputError(f"{prompt}: the scorer gave {scores} for {len(texts)} texts; give one finite number each")
    return scores
