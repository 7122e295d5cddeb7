"""Seeded prompts for the constraint task: a short request and one to three constraints that fit together.

Held-out prompts share no subject with the training prompts. Their part `unseen` shares no kind of constraint either.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mixdpo.constraints.kinds import KINDS, TASK
from mixdpo.constraints.scoring import Constraint


def training_prompts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` rows `prompt_id, prompt, constraints, part`, all different, from training subjects and kinds."""
    return _draw_prompts(random.Random(f"training {seed}"), count, "train", TASK)


def held_out_prompts(seed: int = 0, *, seen: int = 150, unseen: int = 60, words: dict = TASK) -> list[dict[str, Any]]:
    """Rows as in training, on other subjects: `seen` with trained kinds, `unseen` with the other kinds only.

    Args:
        words: `requests` and `held_out_subjects` that the prompts are made of; the built-in ones by default.
    """
    rng = random.Random(f"held out {seed}")
    return _draw_prompts(rng, seen, "seen", words) + _draw_prompts(rng, unseen, "unseen", words)


def _draw_prompts(rng: random.Random, count: int, part: str, words: dict) -> list[dict[str, Any]]:
    subjects = words["training_subjects" if part == "train" else "held_out_subjects"]
    kinds = [name for name, kind in KINDS.items() if kind.trained == (part != "unseen")]
    rows: dict[str, dict[str, Any]] = {}  # by prompt: a repeated prompt is drawn again
    while len(rows) < count:
        constraints = _draw_constraints(rng, kinds, rng.choice((1, 2, 2, 3, 3, 3)))
        request = rng.choice(words["requests"]).format(rng.choice(subjects))
        asked = [rng.choice(KINDS[each.kind].phrasings).format(**each.params) for each in constraints]
        prompt = " ".join([request, *asked])
        row = {"prompt_id": f"{part}-{len(rows):05d}", "prompt": prompt, "constraints": [*map(asdict, constraints)]}
        rows.setdefault(prompt, row | {"part": part})
    return list(rows.values())


def _draw_constraints(rng: random.Random, kinds: Sequence[str], count: int) -> list[Constraint]:
    """Up to `count` constraints of different kinds, no two of which fix the same aspect of a response."""
    drawn: list[Constraint] = []
    fixed: set[str] = set()
    weights = [KINDS[name].weight for name in kinds]
    for name in rng.sample(list(kinds), sum(weights), counts=weights):
        if len(drawn) < count and fixed.isdisjoint(KINDS[name].aspects):
            fixed.update(KINDS[name].aspects)
            drawn.append(Constraint(name, {key: rng.choice(values) for key, values in KINDS[name].choices.items()}))
    return drawn
