"""A data module that plants known-bad tokens into training responses, and how well token cleaning finds them.

    PYTHONPATH=benchmarks python run.py --config configs/token_cleaning/fixed.yaml --data noise.NoisySFTDataModule \
        --data.noise.rate 0.2
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.sft import SFTDataModule
from mixdpo.batches.token_pool import TokenPool, turns
from mixdpo.errors import InputError
from mixdpo.storage.identity import content_hash
from mixdpo.token_cleaning.run_tokens import RunTokens, read_cleaning

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer

Changes = dict[int, list[tuple[int, int]]]
"""Position -> what stands in its place: (token id, 1 where planted)."""

SHORTEST = 8  # response tokens: in fewer, one event would be most of the response
PHRASES = (
    "I hope that this is of some use to you!",
    "As always, please keep in mind that things may differ from case to case.",
    "That is a really good question, and I am glad that you asked it.",
    "Let me know whether there is anything else that I can do for you today.",
    "It should be said that this topic can be seen from many sides.",
    "In the end, it all depends on what matters most to you.",
)


@dataclass(frozen=True)
class PlantedNoise:
    """Noise whose place is known; each sample gets one kind, drawn by a hash of seed and sample.

    Args:
        rate: Share of a sample's response tokens that ends up planted, in (0, 0.5]; about, as events are whole.
        kinds: swap replaces single tokens by others of the data's responses, boilerplate inserts phrases, shuffle
            permutes spans.
        phrases: What boilerplate inserts.
        span: Tokens of a shuffled span, at least 2.
        seed: Seed of the noise. Another seed plants other noise.
    """

    rate: float = 0.2
    kinds: tuple[str, ...] | list[str] = ("swap", "boilerplate", "shuffle")
    phrases: tuple[str, ...] | list[str] = PHRASES
    span: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 0.5:
            raise InputError(
                f"noise.rate must lie in (0, 0.5], not {self.rate}. For no noise: --data datamodules.sft.SFTDataModule"
            )
        if not self.kinds or not set(self.kinds) <= KINDS.keys():
            raise InputError(f"noise.kinds must be some of {', '.join(KINDS)}, not {list(self.kinds)}")
        if self.span < 2:
            raise InputError(f"noise.span must be at least 2, not {self.span}: one token cannot be permuted")
        if "boilerplate" in self.kinds and (not self.phrases or isinstance(self.phrases, str)):
            raise InputError(f"noise.phrases must be a list of texts, not {self.phrases!r}: boilerplate inserts them")


@dataclass(frozen=True)
class _Material:
    """What events need to know of the data: the pool's response tokens, with cumulative counts, none of them special;
    the special tokens; the encoded phrases."""

    ids: list[int]
    cumulative: list[int]
    special: frozenset[int]
    phrases: list[list[int]]


def plant(samples: "Dataset", noise: PlantedNoise, tokenizer: "Tokenizer") -> "Dataset":
    """Put noise into the responses; prompts, special tokens and the last token of each turn stay as they are.

    A sample of 8 or more response tokens gets at least one event (unless its kind has no place in it), a shorter one
    none. A sample's noise depends on its `sample_id`, not on its row; a swapped-in token also on the data as a whole.
    Boilerplate makes a sample longer, by up to about rate / (1 − rate) of its response: also beyond the length that
    it was truncated to.

    Args:
        samples: columns sample_id, input_ids and spans [start, end, …) of the assistant turns; others are kept.

    Returns:
        The same columns with new input_ids and spans, and `planted`: for each token of the spans, in order, 0 or 1.

    Raises:
        InputError: a phrase has no tokens, or the responses have too few different tokens to swap.
    """
    from datasets import Features, Value

    material = _material(samples, noise, tokenizer)
    parts = [samples._fingerprint, asdict(noise), sorted(material.special), material.phrases]
    key = json.dumps([*parts, Path(__file__).read_text("utf-8")])
    return samples.map(
        partial(_plant_row, noise=noise, material=material),
        features=Features({**samples.features, "planted": [Value("int8")]}),
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        desc="Planting noise",
    )


def _material(samples: "Dataset", noise: PlantedNoise, tokenizer: "Tokenizer") -> _Material:
    added = tokenizer.added_tokens_decoder.items()
    special = frozenset([*tokenizer.all_special_ids, *(number for number, token in added if token.special)])
    texts = noise.phrases if "boilerplate" in noise.kinds else ()
    phrases = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in texts]
    if not all(phrases):
        raise InputError(f"noise.phrases: {texts[phrases.index([])]!r} has no tokens: leave it out")
    counts: Counter[int] = Counter()
    for row in samples.select_columns(["input_ids", "spans"]):
        for start, end in turns(row["spans"]):
            counts.update(row["input_ids"][start:end])
    ids = sorted(counts.keys() - special)
    if "swap" in noise.kinds and len(ids) < 2:
        raise InputError("noise.kinds: swap needs at least two different tokens in the responses; leave it out")
    return _Material(ids, list(accumulate(counts[token] for token in ids)), special, phrases)


def kind_of(sample_id: int, noise: PlantedNoise) -> tuple[str, random.Random]:
    """The kind of noise that a sample gets, if it gets any, and what its events are drawn by."""
    draw = random.Random(f"{noise.seed}:{sample_id}")
    return draw.choice(noise.kinds), draw


def _plant_row(row: dict[str, Any], noise: PlantedNoise, material: _Material) -> dict[str, Any]:
    ids, before = row["input_ids"], turns(row["spans"])
    bodies = [[p for p in range(start, end - 1) if ids[p] not in material.special] for start, end in before]
    tokens = sum(end - start for start, end in before)
    changes: Changes = {}
    if tokens >= SHORTEST and any(bodies):
        kind, draw = kind_of(row["sample_id"], noise)
        changes = KINDS[kind](_Place(ids, bodies, noise.rate * tokens), noise, material, draw)
    pieces = [changes.get(position, [(token, 0)]) for position, token in enumerate(ids)]
    moved = [0, *accumulate(map(len, pieces))]
    marked, spans = list(chain.from_iterable(pieces)), [moved[boundary] for boundary in row["spans"]]
    planted = [mark for start, end in turns(spans) for _, mark in marked[start:end]]
    return {"input_ids": [token for token, _ in marked], "spans": spans, "planted": planted}


# Kinds.


@dataclass(frozen=True)
class _Place:
    """Ids of a sample, the positions of each turn that may be touched, how many tokens to plant."""

    ids: list[int]
    bodies: list[list[int]]
    target: float


def _swap(place: _Place, noise: PlantedNoise, material: _Material, draw: random.Random) -> Changes:
    positions = list(chain.from_iterable(place.bodies))
    changes = {}
    for position in draw.sample(positions, min(len(positions), max(1, round(place.target)))):
        token = place.ids[position]
        while token == place.ids[position]:
            (token,) = draw.choices(material.ids, cum_weights=material.cumulative)
        changes[position] = [(token, 1)]
    return changes


def _boilerplate(place: _Place, noise: PlantedNoise, material: _Material, draw: random.Random) -> Changes:
    positions = list(chain.from_iterable(place.bodies))
    target = place.target / (1 - noise.rate)  # what is inserted counts too
    changes: Changes = {}
    inserted = 0
    while True:
        phrase, position = draw.choice(material.phrases), draw.choice(positions)
        if inserted and inserted + len(phrase) / 2 > target:
            return changes
        changes[position] = [(token, 1) for token in phrase] + changes.get(position, [(place.ids[position], 0)])
        inserted += len(phrase)


def _shuffle(place: _Place, noise: PlantedNoise, material: _Material, draw: random.Random) -> Changes:
    windows = [window for body in place.bodies for window in _windows(body, noise.span, draw)]
    changes: Changes = {}
    for window in draw.sample(windows, len(windows)):
        before = [place.ids[position] for position in window]
        after = list(before)
        if len(set(before)) == 1:
            continue
        if changes and len(changes) + len(window) / 2 > place.target:
            return changes
        while after == before:
            draw.shuffle(after)
        changes |= {p: [(new, 1)] for p, old, new in zip(window, before, after, strict=True) if new != old}
    return changes


def _windows(body: list[int], span: int, draw: random.Random) -> list[list[int]]:
    """Disjoint spans of a turn, as many as fit, from a random start; a shorter turn is one."""
    span = min(span, len(body))
    if span < 2:
        return []
    first = draw.randint(0, len(body) % span)
    return [body[start : start + span] for start in range(first, len(body) - span + 1, span)]


KINDS = {"swap": _swap, "boilerplate": _boilerplate, "shuffle": _shuffle}


class NoisySFTDataModule(SFTDataModule):
    def __init__(self, source: str, noise: PlantedNoise = PlantedNoise(), **options: Any) -> None:
        """`SFTDataModule` with noise in the training responses; the held-out ones have none.

        Args:
            source: As for SFTDataModule.
            noise: How much, of which kinds, and the seed.
        """
        super().__init__(source, **options)
        self.noise = noise

    def _pool_of(self, samples: Any, name: str) -> TokenPool:
        pool = super()._pool_of(samples, name)
        if name != "train":
            return pool
        said = f"rate {self.noise.rate}, seed {self.noise.seed}, {content_hash([self.noise])}"
        noisy = TokenPool.of(plant(pool.samples, self.noise, self.encoder), {**pool.identity, "noise": said})
        self.counts[name]["response tokens"] = len(noisy)
        return noisy


# Whether cleaning finds it.


def planted_tokens(pool: TokenPool) -> np.ndarray:
    """(M,) bool, which of the pool's tokens are planted."""
    return np.concatenate([np.asarray(marks, dtype=bool) for marks in pool.samples["planted"]])


def stages_with_noise(run: Path) -> list[dict[str, Any]]:
    """Summaries of the stages of a run that were cleaned, each with `planted` (see `detection`)."""
    cleaning = read_cleaning(str(run))
    return [
        stage.summary | {"planted": detection(*labelled(cleaning, stage.samples))} for stage in cleaning.scored_stages()
    ]


def labelled(cleaning: RunTokens, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, scores and marks of the tokens of these samples that training has reached."""
    tokens = cleaning.pool.tokens(samples)
    tokens = tokens[~np.isnan(cleaning.weights[tokens])]
    return cleaning.weights[tokens], cleaning.scores[tokens], planted_tokens(cleaning.pool)[tokens]


def detection(weights: np.ndarray, scores: np.ndarray, planted: np.ndarray) -> dict[str, float | None]:
    """Cutting as a detector of planted tokens: `share` of them before and weighted share after (`kept_noise_rate`),
    precision and recall, and the threshold-free `auc`. A share of nothing is None."""
    weights, planted = weights.astype(np.float64), planted.astype(bool)
    cut, is_scored = np.count_nonzero(planted & (weights == 0)), ~np.isnan(scores)
    return {
        "share": _ratio(np.count_nonzero(planted), len(planted)),
        "auc": _auc(scores[is_scored & ~planted], scores[is_scored & planted]),
        "precision": _ratio(cut, np.count_nonzero(weights == 0)),
        "recall": _ratio(cut, np.count_nonzero(planted)),
        "kept_noise_rate": _ratio(weights[planted].sum(), weights.sum()),
    }


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _auc(clean: np.ndarray, noise: np.ndarray) -> float | None:
    """Probability that a clean token's score is above a planted one's, ties ½; exact."""
    noise = np.sort(noise)
    wins = np.searchsorted(noise, clean, "left").sum() + np.searchsorted(noise, clean, "right").sum()
    return _ratio(wins, 2 * len(clean) * len(noise))
