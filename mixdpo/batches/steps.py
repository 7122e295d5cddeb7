"""Order -> optimizer steps -> micro-batches, and the stages that steps belong to."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Literal

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt

from mixdpo.errors import InputError

MicroBatch = tuple[tuple[int, ...], float, float]
"""Indices of rows in the encoded data, the weight of these rows (0 = filler), and `Batch.step_total`."""


def plan_steps(order: Sequence[int], batch_size: int) -> list[tuple[int, ...]]:
    """Consecutive pieces of the order, one per optimizer step; the last one may be shorter."""
    return [tuple(int(i) for i in order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def cut_step(step: Sequence[int], tokens: Sequence[int], *, accumulate: int, world: int, rank: int) -> list[MicroBatch]:
    """The `accumulate` micro-batches of one step that this rank computes.

    Pairs go, longest first, to the lightest of the step's `accumulate × world` micro-batches. Micro-batches of like
    size run at the same time on different ranks. An empty micro-batch gets the step's shortest pair with weight 0.
    Among pairs of equal length the place in the step decides: the order of the rows in the file must change nothing.

    Args:
        step: indices of the step's pairs.
        tokens: tokens of every pair in the data, by index.
    """
    # a heap, the lightest first, and of equal load the emptier one, so that the first pairs spread
    bins: list[tuple[int, int, int, list[int]]] = [(0, 0, number, []) for number in range(accumulate * world)]
    for index in sorted(step, key=lambda i: -tokens[i]):
        load, count, number, pairs = bins[0]
        heapreplace(bins, (load + tokens[index], count + 1, number, [*pairs, index]))
    filler = (min(step, key=lambda i: tokens[i]),)
    mine = sorted(bins, key=lambda each: (-each[0], each[2]))[rank::world]  # the heaviest first
    return [(tuple(each[3]), 1.0, len(step)) if each[3] else (filler, 0.0, len(step)) for each in mine]


def heaviest(steps: Sequence[Sequence[int]], tokens: Sequence[int], number: int) -> tuple[int, MicroBatch]:
    """Tokens and rows of the heaviest micro-batch of steps that are cut into `number` each, over all ranks."""
    first = (cut_step(step, tokens, accumulate=number, world=1, rank=0)[0] for step in steps)
    return max((sum(tokens[i] for i in each[0]), each) for each in first)


def micro_batches_needed(steps: Sequence[Sequence[int]], tokens: Sequence[int], *, most: int, world: int) -> int:
    """The least `accumulate` with which no micro-batch of any step has more than `most` tokens. No row may have more.

    A further micro-batch never makes the heaviest one heavier.
    """
    needed = max(-(-sum(tokens[i] for i in step) // (most * world)) for step in steps)
    while heaviest(steps, tokens, needed * world)[0] > most:
        needed += 1
    return needed


@dataclass(frozen=True)
class Slices:
    """How the samples are divided into stages: a slice is trained completely before the next one begins.

    Args:
        count: T + 1 equal slices; 1 is ordinary training.
        split: contiguous cuts the file in its own order, as in the paper; shuffled draws the slices by the seed.
        only: Numbers of the slices to train, from 0; null trains all, in order.
        passes: How often a slice is trained before the next slice begins.
        seed: Seed of the order of the samples within a slice and, if shuffled, of the slices.
    """

    count: PositiveInt = 1
    split: Literal["contiguous", "shuffled"] = "contiguous"
    only: list[int] | None = None
    passes: PositiveInt = 1
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.only is not None and (not self.only or self.only != sorted(set(self.only) & set(range(self.count)))):
            raise InputError(f"slices.only must name slices once, rising, from 0 to {self.count - 1}, not {self.only}")


@dataclass(frozen=True)
class Stage:
    """One slice of the data. `samples` (n,) int64; `steps`: the samples of each optimizer step, all passes."""

    slice: int
    samples: np.ndarray
    steps: list[tuple[int, ...]]


def plan_stages(samples: int, slices: Slices, *, batch_size: int) -> list[Stage]:
    """Which samples each stage trains, and in which steps.

    Raises:
        InputError: fewer samples than slices.
    """
    if samples < slices.count:
        raise InputError(f"{samples} samples cannot be divided into {slices.count} slices: lower data.slices.count")
    random = np.random.default_rng
    order = random([slices.seed, 0]).permutation(samples) if slices.split == "shuffled" else np.arange(samples)
    pieces, stages = np.array_split(order, slices.count), []
    for number in range(slices.count) if slices.only is None else slices.only:
        drawn = (random([slices.seed, 1 + number, turn]).permutation(pieces[number]) for turn in range(slices.passes))
        steps = [step for samples_of_pass in drawn for step in plan_steps(samples_of_pass, batch_size)]
        stages.append(Stage(number, np.sort(pieces[number]), steps))
    return stages
