"""What verdicts files say prompt by prompt, and what beside the preferences could explain a win rate."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixdpo.errors import InputError
from mixdpo.evaluation.verdicts import Verdict, VerdictsFile


@dataclass(frozen=True)
class Judged:
    """One verdicts file, prompt by prompt.

    Attributes:
        prompts: {index: preference, characters of the model's and of the baseline's output} of those judged.
        failed: why the others are left out, and how many.
        facts: name -> what else to know about outputs and judge; None where the file does not say.
    """

    file: VerdictsFile
    prompts: dict[int, tuple[float, int, int]]
    failed: dict[str, int]
    facts: dict[str, float | None]


def judged_prompts(file: VerdictsFile) -> Judged:
    """
    Raises:
        InputError: fewer than two prompts have a verdict.
    """
    verdicts: dict[int, list[Verdict]] = {}
    for verdict in file.verdicts:
        verdicts.setdefault(verdict.index, []).append(verdict)
    orders = 2 if file.header["judge"].get("order") == "both" else 1
    prompts, failed = {}, Counter({"not judged yet": file.header["prompts"] - len(verdicts)})
    for index, each in verdicts.items():
        if reasons := [verdict.failed for verdict in each if verdict.failed is not None]:
            failed[reasons[0].partition(":")[0]] += 1
        elif len(each) < orders:
            failed["judged in one order only"] += 1
        else:
            preference = float(np.mean([verdict.preference for verdict in each]))
            prompts[index] = preference, each[0].len_model, each[0].len_baseline
    said = {reason: count for reason, count in failed.most_common() if count}
    if len(prompts) < 2:
        raise InputError(f"{file.path} has {len(prompts)} judged prompts (left out: {said}): judge at least two")
    return Judged(file, prompts, said, facts(file.verdicts))


def facts(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """What verdicts, failed ones included, say about the outputs and the judge; see `Judged`."""
    outputs = list({verdict.index: verdict for verdict in verdicts}.values())
    tokens = [verdict.tokens for verdict in outputs if verdict.tokens is not None]
    ended = [100 * verdict.ended for verdict in outputs if verdict.ended is not None]
    return {
        "length of the model's outputs, characters": _mean([verdict.len_model for verdict in outputs]),
        "length of the baseline's outputs, characters": _mean([verdict.len_baseline for verdict in outputs]),
        "length of the model's outputs, tokens": _mean(tokens),
        "outputs that ended by themselves, %": _mean(ended),
        "empty outputs, %": _mean([100 * (verdict.len_model == 0) for verdict in outputs]),
        "preference for the output shown first, %": _position_bias(verdicts),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _position_bias(verdicts: Sequence[Verdict]) -> float | None:
    """Half of each order, so that a strong model does not look like a bias; 50 is none, None if there is one order."""
    known = [(verdict.order, verdict.preference) for verdict in verdicts if verdict.preference is not None]
    model_first = _mean([100 * preference for order, preference in known if order == "model_first"])
    baseline_first = _mean([100 * (1 - preference) for order, preference in known if order == "baseline_first"])
    return None if model_first is None or baseline_first is None else (model_first + baseline_first) / 2


def shared_prompts(judged: Sequence[Judged]) -> list[int]:
    """Indices of the prompts that all files judged.

    Raises:
        InputError: they were not judged alike, or have fewer than two prompts in common.
    """
    one, other = judged[0], judged[-1]
    shared = sorted(one.prompts.keys() & other.prompts.keys())
    changed = _changed_header(one.file.header, other.file.header)
    lengths = ((index, one.prompts[index][2], other.prompts[index][2]) for index in shared)
    if unequal := [f"index {index} has {x} and {y} characters" for index, x, y in lengths if x != y]:
        changed.append(f"the baseline's outputs, and so the instructions or their order ({unequal[0]})")
    if changed:
        raise InputError(
            f"{one.file.path} and {other.file.path} differ in {'; '.join(changed)}: judge both models alike, on "
            "outputs to the same instructions in the same order"
        )
    if len(shared) < 2:
        raise InputError(f"{one.file.path} and {other.file.path} have {len(shared)} judged prompts in common: need two")
    return shared


def _changed_header(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*one["judge"], *other["judge"]])
    pairs = {"the baseline": (one["baseline"], other["baseline"])}
    pairs |= {f"the judge's {name}": (one["judge"].get(name), other["judge"].get(name)) for name in names}
    return [f"{name} ({a} and {b})" for name, (a, b) in pairs.items() if a != b]
