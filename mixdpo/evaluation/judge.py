"""Pairwise judging: a model's responses against a baseline's, by a judge behind an endpoint or by a reward model."""

import asyncio
import hashlib
import json
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt
from tqdm import tqdm

from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import CONTINUES, Endpoint, NoResponse
from mixdpo.evaluation.formats import Row, Rows, read_responses
from mixdpo.evaluation.judge_prompt import messages, prompt_hash, read_choice
from mixdpo.evaluation.judged_prompts import report
from mixdpo.evaluation.verdicts import Order, Source, Verdict, VerdictsWriter


@dataclass(frozen=True)
class Comparison:
    """A model's and a baseline's response to one instruction.

    Attributes:
        index: position in the model's file, from 0.
        tokens: length of the model's response in tokens, the end token included; None where the file does not say.
        ended: whether the model ended its response by itself; None where the file does not say.
    """

    index: int
    instruction: str
    model: str
    baseline: str
    tokens: int | None
    ended: bool | None


Question = tuple[Comparison, Order]


Judge = Any
"""`await judge(comparison, order)` gives the probability that the response shown first is preferred, its source, and
the tokens used, or raises NoResponse. `orders(instruction)` says which orders to ask for. `about` is what decides the
verdicts, in JSON's types. `aclose()` ends it."""


class EndpointJudge(Endpoint):
    def __init__(self, model: str, base_url: str | None, order: str, seed: int, **options: Any) -> None:
        super().__init__(model, base_url, **options)
        self.order, self.seed = order, seed
        self.about = {"kind": "endpoint", "model": model, "base_url": self.url, "prompt": prompt_hash()}
        self.about |= {name: options[name] for name in ("max_tokens", "log_probs")}
        self.about |= {"order": order, "seed": seed if order == "random" else None}

    def orders(self, instruction: str) -> list[Order]:
        both: list[Order] = ["model_first", "baseline_first"]
        return both if self.order == "both" else [drawn_order(instruction, self.seed)]

    async def __call__(self, comparison: Comparison, order: Order) -> tuple[float, Source, Counter[str]]:
        shown = (comparison.model, comparison.baseline)[:: 1 if order == "model_first" else -1]
        (first, source), used = await self.ask(messages(comparison.instruction, *shown), read_choice)
        return first, source, used


def judge(
    responses: str,
    *,
    baseline: str,
    model: str,
    base_url: str | None = None,
    reward_model: bool = False,
    out: str | None = None,
    order: Literal["random", "both"] = "random",
    seed: int = 0,
    limit: PositiveInt | None = None,
    concurrency: PositiveInt = 8,
    attempts: PositiveInt = 5,
    timeout: PositiveFloat = 60.0,
    max_tokens: PositiveInt = 1,
    log_probs: bool = True,
) -> int:
    """Ask a judge which of two responses is better: a model's or a baseline's to the same instruction.

    Each verdict is on the disk as it comes. After a stop or a kill, the same command asks for what is missing, and
    again for what failed. The exit status is 1 if something failed. The key is read from OPENAI_API_KEY.

    Args:
        responses: the model's file in AlpacaEval's format: a JSON list of objects with instruction, output, generator.
        baseline: the baseline's file in the same format; it may hold more instructions.
        model: the judge's name at the endpoint; with reward_model a hub id or folder.
        base_url: of an OpenAI-compatible server, such as http://localhost:8000/v1; default OPENAI_BASE_URL, or OpenAI.
        reward_model: the judge is a sequence classifier with one label, run here: the preference is the sigmoid of the
            difference of its scores. Order, seed and the options of requests have no effect.
        out: the verdicts file; default is RESPONSES with the suffix .verdicts.sqlite.
        order: random shows either response first, by seed and instruction; both asks twice and takes the mean.
        seed: of the random order.
        limit: judge only the first so many responses; a later call without it judges the others.
        concurrency: requests at a time.
        attempts: requests for one verdict, at most; then it counts as failed.
        timeout: seconds for one request.
        max_tokens: that the judge may write. The verdict is in the first one, but some servers need more.
        log_probs: ask for log-probabilities of the first token; without them the verdict is the letter.

    Raises:
        InputError: a file is malformed, the verdicts file holds other verdicts, or the endpoint refuses everything.
    """
    ours, theirs = read_responses(responses), read_responses(baseline)
    comparisons = match(ours, theirs, baseline)
    print(f"{responses} has responses to {len(ours)} of the {len(theirs)} instructions of {baseline}")
    if reward_model:
        from mixdpo.evaluation.reward_judge import RewardJudge

        how, concurrency = RewardJudge(model), 1
    else:
        options = {"attempts": attempts, "timeout": timeout, "max_tokens": max_tokens, "log_probs": log_probs}
        how = EndpointJudge(model, base_url, order, seed, **options)
    header = {"model": ours[0]["generator"], "baseline": theirs[0]["generator"], "judge": how.about}
    path = Path(out) if out else Path(responses).with_suffix(".verdicts.sqlite")
    return _judge(how, comparisons, limit, header, path, concurrency)


def _judge(
    how: Judge, comparisons: Sequence[Comparison], limit: int | None, header: Row, path: Path, at_once: int
) -> int:
    """The header says what is judged, and how, but no limit, so that the limit can be raised later."""
    header = {**header, "outputs": content_hash(comparisons), "prompts": len(comparisons)}
    questions = [
        (comparison, order) for comparison in comparisons[:limit] for order in how.orders(comparison.instruction)
    ]
    with VerdictsWriter(path, header) as writer:
        missing = [question for question in questions if not _is_known(writer, question)]
        print(f"{path} has {len(questions) - len(missing)} of the {len(questions)} verdicts")
        with tqdm(total=len(questions), initial=len(questions) - len(missing), unit="verdict") as bar:
            stopped_by = asyncio.run(_interruptible(_ask_all(how, missing, writer, at_once, bar)))
        verdicts = [writer.verdicts[key] for key in map(_key, questions) if key in writer.verdicts]
    print("\n".join(report(verdicts, len(questions), how.about.get("order") == "both")))
    if stopped_by:
        print(f"stopped by {stopped_by[0].name}; {CONTINUES}")
        return 128 + stopped_by[0]
    print(f"python -m mixdpo score {path}")
    return int(any(verdict.failed is not None for verdict in verdicts))


def match(ours: Rows, theirs: Rows, source: str | Path) -> list[Comparison]:
    """Each row of the model with the baseline's row of the same instruction, in the model's order.

    The k-th row of an instruction belongs to the baseline's k-th. Other instructions of the baseline are left out.

    Args:
        source: the baseline's file, for the error.

    Raises:
        InputError: the baseline lacks an instruction.
    """
    waiting: defaultdict[str, deque[str]] = defaultdict(deque)
    for row in theirs:
        waiting[row["instruction"]].append(row["output"])
    comparisons, lacking = [], []
    for index, row in enumerate(ours):
        if texts := waiting[instruction := row["instruction"]]:
            more = row.get("tokens"), row.get("ended")
            comparisons.append(Comparison(index, instruction, row["output"], texts.popleft(), *more))
        else:
            lacking.append(f"row {index + 1}, {instruction[:200]!r}")
    if lacking:
        raise InputError(
            f"the baseline {source} lacks {len(lacking)} of the {len(ours)} instructions (first: {lacking[0]}): give "
            "the responses of both models to the same instructions"
        )
    return comparisons


def content_hash(comparisons: Sequence[Comparison]) -> str:
    """16 hex digits of the instructions and both responses to each, in their order."""
    texts = [[each.instruction, each.model, each.baseline] for each in comparisons]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def drawn_order(instruction: str, seed: int) -> Order:
    """By a hash of both, so that a prompt is shown alike whatever else is judged."""
    drawn = hashlib.sha256(f"{seed} {instruction}".encode()).digest()[0]
    return "baseline_first" if drawn % 2 else "model_first"


def _key(question: Question) -> tuple[int, Order]:
    return question[0].index, question[1]


def _is_known(writer: VerdictsWriter, question: Question) -> bool:
    known = writer.verdicts.get(_key(question))
    return known is not None and known.failed is None


async def _ask_all(how: Judge, missing: Sequence[Question], writer: VerdictsWriter, at_once: int, bar: Any) -> None:
    waiting, failed = iter(missing), 0  # one iterator for all workers: each question goes to one of them

    async def work() -> None:
        nonlocal failed
        for question in waiting:
            verdict = await _ask(how, *question)
            writer.keep(verdict)
            failed += verdict.failed is not None
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()

    try:
        async with aclosing(how), asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(missing))):
                group.create_task(work())
    except BaseExceptionGroup as error:
        raise error.exceptions[0] from None  # the others are its consequences, or say the same


async def _ask(how: Judge, comparison: Comparison, order: Order) -> Verdict:
    preference, source, failed = None, None, None
    try:
        first, source, used = await how(comparison, order)
        preference = first if order == "model_first" else 1 - first
    except NoResponse as error:
        failed, used = str(error), error.used
    return Verdict(
        index=comparison.index,
        order=order,
        preference=preference,
        source=source,
        failed=failed,
        judge_prompt_tokens=used.get("prompt_tokens"),
        judge_completion_tokens=used.get("completion_tokens"),
        len_model=len(comparison.model),
        len_baseline=len(comparison.baseline),
        tokens=comparison.tokens,
        ended=comparison.ended,
    )


async def _interruptible(work: Coroutine[Any, Any, None]) -> list[signal.Signals]:
    """Do the work until it is done or a SIGINT or SIGTERM comes; returns which came."""
    task, came = asyncio.ensure_future(work), list[signal.Signals]()

    def stop(number: signal.Signals) -> None:
        came.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    with suppress(asyncio.CancelledError):
        await task
    return came
