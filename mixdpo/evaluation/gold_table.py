"""Gold scores of one model's answers, or of two models' to the same prompts, as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import paired_bootstrap
from mixdpo.evaluation.formats import Answered, Prompt
from mixdpo.sources import text_rows


def gold_table(answered: Sequence[Answered], scores: np.ndarray, other: np.ndarray | None = None) -> str:
    """A Markdown table: the mean score with its bootstrap 95 % interval over prompts, by category too, then lengths.

    Args:
        answered: P prompts with their answers.
        scores: (P,) of these answers.
        other: (P,) of another model's answers to the same prompts: their paired difference is added.
    """
    parts = np.array([a.prompt.category for a in answered])
    everything = np.ones(len(parts), dtype=bool)
    groups = {"all prompts": everything} | {name: parts == name for name in dict.fromkeys(parts.tolist()) if name}
    head = ["| gold score | n | mean | 95 % interval |", "|---|---|---|---|"]
    if other is not None:
        head = [head[0] + " minus the other model's |", head[1] + "---|"]
    for name, group in groups.items():
        mean = paired_bootstrap(np.zeros(group.sum()), scores[group])
        cells = [name, str(group.sum()), f"{mean.mean:.3f}", f"[{mean.low:.3f}, {mean.high:.3f}]"]
        if other is not None:
            cells.append(str(paired_bootstrap(other[group], scores[group])))
        head.append("| " + " | ".join(cells) + " |")
    answers = [a.answers[-1] for a in answered]
    facts = {
        "answer length, tokens": f"{np.mean([answer.tokens for answer in answers]):.1f}",
        "ended by itself": f"{np.mean([answer.ended for answer in answers]):.3f}",
        "empty answers": f"{np.mean([not answer.text.strip() for answer in answers]):.3f}",
    }
    return "\n".join([*head, "", "| answers | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())]) + "\n"


def other_scores(path: str | None, prompts: Sequence[Prompt]) -> np.ndarray | None:
    """(P,) scores that another model's test has written, prompt by prompt.

    Raises:
        InputError: the file is none of `run.py test`, or is of other prompts.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError(f"model.against: no file {path}; give the .json that another run.py test has written")
    rows: list[dict[str, Any]] = [row for _, row in text_rows(Path(path))]
    if not all(isinstance(row.get("score"), int | float) for row in rows):
        raise InputError(f"model.against: {path} has rows without a score: give the .json of run.py test")
    if len(rows) != len(prompts):
        raise InputError(f"model.against: {path} has {len(rows)} prompts, and here are {len(prompts)}: give the same")
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), 1):
        if other := [name for name, value in prompt.row.items() if row.get(name) != value]:
            raise InputError(f"model.against: {path}, row {number} is another prompt ({', '.join(other)} differ)")
    return np.array([row["score"] for row in rows], dtype=float)
