"""Data of the study of noisy labels: the constraints pairs as a noisy judge would rank them, and prompts to answer.

    python benchmarks/noisy_labels.py && python -m mixdpo study configs/studies/noisy_labels.yaml

The judge gives 1 + 9 (gold score + σ ε), ε ~ N(0, 1), in half points of 1 to 10; what it prefers is `chosen`, the
margin is the difference of its scores, and ties are kept, labelled by a hash. Prints how often the label agrees
with the gold score by decile of the margin, on average over many seeds for each σ and for the file that is written.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.constraints.prompts import held_out_prompts
from mixdpo.storage.files import write_rows

OUT, DATA = Path("data/noisy_labels"), Path("mixdpo/constraints")
SIGMAS = (0.0, 0.25, 0.3, 0.35, 0.4, 0.5)
CHOSEN_SIGMA = 0.4
"""The largest of these whose top half agrees in more than .95; the lowest decile agrees in .56 (goal: about .55)."""
PAIRS, MANY = 240, 200
SEED = 16
"""Picked among 0 to 19 by this table alone: a decile of 24 pairs varies by .1, and here the lowest agrees in .54."""
VALIDATION_PROMPTS, VALIDATION_SEED = 100, 1


def judged(gold: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """The judge's scores (N, 2) of responses with gold scores (N, 2)."""
    noise = np.random.default_rng(seed).standard_normal(gold.shape)
    return np.clip(np.round(2 * (1 + 9 * (gold + sigma * noise))) / 2, 1, 10)


def coins(rows: list[dict[str, Any]], seed: int) -> np.ndarray:
    """(N,) bool by a hash of prompt and seed: whether a tied pair is swapped."""
    digests = (hashlib.sha256(f"{row['prompt']}:{seed}".encode()).digest() for row in rows)
    return np.array([digest[0] % 2 == 1 for digest in digests])


def rank(rows: list[dict[str, Any]], sigma: float, seed: int) -> list[dict[str, Any]]:
    """The pairs as the judge ranks them; the gold scores are kept as `gold_chosen` and `gold_rejected`."""
    gold = np.array([[row["score_chosen"], row["score_rejected"]] for row in rows])
    scores = judged(gold, sigma, seed) if sigma else gold
    margins = scores[:, 0] - scores[:, 1]
    ranked = []
    for row, gold_pair, pair, swap in zip(
        rows, gold, scores, (margins < 0) | (margins == 0) & coins(rows, seed), strict=True
    ):
        sides = ("rejected", "chosen") if swap else ("chosen", "rejected")
        found = {"pair_id": row["pair_id"], "prompt": row["prompt"], "constraints": row["constraints"]}
        for to, side in zip(("chosen", "rejected"), sides, strict=True):
            column = ("chosen", "rejected").index(side)
            found |= {to: row[side], f"score_{to}": float(pair[column]), f"gold_{to}": float(gold_pair[column])}
        ranked.append(found | {"margin": found["score_chosen"] - found["score_rejected"]})
    return ranked


def agreement(ranked: list[dict[str, Any]]) -> tuple[np.ndarray, int]:
    """(10,) share of labels that the gold score agrees with, by decile of the margin; and the number of ties."""
    margins = np.array([row["margin"] for row in ranked])
    right = np.array([row["gold_chosen"] > row["gold_rejected"] for row in ranked], dtype=float)
    # ties at a decile's border are shared out by chance, not by whether their label is right
    order = np.lexsort((np.random.default_rng(0).random(len(margins)), margins))
    return np.array([part.mean() for part in np.array_split(right[order], 10)]), int((margins == 0).sum())


def main() -> None:
    rows = [json.loads(line) for line in (DATA / "constraints_pairs.jsonl").read_text("utf-8").splitlines()][:PAIRS]
    print(f"agreement of the label with the gold score, {len(rows)} pairs, by decile of the margin; ties\n")
    print("| σ | " + " | ".join(map(str, range(1, 11))) + " | top half | all | ties |\n" + "|---" * 14 + "|")
    for name, sigma, seeds in [(f"{s:g}, mean of {MANY} seeds", s, range(MANY)) for s in SIGMAS] + [
        (f"{CHOSEN_SIGMA:g}, the file", CHOSEN_SIGMA, [SEED])
    ]:
        found = [agreement(rank(rows, sigma, seed)) for seed in (seeds if sigma else [SEED])]
        deciles, ties = np.mean([d for d, _ in found], 0), np.mean([t for _, t in found])
        cells = [f"{value:.2f}" for value in (*deciles, deciles[5:].mean(), deciles.mean())]
        print(f"| {name} | {' | '.join(cells)} | {ties:.0f} |")
    for sigma in (0.0, CHOSEN_SIGMA):
        write_rows(OUT / f"pairs_sigma{sigma:g}.jsonl", rank(rows, sigma, SEED))
    held_out = [json.loads(line) for line in (DATA / "constraints_heldout.jsonl").read_text("utf-8").splitlines()]
    taken = {row["prompt"] for row in (*rows, *held_out)}
    # held-out subjects and trained kinds, as the part `seen`, drawn by another seed
    fresh = [
        row
        for row in held_out_prompts(VALIDATION_SEED, seen=2 * VALIDATION_PROMPTS, unseen=0)
        if row["prompt"] not in taken
    ]
    validation = [{**row, "prompt_id": f"validation-{i:05d}", "part": "validation"} for i, row in enumerate(fresh)]
    write_rows(OUT / "prompts.jsonl", [*validation[:VALIDATION_PROMPTS], *held_out])
    print(f"\nwrote {OUT}: pairs, and {VALIDATION_PROMPTS} validation prompts before the {len(held_out)} held-out ones")


if __name__ == "__main__":
    main()
