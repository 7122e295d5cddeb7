"""Verdicts: the question to a judge, the reading of the judge's response, and the file that keeps each verdict.

A judge is shown two responses, labelled X and Y in the order shown. The head of a verdicts file names the judged model,
the baseline and the judge's options. `mixdpo score` needs no other file.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixdpo.errors import InputError
from mixdpo.storage.store import Key, Store, read_store

Order = Literal["model_first", "baseline_first"]
Source = Literal["log_probs", "text"]
NOUN = "verdicts"

LEAST_MASS = 0.01
"""Least probability of both labels together. Below this, the judge began with other text, such as a refusal."""


LABELS = ("X", "Y")
"""Of the response shown first and second. Letters that are no words (A is one), so that a token is one or is not."""


_SYSTEM = "You compare two responses to the same instruction and say which one is better."


_USER = Path(__file__).with_name("judge_prompt.txt").read_text("utf-8").removesuffix("\n")


PROMPT_HASH = hashlib.sha256((_SYSTEM + _USER).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one prompt in one order.

    Attributes:
        index: position of the prompt in the file of the model's responses, from 0.
        order: whose response the judge was shown first.
        preference: probability that the MODEL's response is preferred over the baseline's, in [0, 1], whatever the
            order; None where the judge gave no verdict.
        source: what the preference was read from; None without a preference.
        failed: why there is no preference; None where there is one.
        len_model, len_baseline: characters of the two responses.
        tokens: length of the model's response in tokens; None where the file does not say.
        ended: whether the model ended its response by itself; None where the file does not say.
    """

    index: int
    order: Order
    preference: float | None
    source: Source | None
    failed: str | None
    len_model: int
    len_baseline: int
    tokens: int | None
    ended: bool | None

    @property
    def key(self) -> tuple[int, Order]:
        return self.index, self.order


class VerdictsWriter(Store):
    def __init__(self, path: str | Path, head: Mapping[str, Any]) -> None:
        """Continues a file, or makes the file. `verdicts` holds the verdicts so far; a failed verdict may be replaced.

        Raises:
            InputError: the file holds other verdicts or something else, or another process is writing to the file.
        """
        remedy = "use the same inputs and options to continue it, or give another --out"
        super().__init__(path, head, noun=NOUN, remedy=remedy)
        self.verdicts = {each.key: each for each in _read(self.get())}

    def keep(self, *verdicts: Verdict) -> None:
        self.add({f"{each.index} {each.order}": json.dumps(vars(each)).encode() for each in verdicts})
        self.verdicts |= {each.key: each for each in verdicts}


def _read(entries: Mapping[Key, bytes]) -> list[Verdict]:
    return [Verdict(**json.loads(value)) for value in entries.values()]


def read_verdicts(path: str | Path) -> tuple[dict[str, Any], list[Verdict]]:
    """The head of a file, and its verdicts sorted by (index, order), failed ones included.

    Raises:
        InputError: there is no such file, or the file is not from `mixdpo judge`, is damaged, or is being written.
    """
    if not Path(path).is_file():
        raise InputError(f"no verdicts file {path}; `mixdpo judge` makes it")
    head, entries = read_store(path, NOUN, "restore it from a copy, or judge anew into another --out")
    return head, sorted(_read(entries), key=lambda verdict: verdict.key)


def messages(instruction: str, first: str, second: str) -> list[dict[str, str]]:
    """The chat that a judge is sent."""
    user = _USER.format(instruction=instruction, first=first, second=second)
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": user}]


def read_choice(body: Any) -> tuple[float, Source]:
    """Probability that the judge prefers the response shown first, from the body of a chat completion.

    P(X) / (P(X) + P(Y)) by the log-probabilities of the first token; where there are none, 1 or 0 by the text.

    Raises:
        ValueError: the judge refused, or named neither response.
        LookupError, TypeError, AttributeError, ArithmeticError: the body is no chat completion.
    """
    choice = body["choices"][0]
    text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
    if refusal or choice.get("finish_reason") == "content_filter":
        raise ValueError(f"refused: {str(refusal or 'content filter')[:200]!r}")
    if tokens := (choice.get("logprobs") or {}).get("content"):
        # the likeliest tokens at the first place that is more than white space
        place = next((token for token in tokens if token["token"].strip()), tokens[0])
        listed = [place, *(place.get("top_logprobs") or [])]
        return first_by_log_probs({each["token"]: 0.0 + each["logprob"] for each in listed}), "log_probs"
    if text is None:
        raise ValueError(f"no text: the judge ended with {choice.get('finish_reason')!r}; try a larger max_tokens")
    if (label := str(text).strip()) not in LABELS:
        raise ValueError(f"no label: {str(text)[:80]!r}")
    return float(label == LABELS[0]), "text"


def first_by_log_probs(alternatives: Mapping[str, float]) -> float:
    """P(X) / (P(X) + P(Y)); the tokens of a label differ in case and in the space before it. A label that is not among
    the alternatives has the probability 0.

    Args:
        alternatives: token -> log-probability.

    Raises:
        ValueError: both labels together have a probability below LEAST_MASS.
    """
    sums = dict.fromkeys(LABELS, 0.0)
    for token, log_prob in alternatives.items():
        if (label := token.strip(" \n\t▁Ġ").upper()) in sums:  # two signs that some servers write for the space
            sums[label] += math.exp(log_prob)
    total = sum(sums.values())
    if not LEAST_MASS <= total < math.inf:
        raise ValueError(f"no label among the likeliest tokens: {', '.join(map(repr, list(alternatives)[:5]))}")
    return sums[LABELS[0]] / total
