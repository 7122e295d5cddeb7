"""Data of the studies of noisy labels: the constraints pairs as a noisy judge would rank them, and prompts to answer.

    python benchmarks/noisy_labels.py && python -m mixdpo study configs/studies/noisy_labels.yaml
    python benchmarks/noisy_labels.py --study default_recipe
    python -m mixdpo study configs/studies/default_recipe.yaml

The judge gives 1 + 9 (gold score + σ ε), ε ~ N(0, 1), in half points of 1 to 10; what it prefers is `chosen`, the
margin is the difference of its scores, and ties are kept, labelled by a hash. Prints how often the label agrees
with the gold score by decile of the margin, on average over many seeds for each σ and for the file that is written.

The study `default_recipe` labels the same pairs with other noise. Its prompts are made of requests and subjects that no
earlier prompt has (default_recipe_words.json), and those that choose the learning rate have subjects of their own.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.constraints.kinds import TASK
from mixdpo.constraints.prompts import held_out_prompts
from mixdpo.storage.files import write_rows

DATA, WORDS = Path("mixdpo/constraints"), Path(__file__).with_name("default_recipe_words.json")
SIGMAS = (0.0, 0.25, 0.3, 0.35, 0.4, 0.5)
CHOSEN_SIGMA = 0.4
"""The largest of these whose top half agrees in more than .95; the lowest decile agrees in .56 (goal: about .55)."""
PAIRS, MANY = 240, 200
SEEDS = {"noisy_labels": range(20), "default_recipe": range(20, 40)}
"""Study -> seeds of the noise to pick from, see `picked`: 16 and 24."""
VALIDATION_PROMPTS, VALIDATION_SEED = 100, 1
FRESH = {"validation_subjects": (3, VALIDATION_PROMPTS, 0), "held_out_subjects": (2, 240, 60)}
"""Subjects -> seed, number of prompts of trained kinds, number of prompts of the other kinds."""


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


def picked(rows: list[dict[str, Any]], seeds: range) -> int:
    """The seed by this table alone, no outcome: a decile of 24 pairs varies by .1, so the one whose lowest decile is
    nearest to .55; of several, the one whose deciles are nearest to the mean over many seeds."""
    deciles = {seed: agreement(rank(rows, CHOSEN_SIGMA, seed))[0] for seed in range(MANY)}
    usual = np.mean(list(deciles.values()), 0)
    return min(seeds, key=lambda seed: (abs(deciles[seed][0] - 0.55), ((deciles[seed] - usual) ** 2).sum()))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The validation prompts among these rows: the first ones, as a part of their own."""
    named = [{**row, "prompt_id": f"validation-{i:05d}", "part": "validation"} for i, row in enumerate(rows)]
    return named[:VALIDATION_PROMPTS]


def first_prompts(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation prompts, of held-out subjects and trained kinds as the part `seen`, and the built-in held-out ones."""
    held_out = lines_of(DATA / "constraints_heldout.jsonl")
    taken = {row["prompt"] for row in (*pairs[:PAIRS], *held_out)}
    drawn = held_out_prompts(VALIDATION_SEED, seen=2 * VALIDATION_PROMPTS, unseen=0)
    return [*named([row for row in drawn if row["prompt"] not in taken]), *held_out]


def fresh_prompts(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation and held-out prompts of new requests and subjects.

    Raises:
        ValueError: a request, a subject or a prompt is one of an earlier file, or of both parts.
    """
    words, rows = json.loads(WORDS.read_text("utf-8")), []
    for subjects, (seed, seen, unseen) in FRESH.items():
        part = words | {"held_out_subjects": words[subjects]}
        drawn = held_out_prompts(seed, seen=seen, unseen=unseen, words=part)
        rows += named(drawn) if subjects == "validation_subjects" else drawn
    new = [*(row["prompt"] for row in rows), *(word for each in words.values() for word in each)]
    old = [*(row["prompt"] for row in (*pairs, *first_prompts(pairs))), *TASK["requests"]]
    old += [*TASK["training_subjects"], *TASK["held_out_subjects"]]
    if repeated := {text for text in new if new.count(text) > 1 or text in old}:
        raise ValueError(f"{WORDS} or {DATA}: used before, or twice: {sorted(repeated)}")
    return rows


def main(study: str) -> None:
    out, pairs = Path("data", study), lines_of(DATA / "constraints_pairs.jsonl")
    rows, prompts = pairs[:PAIRS], first_prompts(pairs) if study == "noisy_labels" else fresh_prompts(pairs)
    seed = picked(rows, SEEDS[study])
    print(f"agreement of the label with the gold score, {len(rows)} pairs, by decile of the margin; ties\n")
    print("| σ | " + " | ".join(map(str, range(1, 11))) + " | top half | all | ties |\n" + "|---" * 14 + "|")
    for name, sigma, many in [(f"{s:g}, mean of {MANY} seeds", s, range(MANY)) for s in SIGMAS] + [
        (f"{CHOSEN_SIGMA:g}, the file (seed {seed})", CHOSEN_SIGMA, [seed])
    ]:
        found = [agreement(rank(rows, sigma, each)) for each in (many if sigma else [seed])]
        deciles, ties = np.mean([d for d, _ in found], 0), np.mean([t for _, t in found])
        cells = [f"{value:.2f}" for value in (*deciles, deciles[5:].mean(), deciles.mean())]
        print(f"| {name} | {' | '.join(cells)} | {ties:.0f} |")
    for sigma in (0.0, CHOSEN_SIGMA):
        write_rows(out / f"pairs_sigma{sigma:g}.jsonl", rank(rows, sigma, seed))
    write_rows(out / "prompts.jsonl", prompts)
    print(f"\nwrote {out}: pairs, and {len(prompts)} prompts, the first {VALIDATION_PROMPTS} for validation")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a study's pairs and prompts to data/STUDY.")
    parser.add_argument("--study", choices=SEEDS, default="noisy_labels")
    main(parser.parse_args().study)
