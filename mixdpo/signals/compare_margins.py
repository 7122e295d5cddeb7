"""Two margins files: compared by rank correlation and overlap of the hard sets, or combined into one file."""

from typing import Literal

import numpy as np

from mixdpo.errors import InputError
from mixdpo.signals.margins_file import MarginsFile, MarginsWriter, read_margins

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


def alignment_potential(rating: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """z(ρ) − z(|m_w − m_l|), where z has mean 0 and population deviation 1 (arXiv 2503.01864): large where the ratings
    tell a pair's responses apart and the model does not yet.

    Args:
        rating: (N,) margin ρ between the ratings.
        gap: (N,) m_w − m_l, the margin between mean log-probabilities under the start model, or a multiple of it.

    Raises:
        InputError: all ratings or all gaps are equal.
    """
    if 0 in (np.ptp(rating), np.ptp(np.abs(gap))):
        raise InputError("no alignment potential: all margins of one file are equal. Give files whose margins differ")
    return np.subtract(*((x - x.mean()) / x.std() for x in (rating, np.abs(gap))))


def combine(a: str, b: str, out: str, how: Literal["alignment_potential", "union"] = "alignment_potential") -> None:
    """Make one margins file from two. The header holds the headers of both.

    Args:
        a: margins file; for the alignment potential, of the ratings.
        b: margins file; for the alignment potential, of PolicyLogProb with `normalised` under the start model.
        out: the file to write. A file of other margins is not overwritten.
        how: alignment_potential is z(ρ) − z(|m_w − m_l|); both files must hold the same pairs. union holds all margins
            of two files of one signal without a common pair.

    Raises:
        InputError: the pairs, models or encodings of the files do not fit, or a file cannot be read or written.
    """
    files = one, other = read_margins(a), read_margins(b)
    texts, others = ({i: text for i, (text, _) in each.pairs.items()} for each in files)
    if texts.keys() & others.keys() if how == "union" else texts != others:
        must = "have no pair in common" if how == "union" else "hold the same pairs"
        raise InputError(f"{a} and {b} must {must}: compute both anew")
    kinds = [(each.header["signal"], each.header["options"], each.header["needs"]) for each in files]
    if how == "union" and kinds[0] != kinds[1]:
        raise InputError(f"{a} and {b} are of different signals ({kinds[0][0]}, {kinds[1][0]}): give two of one")
    if how != "union" and (one.of_policy or not other.header["options"].get("normalised")):
        raise InputError(f"give a file of ratings first ({a}), then one of PolicyLogProb with normalised true ({b})")
    names = ("weights", "tokenizer", "template", "lengths")  # of ratings nothing is refused
    one.refuse_other({name: other.header.get(name) for name in names}, f"model or encoding than {b}")
    # margins of a policy fit no other model, so the new file says which model
    header = min(files, key=lambda each: (each.header["needs"] != "policy", not each.of_policy)).header
    kept = {k: v for k, v in header.items() if all(each.header.get(k) == v for each in files if each.of_policy)}
    new = {"signal": how, "options": {}, "needs": header["needs"], "source": f"{a} and {b}", "date": None}
    # y is of b where both hold the pair
    x, y = (np.array([margin for _, margin in (one.pairs | each.pairs).values()]) for each in files)
    margins = y if how == "union" else alignment_potential(x, y)
    writer = MarginsWriter(out, {**kept, **new, "parts": [each.header for each in files]}, texts | others)
    if not writer.margins:
        writer.append(texts | others, margins.tolist())
    print(writer.finish())
