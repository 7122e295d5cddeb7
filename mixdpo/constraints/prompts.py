"""Seeded prompts for the constraint task: a short request and one to three constraints that fit together.

Held-out prompts share no subject with the training prompts. Their part `unseen` shares no kind of constraint either.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mixdpo.constraints.kinds import KINDS, TASK
from mixdpo.constraints.scoring import Constraint

REQUESTS, TRAINING_SUBJECTS, HELD_OUT_SUBJECTS = (
    TASK[name] for name in ("requests", "training_subjects", "held_out_subjects")
)


def training_prompts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` rows `prompt_id, prompt, constraints, part`, all different, from training subjects and kinds."""
    rng = random.Random(f"training {seed}")
    kinds = [name for name, kind in KINDS.items() if kind.trained]
    return _draw_prompts(rng, count, TRAINING_SUBJECTS, kinds, "train")


def held_out_prompts(seed: int = 0, *, seen: int = 150, unseen: int = 60) -> list[dict[str, Any]]:
    """Rows as in training, on other subjects: `seen` with trained kinds, `unseen` with the other kinds only."""
    rng, rows = random.Random(f"held out {seed}"), []
    for part, count in (("seen", seen), ("unseen", unseen)):
        kinds = [name for name, kind in KINDS.items() if kind.trained == (part == "seen")]
        rows += _draw_prompts(rng, count, HELD_OUT_SUBJECTS, kinds, part)
    return rows


def _draw_prompts(
    rng: random.Random, count: int, subjects: Sequence[str], kinds: Sequence[str], part: str
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}  # by prompt: a repeated prompt is drawn again
    while len(rows) < count:
        constraints = _draw_constraints(rng, kinds, rng.choice((1, 2, 2, 3, 3, 3)))
        request = rng.choice(REQUESTS).format(rng.choice(subjects))
        prompt = " ".join([request, *(_ask(rng, constraint) for constraint in constraints)])
        listed = [asdict(constraint) for constraint in constraints]
        name = f"{part}-{len(rows):05d}"
        rows.setdefault(prompt, {"prompt_id": name, "prompt": prompt, "constraints": listed, "part": part})
    return list(rows.values())


def _draw_constraints(rng: random.Random, kinds: Sequence[str], count: int) -> list[Constraint]:
    """Up to `count` constraints of different kinds, no two of which fix the same aspect of a response."""
    drawn: list[Constraint] = []
    fixed: set[str] = set()
    weights = [KINDS[name].weight for name in kinds]
    for name in rng.sample(list(kinds), sum(weights), counts=weights):
        if len(drawn) < count and not fixed & KINDS[name].aspects:
            fixed |= KINDS[name].aspects
            drawn.append(Constraint(name, {key: rng.choice(values) for key, values in KINDS[name].choices.items()}))
    return drawn


def _ask(rng: random.Random, constraint: Constraint) -> str:
    return rng.choice(constraint.rule.phrasings).format(**constraint.params)
