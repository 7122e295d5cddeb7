"""Seeded prompts for the constraint task: a short request and one to three constraints that fit together.

Held-out prompts share no subject with the training prompts, and a part of them no kind of constraint either.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from mixdpo.constraints.kinds import KINDS
from mixdpo.constraints.scoring import Constraint

REQUESTS = (
    "Briefly describe {}.",
    "Write a line about {}.",
    "Tell me one thing about {}.",
    "Say something short about {}.",
    "Share a quick thought on {}.",
    "Give me one short tip about {}.",
    "Why do people like {}? Be brief.",
    "What comes to mind with {}?",
)

TRAINING_SUBJECTS = tuple(
    """a rainy morning; a busy market; the ocean; a campfire; an old bridge; autumn leaves; a sleepy cat; mountain air;
    fresh bread; a long train ride; a snowy street; a first job; strong coffee; board games; a quiet library; bicycles;
    a summer storm; gardening; street music; a lost key; the moon; house plants; a small village; night buses; soup;
    early mornings; handwritten letters; a good neighbour; old photographs; a crowded beach; chess; a broken umbrella;
    learning to swim; a wooden boat; birdsong; public parks; a family recipe; sunflowers; a foggy harbour; a new phone;
    homework; a birthday cake; hot chocolate; a desert at night; museums; a friendly dog; running shoes; a red door;
    a long queue; the first day of spring; volunteering; a mystery novel; wild berries; a lighthouse; playing guitar;
    a power cut; ice skating; a corner shop; comic books; a tired teacher; windmills; a picnic; an empty theatre; bees;
    a job interview; ripe mangoes; a hidden waterfall; spring cleaning; a hot air balloon; knitting; grandparents;
    a farmers' market; falling asleep; a noisy kitchen; paper maps; a football match; rainbows; a new language;
    a slow computer; a traffic jam; candles; a tree house; the night sky; a wedding; cooking for friends; a river walk;
    lemonade; a haircut; moving house; an airport; goldfish; a warm blanket; a school trip; painting; honey; a marathon;
    old radios; a flower shop; a surprise visit; the smell of rain""".replace("\n    ", " ").split("; ")
)

HELD_OUT_SUBJECTS = tuple(
    """a volcano; a fishing trip; green tea; a clock tower; penguins; a jazz concert; a cold shower; camping; a puzzle;
    a vegetable stew; a ferry crossing; snowmen; a dentist visit; astronomy; a yellow raincoat; a chess tournament;
    wild horses; a roof garden; online shopping; an elevator; pancakes; a marching band; a spelling mistake; a glacier;
    a lazy Sunday; robots; a pottery class; an orchard; winter coats; a flat tyre; fireworks; a bakery window; yoga;
    a science fair; cactus plants; a rowing race; a tiny apartment; a secret recipe; sailing at dawn; an owl""".replace(
        "\n    ", " "
    ).split("; ")
)


def training_prompts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` rows `prompt_id, prompt, constraints, part`, all different, from training subjects and kinds."""
    rng = random.Random(f"training {seed}")
    kinds = [name for name, kind in KINDS.items() if kind.trained]
    return _draw_prompts(rng, count, TRAINING_SUBJECTS, kinds, "train")


def held_out_prompts(seed: int = 0, *, seen: int = 150, unseen: int = 60) -> list[dict[str, Any]]:
    """Rows as in training, on other subjects: `seen` with trained kinds, `unseen` with the other kinds only."""
    rng = random.Random(f"held out {seed}")
    trained = [name for name, kind in KINDS.items() if kind.trained]
    other = [name for name, kind in KINDS.items() if not kind.trained]
    return _draw_prompts(rng, seen, HELD_OUT_SUBJECTS, trained, "seen") + _draw_prompts(
        rng, unseen, HELD_OUT_SUBJECTS, other, "unseen"
    )


def _draw_prompts(
    rng: random.Random, count: int, subjects: Sequence[str], kinds: Sequence[str], part: str
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}  # by prompt: a repeated one is drawn again
    while len(rows) < count:
        constraints = _draw_constraints(rng, kinds, rng.choice((1, 2, 2, 3, 3, 3)))
        request = rng.choice(REQUESTS).format(rng.choice(subjects))
        prompt = " ".join([request, *(_ask(rng, constraint) for constraint in constraints)])
        listed = [constraint.to_dict() for constraint in constraints]
        name = f"{part}-{len(rows):05d}"
        rows.setdefault(prompt, {"prompt_id": name, "prompt": prompt, "constraints": listed, "part": part})
    return list(rows.values())


def _draw_constraints(rng: random.Random, kinds: Sequence[str], count: int) -> list[Constraint]:
    """Up to `count` constraints of different kinds, no two of which fix the same aspect of an answer."""
    drawn: list[Constraint] = []
    fixed: set[str] = set()
    weights = [KINDS[name].weight for name in kinds]
    for name in rng.sample(list(kinds), sum(weights), counts=weights):
        if len(drawn) < count and not fixed & KINDS[name].aspects:
            fixed |= KINDS[name].aspects
            drawn.append(Constraint(name, _draw_params(rng, KINDS[name].choices)))
    return drawn


def _draw_params(rng: random.Random, choices: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: rng.choice(values) for name, values in choices.items()}


def _ask(rng: random.Random, constraint: Constraint) -> str:
    return rng.choice(constraint.rule.phrasings).format(**constraint.params)
