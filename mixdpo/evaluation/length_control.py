"""The win rate if both outputs were equally long: AlpacaEval's length-controlled win rate (Dubois et al. 2024)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linprog, minimize
from scipy.special import expit

from mixdpo.errors import InputError
from mixdpo.evaluation.win_rate import Estimate, bootstrap, checked, need_several

GAMED_WEIGHT = 0.2 / 2  # AlpacaEval's regularize_to_baseline_lambda, shared by its two gamed baselines


_GRADIENT = 1e-7  # largest norm of the mean loss' gradient at a solution: 1e-5 points; below, the loss is rounding


_PULL = 1e-6  # of a resample's fit towards that of all prompts, which decides what a resample leaves open: 1e-4 points


_SEPARATED = 1e-6  # mean of sides · d that is no rounding of the solver


@dataclass(frozen=True)
class GamedBaselines:
    """Comparisons of the baseline with itself, told to be verbose or concise: they hold the length effect in place.

    Attributes:
        preferences: (M,) in [0, 1].
        std_delta_len: (M,) Δ / std(Δ).
        difficulty: (M,) of the instruction.
        not_gamed: (M,) 0, or 1 for a row that counts as one of the model's.
    """

    preferences: np.ndarray
    std_delta_len: np.ndarray
    difficulty: np.ndarray
    not_gamed: np.ndarray


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate and the fit that it comes from.

    Attributes:
        win_rate: in percent.
        length: a, the weight of tanh(Δ / std(Δ)).
        difficulty: b, the weight of the instruction's difficulty; None where the term was left out.
        bias: c, the model's logit over the baseline at equal length and difficulty 0.
    """

    win_rate: float
    length: float
    difficulty: float | None
    bias: float


def label(difficulty: bool, gamed: bool) -> str:
    """What to call a length-controlled win rate: only the one with both is AlpacaEval's."""
    lacking = ["instruction difficulty"] * (not difficulty) + ["gamed baselines"] * (not gamed)
    return "length-controlled win rate" + " without " * bool(lacking) + " and ".join(lacking)


def resampled_length_controlled(
    preferences: ArrayLike,
    len_model: ArrayLike,
    len_baseline: ArrayLike,
    difficulty: ArrayLike | None = None,
    gamed: GamedBaselines | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[LengthControlled, Estimate]:
    """The win rate if both outputs were equally long (Dubois et al. 2024, AlpacaEval's `length_controlled_v1`), with a
    bootstrap over the prompts: std(Δ) and the fit are those of the resample.

    logit p = a · tanh(Δ / std(Δ)) + b · difficulty + c · [not gamed] with Δ = len_baseline - len_model, fitted by
    maximum likelihood to soft labels, gamed rows weighing 0.1; the result is 100 · mean σ(b · difficulty + c).
    AlpacaEval fits the same with an L1 penalty whose strength it cross-validates: 0.2 points away on average.

    In a resample a prompt keeps its preference, lengths and difficulty, and the gamed rows are the same. One with wins
    or losses alone counts as nearly 100 or 0. AlpacaEval's `lc_standard_error` is another thing: how much the predicted
    preferences differ between instructions.

    Args:
        preferences: (N,) of the model.
        len_model: (N,) characters of its outputs.
        len_baseline: (N,) characters of the baseline's.
        difficulty: (N,) of the instructions; without it the term is left out.
        gamed: rows that hold a and b in place; without them the fit has the N prompts alone.

    Raises:
        InputError: there is no unique finite solution (one prompt, length differences that are all equal, preferences
            that the terms separate), an input is malformed, or there are fewer than two samples.
    """
    values = checked(preferences)
    columns = [len_model, len_baseline] + ([] if difficulty is None else [difficulty])
    ours, theirs, *terms = (np.asarray(column, dtype=np.float64) for column in columns)
    if any(column.shape != values.shape or not np.isfinite(column).all() for column in (ours, theirs, *terms)):
        raise InputError(f"lengths and difficulties should be {len(values)} finite numbers, one for each preference")
    difficulties = np.stack(terms, 1) if terms else np.empty((len(values), 0))
    comparisons = _Comparisons(values, theirs - ours, difficulties, gamed)
    fit = comparisons.fit()
    start = np.array([value for value in (fit.length, fit.difficulty, fit.bias) if value is not None])
    drawn = bootstrap(lambda rows: comparisons.at(rows).solve(start, _PULL)[1], len(comparisons.delta), samples, seed)
    return fit, Estimate(fit.win_rate, drawn)


@dataclass(frozen=True)
class _Comparisons:
    """N prompts; `difficulty` has no columns, (N, 0), where the term is left out."""

    preferences: np.ndarray
    delta: np.ndarray
    difficulty: np.ndarray
    gamed: GamedBaselines | None

    def at(self, rows: np.ndarray) -> "_Comparisons":
        return _Comparisons(self.preferences[rows], self.delta[rows], self.difficulty[rows], self.gamed)

    def fit(self) -> LengthControlled:
        need_several(len(self.delta))
        if not self.delta.std():
            raise InputError(
                "the outputs of model and baseline differ by the same number of characters on every prompt, so that "
                "length cannot be controlled for: report the win rate alone, or judge more prompts"
            )
        features, labels, _ = self.design()
        _refuse_unsolvable(features, labels)
        (length, *difficulty, bias), rate = self.solve(np.zeros(features.shape[1]))
        return LengthControlled(rate, length, difficulty[0] if difficulty else None, bias)

    def design(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features (N + M, 2 or 3), labels and weights (N + M,)."""
        spread = self.delta.std(ddof=1)
        length = np.tanh(self.delta / spread) if spread else np.zeros(len(self.delta))  # 0: of some resample
        ones = np.ones(len(self.delta))
        features = np.column_stack([length, self.difficulty, ones])
        if (gamed := self.gamed) is None:
            return features, self.preferences, ones
        difficulty = gamed.difficulty[:, None][:, : self.difficulty.shape[1]]
        more = np.column_stack([np.tanh(gamed.std_delta_len), difficulty, gamed.not_gamed])
        weights = np.where(gamed.not_gamed, 1.0, GAMED_WEIGHT)
        parts = (features, more), (self.preferences, gamed.preferences), (ones, weights)
        return tuple(map(np.concatenate, parts))  # type: ignore[return-value]

    def solve(self, start: np.ndarray, pull: float = 0.0) -> tuple[list[float], float]:
        """The weights of the features, and the win rate that they give at Δ = 0."""
        weights = _logistic_regression(*self.design(), start, pull)
        return weights.tolist(), float(100 * expit(self.difficulty @ weights[1:-1] + weights[-1]).mean())


def _logistic_regression(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray, start: np.ndarray, pull: float
) -> np.ndarray:
    """Maximum likelihood for soft labels, or with a ridge towards `start`, by Newton steps in a trust region."""
    weights = weights / weights.sum()

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits, away = features @ x, x - start
        value = weights @ (np.logaddexp(0, logits) - labels * logits) + pull / 2 * away @ away
        return value, (weights * (expit(logits) - labels)) @ features + pull * away

    def hessian(x: np.ndarray) -> np.ndarray:
        logits = features @ x
        return (features.T * (weights * expit(logits) * expit(-logits))) @ features + pull * np.eye(len(x))

    found = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": _GRADIENT})
    if not found.success:
        raise InputError(
            f"the length-controlled fit did not converge ({found.message}): report the win rate alone, or judge more "
            "prompts"
        )
    return found.x


def _refuse_unsolvable(features: np.ndarray, labels: np.ndarray) -> None:
    """A solution exists and is the only one if no direction d separates wins from losses (Albert & Anderson 1984):
    sides · d >= 0 with one of them above 0. A soft label is on both sides.

    Raises:
        InputError: it is not so.
    """
    if np.linalg.matrix_rank(features) < features.shape[1]:
        raise InputError(
            "length, difficulty and model cannot be told apart in these prompts, which are too few or too equal: judge "
            "more prompts, or leave the difficulty out"
        )
    sides = np.concatenate([features[labels > 0], -features[labels < 1]])
    if -linprog(-sides.sum(0), A_ub=-sides, b_ub=np.zeros(len(sides)), bounds=(-1, 1)).fun > _SEPARATED * len(sides):
        raise InputError(
            "a length-controlled win rate has no finite solution here, because the preferences are all on one side, or "
            "a limit in length or difficulty separates wins from losses: report the win rate alone, or judge more "
            "prompts"
        )
