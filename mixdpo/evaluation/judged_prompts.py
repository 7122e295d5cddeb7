"""What verdicts say prompt by prompt, and what beside the preferences could explain a win rate."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from mixdpo.errors import InputError
from mixdpo.evaluation.verdicts import Verdict, VerdictsFile
from mixdpo.storage.identity import differences


@dataclass(frozen=True)
class Judged:
    """One verdicts file, prompt by prompt.

    Attributes:
        prompts: {index: preference, characters of the model's and of the baseline's response} of those judged.
        failed: why the others are left out, and how many.
        facts: name -> what else to know about responses and judge; None where the file does not say.
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
    verdicts, failed = _by_prompt(file.verdicts, file.header["judge"].get("order") == "both")
    failed["not judged yet"] = file.header["prompts"] - len({verdict.index for verdict in file.verdicts})
    reasons = {reason: count for reason, count in failed.most_common() if count}
    if len(verdicts) < 2:
        raise InputError(f"{file.path} has {len(verdicts)} judged prompts (left out: {reasons}): judge at least two")
    prompts = {index: (_preference(each), each[0].len_model, each[0].len_baseline) for index, each in verdicts.items()}
    return Judged(file, prompts, reasons, facts(file.verdicts))


def _by_prompt(verdicts: Iterable[Verdict], both: bool) -> tuple[dict[int, list[Verdict]], Counter[str]]:
    """Verdicts of each prompt that is judged, in both orders if `both`; why others are not, and how many."""
    grouped: dict[int, list[Verdict]] = {}
    for verdict in verdicts:
        grouped.setdefault(verdict.index, []).append(verdict)
    failed = Counter[str]()
    for index, each in list(grouped.items()):
        if reasons := [verdict.failed.partition(":")[0] for verdict in each if verdict.failed is not None]:
            failed[reasons[0]] += 1
        elif len(each) < 1 + both:
            failed["judged in one order only"] += 1
        else:
            continue
        del grouped[index]
    return grouped, failed


def _preference(verdicts: Iterable[Verdict]) -> float:
    return fmean(verdict.preference for verdict in verdicts if verdict.preference is not None)


def facts(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """What verdicts, failed ones included, say about the responses and the judge; see `Judged`."""
    prompts = list({verdict.index: verdict for verdict in verdicts}.values())
    bias = _position_bias(verdicts)
    return {
        "length of the model's responses, characters": _mean(verdict.len_model for verdict in prompts),
        "length of the baseline's responses, characters": _mean(verdict.len_baseline for verdict in prompts),
        "length of the model's responses, tokens": _mean(v.tokens for v in prompts if v.tokens is not None),
        "responses that ended by themselves, %": _mean(100 * v.ended for v in prompts if v.ended is not None),
        "empty responses, %": _mean(100 * (verdict.len_model == 0) for verdict in prompts),
        "preference for the response shown first, %": None if bias is None else 100 * bias,
    }


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None


def _position_bias(verdicts: Sequence[Verdict]) -> float | None:
    """Mean preference for the response shown first; 0.5 is none. None if there is one order only.

    Half of each order, so that a strong model does not look like a bias.
    """
    known = [(verdict.order, verdict.preference) for verdict in verdicts if verdict.preference is not None]
    model_first = _mean(preference for order, preference in known if order == "model_first")
    baseline_first = _mean(1 - preference for order, preference in known if order == "baseline_first")
    return None if model_first is None or baseline_first is None else (model_first + baseline_first) / 2


def report(verdicts: Sequence[Verdict], wanted: int, both: bool) -> list[str]:
    """Lines that a judgement ends with: counts, mean preference, position bias, tokens.

    Args:
        verdicts: those asked for, as far as there are any, failed ones included.
        wanted: how many were asked for.
        both: each prompt was to be asked in both orders.
    """
    failed = Counter(verdict.failed.partition(":")[0] for verdict in verdicts if verdict.failed is not None)
    lines = [f"judged {len(verdicts) - failed.total()} of {wanted}, failed {failed.total()}"]
    lines += [f"  failed: {count} x {reason}" for reason, count in failed.most_common()]
    prompts = list(_by_prompt(verdicts, both)[0].values())
    if prompts:
        among = f"({len(prompts)} prompts{' in both orders' * both})"
        lines.append(f"mean preference for the model: {fmean(map(_preference, prompts)):.4f} {among}")
    if (bias := _position_bias(verdicts)) is not None:
        lines.append(f"position bias: mean preference for the response shown first {bias:.4f} (0.5 is none)")
    if both and prompts:
        changed = fmean((one.preference - 0.5) * (other.preference - 0.5) < 0 for one, other in prompts)
        lines.append(f"the winner changes with the order for {changed:.1%} of the prompts")
    used = [v for v in verdicts if v.judge_prompt_tokens is not None]
    if used:
        read, wrote = (sum(getattr(v, f"judge_{kind}_tokens") or 0 for v in used) for kind in ("prompt", "completion"))
        lines.append(f"for these verdicts the judge read {read} tokens and wrote {wrote}")
    return lines


def shared_prompts(judged: Sequence[Judged]) -> list[int]:
    """Indices of the prompts that all files judged.

    Raises:
        InputError: they were not judged alike, or have fewer than two prompts in common.
    """
    one, other = judged[0], judged[-1]
    shared = sorted(one.prompts.keys() & other.prompts.keys())
    header, other_header = ({key: each.file.header[key] for key in ("baseline", "judge")} for each in (one, other))
    changed = differences(header, other_header)
    lengths = ((index, one.prompts[index][2], other.prompts[index][2]) for index in shared)
    if unequal := [f"index {index} has {x} and {y} characters" for index, x, y in lengths if x != y]:
        changed.append(f"the baseline's responses, and so the instructions or their order ({unequal[0]})")
    if changed:
        raise InputError(
            f"{one.file.path} and {other.file.path} differ in {'; '.join(changed)}: judge both models alike, on "
            "responses to the same instructions in the same order"
        )
    if len(shared) < 2:
        raise InputError(f"{one.file.path} and {other.file.path} have {len(shared)} judged prompts in common: need two")
    return shared
