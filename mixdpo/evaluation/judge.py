"""Pairwise judging: a model's outputs against a baseline's, by a judge behind an endpoint or by a reward model."""

import asyncio
import hashlib
import signal
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import CONTINUES, Endpoint
from mixdpo.evaluation.judge_prompt import NoVerdict
from mixdpo.evaluation.judge_report import report
from mixdpo.evaluation.outputs import Comparison, content_hash, match, read_outputs
from mixdpo.evaluation.verdicts import VERDICTS, Order, Verdict
from mixdpo.storage.lines_file import LinesWriter

Question = tuple[Comparison, Order]


Judge = Any
"""`about` (what decides its verdicts, in JSON's types); `async with judge`; `await judge(comparison, order)` ->
Response, or raises NoVerdict."""


Asked = tuple[Judge, dict[str, Any], list[Question]]
"""A judge, what decides its verdicts, and what to ask it."""


def judge(
    outputs: str,
    *,
    baseline: str,
    model: str,
    base_url: str | None = None,
    reward_model: bool = False,
    out: str | None = None,
    order: Literal["random", "both"] = "random",
    seed: int = 0,
    limit: int | None = None,
    concurrency: int = 8,
    attempts: int = 5,
    timeout: float = 60.0,
    max_tokens: int = 1,
    log_probs: bool = True,
) -> int:
    """Ask a judge which of two responses is better: a model's or a baseline's to the same instruction.

    Each verdict is on the disk as it comes. Stopped or killed, the same command asks for what is missing, and again for
    what failed; the exit status is 1 if something failed. The key is OPENAI_API_KEY, from the environment only.

    Args:
        outputs: the model's answers in AlpacaEval's format: a JSON list of objects with instruction, output, generator.
        baseline: the baseline's answers in the same format; they may be to more instructions.
        model: the judge's name at the endpoint; with reward_model a hub id or folder.
        base_url: of an OpenAI-compatible server, such as http://localhost:8000/v1; default OPENAI_BASE_URL, or OpenAI.
        reward_model: the judge is a sequence classifier with one label, run here: the preference is the sigmoid of the
            difference of its scores. Order, seed and all options of requests do not matter to it.
        out: the verdicts file; default is OUTPUTS with the suffix .verdicts.jsonl.
        order: random: the seed and the instruction decide which response is shown first; both: each prompt is asked in
            both orders, and its preference is their mean.
        seed: of the random order.
        limit: judge only the first so many outputs; a later call without it judges the others.
        concurrency: requests at a time.
        attempts: requests for one verdict, at most; then it counts as failed.
        timeout: seconds for one request.
        max_tokens: that the judge may write. The verdict is in the first one, but some servers need more.
        log_probs: ask for log-probabilities of the first token; where the endpoint returns none, the verdict is the
            letter that it writes.

    Raises:
        InputError: a file is malformed, the files or the options do not fit the verdicts that are there, or the
            endpoint refuses everything.
    """
    _check(limit, concurrency, attempts, timeout, max_tokens)
    responses = read_outputs(baseline)
    comparisons = match(read_outputs(outputs), responses, baseline)
    print(f"{outputs} has answers to {len(comparisons)} of the {len(responses)} instructions of {baseline}")
    options = {"attempts": attempts, "timeout": timeout, "max_tokens": max_tokens, "log_probs": log_probs}
    if reward_model:
        how, about, questions = _reward_model(model, comparisons[:limit])
        concurrency = 1
    else:
        how, about, questions = _endpoint(Endpoint(model, base_url, **options), comparisons[:limit], order, seed)
    path = Path(out) if out else Path(outputs).with_suffix(".verdicts.jsonl")
    with LinesWriter(path, VERDICTS, _header(comparisons, about)) as writer:
        known = sum(_is_known(writer, question) for question in questions)
        print(f"{path} has {known} of the {len(questions)} verdicts on {len(comparisons[:limit])} of them")
        stopped_by = asyncio.run(_interruptible(_ask_all(how, questions, writer, concurrency)))
        verdicts = [writer.rows[key] for key in map(_key, questions) if key in writer.rows]
    print("\n".join(report(verdicts, len(questions), about)))
    if stopped_by is not None:
        print(f"stopped by {stopped_by.name}; {CONTINUES}")
        return 128 + stopped_by
    print(f"python -m mixdpo score {path}")
    return int(any(verdict.failed is not None for verdict in verdicts))


def _reward_model(model: str, comparisons: Sequence[Comparison]) -> Asked:
    from mixdpo.evaluation.reward_judge import RewardJudge

    how = RewardJudge(model)
    return how, how.about, [(comparison, "model_first") for comparison in comparisons]


def _endpoint(how: Endpoint, comparisons: Sequence[Comparison], order: Literal["random", "both"], seed: int) -> Asked:
    about = how.about | {"order": order, "seed": seed if order == "random" else None}
    return how, about, [(comparison, each) for comparison in comparisons for each in _orders(comparison, order, seed)]


def _check(limit: int | None, concurrency: int, attempts: int, timeout: float, max_tokens: int) -> None:
    least = {"concurrency": concurrency, "attempts": attempts, "max_tokens": max_tokens}
    least |= {} if limit is None else {"limit": limit}
    if bad := [f"{name} {value}" for name, value in least.items() if value < 1]:
        raise InputError(f"{', '.join(bad)}: need at least 1")
    if not timeout > 0:
        raise InputError(f"timeout {timeout}: need seconds above 0")


def _header(comparisons: Sequence[Comparison], about: dict[str, Any]) -> dict[str, Any]:
    """What is judged, and how; not how many prompts of it, so that `limit` can be raised later."""
    first = comparisons[0]
    return {
        "model": first.model.generator,
        "baseline": first.baseline.generator,
        "outputs": content_hash(comparisons),
        "prompts": len(comparisons),
        "judge": about,
    }


def _orders(comparison: Comparison, order: Literal["random", "both"], seed: int) -> list[Order]:
    if order == "both":
        return ["model_first", "baseline_first"]
    return [drawn_order(comparison.instruction, seed)]


def drawn_order(instruction: str, seed: int) -> Order:
    """By a hash of both, so that a prompt is shown alike whatever else is judged."""
    drawn = hashlib.sha256(f"{seed} {instruction}".encode()).digest()[0]
    return "baseline_first" if drawn % 2 else "model_first"


def _key(question: Question) -> tuple[int, Order]:
    return question[0].index, question[1]


def _is_known(writer: LinesWriter, question: Question) -> bool:
    known = writer.rows.get(_key(question))
    return known is not None and known.failed is None


async def _ask_all(how: Judge, questions: Sequence[Question], writer: LinesWriter, concurrency: int) -> None:
    """Ask what has no verdict yet, `concurrency` at a time."""
    missing = [question for question in questions if not _is_known(writer, question)]
    waiting, failed = iter(missing), 0  # one iterator for all workers: each question goes to one of them

    async def work(bar: Any) -> None:
        nonlocal failed
        for question in waiting:
            verdict = await _ask(how, *question)
            writer.append(verdict.line())
            failed += verdict.failed is not None
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()

    known = len(questions) - len(missing)
    try:
        with tqdm(total=len(questions), initial=known, unit="verdict") as bar:
            async with how, asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(missing))):
                    group.create_task(work(bar))
    except BaseExceptionGroup as error:
        raise error.exceptions[0] from None  # the others are its consequences, or say the same


async def _ask(how: Judge, comparison: Comparison, order: Order) -> Verdict:
    preference, source, failed = None, None, None
    try:
        response = await how(comparison, order)
        preference, source = response.preference(order), response.source
    except NoVerdict as error:
        response, failed = error, str(error)
    return Verdict(
        index=comparison.index,
        order=order,
        preference=preference,
        source=source,
        failed=failed,
        judge_prompt_tokens=response.prompt_tokens,
        judge_completion_tokens=response.completion_tokens,
        len_model=len(comparison.model.text),
        len_baseline=len(comparison.baseline.text),
        tokens=comparison.model.tokens,
        ended=comparison.model.ended,
    )


async def _interruptible(work: Coroutine[Any, Any, None]) -> signal.Signals | None:
    """Do the work until it is done or a SIGINT or SIGTERM comes; returns which."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    came: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        came.append(number)
        task.cancel()

    signals = (signal.SIGINT, signal.SIGTERM)
    for each in signals:
        loop.add_signal_handler(each, stop, each)
    try:
        await work
    except asyncio.CancelledError:
        if not came:
            raise
    finally:
        for each in signals:
            loop.remove_signal_handler(each)
    return came[0] if came else None
