"""What a judgement ends with: counts, mean preference, position bias, tokens."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from mixdpo.evaluation.verdicts import Verdict


def failures(verdicts: Iterable[Verdict]) -> Counter[str]:
    """How many verdicts failed, by kind of reason: what comes before the first colon."""
    return Counter(verdict.failed.split(":")[0] for verdict in verdicts if verdict.failed is not None)


def by_prompt(verdicts: Iterable[Verdict]) -> dict[int, dict[str, float]]:
    """index -> order -> preference, without what failed."""
    found: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for verdict in verdicts:
        if verdict.preference is not None:
            found[verdict.index][verdict.order] = verdict.preference
    return dict(found)


def report(verdicts: Sequence[Verdict], wanted: int, judge: dict[str, Any]) -> list[str]:
    """Lines to print.

    Args:
        verdicts: those asked for, as far as there are any, failed ones included.
        wanted: how many were asked for.
        judge: the header's part about the judge; a reward model has no `order`.
    """
    failed, found = failures(verdicts), by_prompt(verdicts)
    judged = sum(map(len, found.values()))
    lines = [f"judged {judged} of {wanted}, failed {failed.total()}"]
    lines += [f"  failed: {count} x {reason}" for reason, count in failed.most_common()]
    if judge.get("order") == "both":
        lines += _both_orders([orders for orders in found.values() if len(orders) == 2])
    elif found:
        mean = fmean(p for orders in found.values() for p in orders.values())
        lines.append(f"mean preference for the model: {mean:.4f} ({len(found)} prompts)")
        lines += _random_order(found.values()) if "order" in judge else []
    return lines + _tokens(verdicts)


def _both_orders(prompts: Sequence[dict[str, float]]) -> list[str]:
    """Of prompts that were judged in both orders: preferences by order."""
    if not prompts:
        return ["no prompt has a verdict in both orders"]
    pairs = [(orders["model_first"], orders["baseline_first"]) for orders in prompts]
    mean = fmean((one + other) / 2 for one, other in pairs)
    shown_first = fmean((one + 1 - other) / 2 for one, other in pairs)
    changed = fmean((one - 0.5) * (other - 0.5) < 0 for one, other in pairs)
    return [
        f"mean preference for the model: {mean:.4f} ({len(pairs)} prompts in both orders)",
        f"position bias: mean preference for the response shown first {shown_first:.4f} (0.5 is none); the winner "
        f"changes with the order for {changed:.1%} of the prompts",
    ]


def _random_order(prompts: Iterable[dict[str, float]]) -> list[str]:
    given: defaultdict[str, list[float]] = defaultdict(list)
    for orders in prompts:
        for order, preference in orders.items():
            given[order].append(preference)
    if len(given) < 2:
        return []
    first, second = fmean(given["model_first"]), fmean(given["baseline_first"])
    return [
        f"position bias: mean preference for the model {first:.4f} where it is shown first "
        f"({len(given['model_first'])} prompts), {second:.4f} where the baseline is "
        f"({len(given['baseline_first'])}); difference {first - second:+.4f}"
    ]


def _tokens(verdicts: Iterable[Verdict]) -> list[str]:
    """Of the verdicts that count: what failed and was asked again later was paid for as well."""
    used = [(v.judge_prompt_tokens, v.judge_completion_tokens or 0) for v in verdicts]
    said = [(prompt, completion) for prompt, completion in used if prompt is not None]
    if not said:
        return []
    prompt, completion = (sum(column) for column in zip(*said, strict=True))
    return [f"for these verdicts the judge read {prompt} tokens and wrote {completion}"]
