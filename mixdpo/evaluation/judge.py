"""Pairwise judging: a model's responses against a baseline's, by a judge behind an endpoint or by a reward model."""

import asyncio
import hashlib
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
from mixdpo.storage.identity import content_hash


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
    def __init__(
        self, model: str, base_url: str | None, order: str, seed: int, max_tokens: int, log_probs: bool, **limits: Any
    ) -> None:
        request = {"logprobs": True, "top_logprobs": 20} if log_probs else {}
        super().__init__(model, base_url, max_tokens=max_tokens, **limits, **request)
        self.order, self.seed = order, seed
        self.about: dict[str, Any] = {"kind": "endpoint", "model": model, "base_url": self.url, "prompt": prompt_hash()}
        self.about |= {"max_tokens": max_tokens, "log_probs": log_probs}
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

        how: Judge = RewardJudge(model)
        concurrency = 1
    else:
        limits = {"attempts": attempts, "timeout": timeout}
        how = EndpointJudge(model, base_url, order, seed, max_tokens, log_probs, **limits)
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
        known = {key for key, verdict in writer.verdicts.items() if verdict.failed is None}
        missing = [question for question in questions if _key(question) not in known]
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


def drawn_order(instruction: str, seed: int) -> Order:
    """By a hash of both, so that a prompt is shown alike whatever else is judged."""
    drawn = hashlib.sha256(f"{seed} {instruction}".encode()).digest()[0]
    return "baseline_first" if drawn % 2 else "model_first"


def _key(question: Question) -> tuple[int, Order]:
    return question[0].index, question[1]


async def _ask_all(how: Judge, missing: Sequence[Question], writer: VerdictsWriter, at_once: int, bar: Any) -> None:
    waiting = iter(missing)  # one iterator for all workers: each question goes to one of them

    async def work() -> None:
        for question in waiting:
            writer.keep(await _ask(how, *question))
            failed = sum(verdict.failed is not None for verdict in writer.verdicts.values())
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()

    async with aclosing(how):
        await asyncio.gather(*(work() for _ in range(at_once)))


async def _ask(how: Judge, comparison: Comparison, order: Order) -> Verdict:
    preference, source, failed = None, None, None
    try:
        first, source, used = await how(comparison, order)
        preference = first if order == "model_first" else 1 - first
    except NoResponse as error:
        failed, used = str(error), error.used
    numbers: dict[str, Any] = {f"judge_{name}": used.get(name) for name in ("prompt_tokens", "completion_tokens")}
    numbers |= {"len_model": len(comparison.model), "len_baseline": len(comparison.baseline)}
    numbers |= {"tokens": comparison.tokens, "ended": comparison.ended}
    return Verdict(comparison.index, order, preference, source, failed, **numbers)


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
