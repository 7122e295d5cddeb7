"""Pairwise judging: a model's responses against a baseline's, by a judge behind an endpoint."""

import asyncio
import hashlib
import signal
from collections import defaultdict, deque
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, get_args

from jsonargparse.typing import PositiveFloat, PositiveInt
from tqdm import tqdm

from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import CONTINUES, Endpoint, NoResponse
from mixdpo.evaluation.formats import Row, read_responses
from mixdpo.evaluation.verdicts import PROMPT_HASH, Order, Verdict, VerdictsWriter, messages, read_choice
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


Questions = dict[tuple[int, Order], Comparison]
"""Index of the prompt and order -> what the judge compares."""


def judge(
    responses: str,
    *,
    baseline: str,
    model: str,
    base_url: str | None = None,
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

    Each verdict is written at once. After a stop or a kill, the same command asks for the missing verdicts, and again
    for the failed ones. The exit status is 1 if a verdict failed. The key is read from OPENAI_API_KEY.

    Args:
        responses: the model's file in AlpacaEval's format: a JSON list of objects with instruction, output, generator.
        baseline: the baseline's file in the same format; it may hold more instructions.
        model: the judge's name at the endpoint.
        base_url: of an OpenAI-compatible server, such as http://localhost:8000/v1; default OPENAI_BASE_URL, or OpenAI.
        out: the verdicts file; default is RESPONSES with the suffix .verdicts.sqlite.
        order: random shows either response first, by seed and instruction; both asks twice and takes the mean.
        seed: of the random order.
        limit: judge only the first so many responses; a later call without it judges the others.
        concurrency: requests at a time.
        attempts: requests for one verdict, at most, where the server is busy or cannot be reached.
        timeout: seconds for one request.
        max_tokens: tokens that the judge may write. The verdict is the first token, but some servers need more.
        log_probs: ask for log-probabilities of the first token; without these the letter alone is the verdict.

    Raises:
        InputError: a file is malformed, the verdicts file holds other verdicts, or the endpoint refuses everything.
    """
    ours, theirs = read_responses(responses), read_responses(baseline)
    comparisons = match(ours, theirs, baseline)
    print(f"{responses} has responses to {len(ours)} of the {len(theirs)} instructions of {baseline}")
    request = {"logprobs": True, "top_logprobs": 20} if log_probs else {}
    endpoint = Endpoint(model, base_url, attempts=attempts, timeout=timeout, max_tokens=max_tokens, **request)
    how = {"model": model, "base_url": endpoint.url, "prompt": PROMPT_HASH, "max_tokens": max_tokens}
    how |= {"log_probs": log_probs, "order": order, "seed": seed if order == "random" else None}
    header = {"model": ours[0]["generator"], "baseline": theirs[0]["generator"], "judge": how}
    header |= {"outputs": content_hash(comparisons), "prompts": len(comparisons)}
    path = Path(out) if out else Path(responses).with_suffix(".verdicts.sqlite")
    asked = ((c, each) for c in comparisons[:limit] for each in get_args(Order))
    questions = {(c.index, each): c for c, each in asked if order == "both" or each == drawn_order(c.instruction, seed)}
    return _judge(endpoint, questions, header, path, concurrency)


def _judge(endpoint: Endpoint, questions: Questions, header: Row, path: Path, at_once: int) -> int:
    """Ask for the missing verdicts. The header has no limit, so that a later call can raise the limit."""
    with VerdictsWriter(path, header) as writer:
        known = {key for key, verdict in writer.verdicts.items() if verdict.failed is None}
        missing = {key: comparison for key, comparison in questions.items() if key not in known}
        print(f"{path} has {len(questions) - len(missing)} of the {len(questions)} verdicts")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background, where a shell has it ignored
        try:
            asyncio.run(_ask_all(endpoint, missing, writer, at_once))
        except KeyboardInterrupt:
            print(f"stopped: {CONTINUES}")
            return 130
    failed = sorted(v.failed for key, v in writer.verdicts.items() if key in questions and v.failed is not None)
    print(f"judged {len(questions) - len(failed)} of {len(questions)}, failed {len(failed)}")
    for _, (first, *others) in groupby(failed, lambda reason: reason.partition(":")[0]):
        print(f"  failed: {1 + len(others)} x {first}")
    print(f"python -m mixdpo score {path}")
    return int(bool(failed))


def match(ours: list[Row], theirs: list[Row], source: str | Path) -> list[Comparison]:
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
    comparisons = []
    for index, row in enumerate(ours):
        if not (texts := waiting[instruction := row["instruction"]]):
            raise InputError(f"{source} lacks the instruction of row {index + 1}, {instruction[:200]!r}: add it")
        more = row.get("tokens"), row.get("ended")
        comparisons.append(Comparison(index, instruction, row["output"], texts.popleft(), *more))
    return comparisons


def drawn_order(instruction: str, seed: int) -> Order:
    """By a hash of both, so that the order does not depend on the other prompts."""
    drawn = hashlib.sha256(f"{seed} {instruction}".encode()).digest()[0]
    return "baseline_first" if drawn % 2 else "model_first"


async def _ask_all(endpoint: Endpoint, missing: Questions, writer: VerdictsWriter, at_once: int) -> None:
    waiting = iter(missing.items())  # one iterator for all workers: each question goes to one of them
    with tqdm(total=len(missing), unit="verdict") as bar:

        async def work() -> None:
            for (_, order), comparison in waiting:
                writer.keep(await _ask(endpoint, comparison, order))
                bar.update()

        async with endpoint.client:
            await asyncio.gather(*(work() for _ in range(at_once)))


async def _ask(endpoint: Endpoint, comparison: Comparison, order: Order) -> Verdict:
    preference, source, failed = None, None, None
    shown = (comparison.model, comparison.baseline)[:: 1 if order == "model_first" else -1]
    try:
        first, source = await endpoint.ask(messages(comparison.instruction, *shown), read_choice)
        preference = first if order == "model_first" else 1 - first
    except NoResponse as error:
        failed = str(error)
    lengths = len(comparison.model), len(comparison.baseline)
    return Verdict(comparison.index, order, preference, source, failed, *lengths, comparison.tokens, comparison.ended)
