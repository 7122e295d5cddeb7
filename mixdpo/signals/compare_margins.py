"""Two margins files over the pairs they share: rank correlation and overlap of the hard sets."""

import numpy as np

from mixdpo.errors import InputError
from mixdpo.signals.margins_file import MarginsFile, read_margins

HARDEST = (0.1, 0.2, 0.3)

COLUMNS = ("hardest", "share", "by chance", "Jaccard", "by chance", "ties at A's cut", "at B's")


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of x and y (N,), equal values at their mean rank; NaN if one side is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)


def overlap(x: np.ndarray, y: np.ndarray, fraction: float) -> dict[str, float]:
    """Overlap of the hardest round(fraction · N) pairs (at least 1) by two margins (N,).

    Returns:
        Share of one set that is in the other, Jaccard's index, both also for random sets, and ties at the cuts. Ties
        count by their expected values, as if ties were drawn at random.
    """
    count = max(1, round(fraction * len(x)))
    (one, ties_x), (other, ties_y) = (_membership(values, count) for values in (x, y))
    both, chance = float(one @ other), count**2 / len(x)
    shares = {"share": both / count, "chance_share": chance / count, "jaccard": both / (2 * count - both)}
    return {**shares, "chance_jaccard": chance / (2 * count - chance), "ties_a": ties_x, "ties_b": ties_y}


def _membership(margins: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """(N,) probability of being among the `count` smallest, and the number of ties at the cut."""
    cut = np.sort(margins)[count - 1]
    below, ties = margins < cut, margins == cut
    return below + ties * ((count - below.sum()) / ties.sum()), int(ties.sum())


def compared(a: MarginsFile, b: MarginsFile) -> np.ndarray:
    """(2, N) margins of either file, for the pairs that both files hold with the same text.

    Raises:
        InputError: the files share no pair.
    """
    common = [(margin, b.pairs[i][1]) for i, (text, margin) in a.pairs.items() if b.pairs.get(i, ("",))[0] == text]
    if not common:
        raise InputError(f"{a.path} and {b.path} have no pair in common: give two files of the same data")
    return np.array(common).T


def compare(a: str, b: str) -> None:
    """Compare two margins files over the pairs they share: rank correlation and overlap of the hard sets.

    Args:
        a: margins file of `run.py predict`.
        b: another margins file of the same data.

    Raises:
        InputError: a file cannot be read, or the files share no pair.
    """
    files = read_margins(a), read_margins(b)
    x, y = compared(*files)
    both = zip("AB", files, strict=True)
    summary = [f"{name}: {f.path} ({f.header['signal']}, {len(f.pairs)} pairs)" for name, f in both]
    summary.append(f"{len(x)} pairs in common, Spearman's rank correlation {spearman(x, y):.3f}")
    overlaps = [(f"{fraction:.0%}", *overlap(x, y, fraction).values()) for fraction in HARDEST]
    rows = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in overlaps]
    print("\n".join([*summary, *("  ".join(f"{cell:<15}" for cell in row).rstrip() for row in (COLUMNS, *rows))]))
