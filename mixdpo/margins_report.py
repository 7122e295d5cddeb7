"""Two margins files compared over the pairs they share: rank correlation, overlap of the hard sets, a scatter plot."""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from mixdpo.errors import InputError
from mixdpo.margins_file import MarginsFile, read_margins
from mixdpo.token_cleaning.report import HEAD, table, write_page

HARDEST = (0.1, 0.2, 0.3)
POINTS = 3000
"""Most pairs in the plot, drawn by a seed from more."""
SIZE = 360
NOTE = """Small margin = hard. Pairs that tie at the cut of a hard set belong to it in part, as if drawn at random: a signal
with ties does not overlap fully even with itself."""


@dataclass(frozen=True)
class Overlap:
    """Of the hardest `fraction` of the pairs by either file: the `share` of one set that is in the other, and Jaccard's
    intersection / union; and what two random sets of that size would have. `ties`: pairs that tie at either cut."""

    fraction: float
    share: float
    jaccard: float
    chance_share: float
    chance_jaccard: float
    ties: tuple[int, int]


def ranks(values: np.ndarray) -> np.ndarray:
    """(N,) ranks from 1, where equal values have the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation; NaN where a side has one value only."""
    a, b = (ranks(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def membership(margins: np.ndarray, count: int) -> np.ndarray:
    """(N,) probability of being among the `count` smallest margins, where ties at the cut are broken at random."""
    cut = np.sort(margins)[count - 1]
    below, ties = margins < cut, margins == cut
    return below + ties * ((count - below.sum()) / ties.sum())


def overlap(x: np.ndarray, y: np.ndarray, fraction: float) -> Overlap:
    """Expected overlap of the hardest round(fraction · N) pairs (at least 1) by two margins (N,)."""
    count = max(1, round(fraction * len(x)))
    one, other = membership(x, count), membership(y, count)
    both, by_chance = float(one @ other), count**2 / len(x)
    ties = tuple(int((values == np.sort(values)[count - 1]).sum()) for values in (x, y))
    shares = [(common / count, common / (2 * count - common)) for common in (both, by_chance)]
    return Overlap(fraction, *shares[0], *shares[1], ties)  # type: ignore[arg-type]


def common_margins(a: MarginsFile, b: MarginsFile) -> tuple[np.ndarray, np.ndarray]:
    """Margins of the pairs that both files have with the same text, twice (N,).

    Raises:
        InputError: there is none.
    """
    pairs = [(margin, b.pairs[i][1]) for i, (text, margin) in a.pairs.items() if b.pairs.get(i, ("",))[0] == text]
    if not pairs:
        same_id = len(a.pairs.keys() & b.pairs.keys())
        raise InputError(
            f"{a.path} ({len(a.pairs)} pairs) and {b.path} ({len(b.pairs)} pairs) have no pair in common ({same_id} have "
            "the same id and another text): compare two files of the same data"
        )
    x, y = np.array(pairs).T
    return x, y


def compare(a: str, b: str, out: str | None = None) -> None:
    """Compare two margins files over the pairs they share: rank correlation, overlap of the hard sets, scatter plot.

    Args:
        a: margins file of `run.py predict`.
        b: another one, of the same data.
        out: the .html file to write, replaced if it exists; default A-vs-B.html beside `a`.

    Raises:
        InputError: a file cannot be read, or they have no pair in common.
    """
    files = read_margins(a), read_margins(b)
    x, y = common_margins(*files)
    overlaps = [overlap(x, y, fraction) for fraction in HARDEST]
    facts = [[name, *row] for name, row in zip("AB", map(_file_row, files), strict=True)]
    rows = [_overlap_row(each) for each in overlaps]
    summary = f"{len(x)} pairs in common; Spearman's rank correlation {spearman(x, y):.3f}"
    for line in (*facts, [summary], OVERLAP_HEAD, *rows):
        print("  ".join(f"{cell:<15}" if len(line) == len(OVERLAP_HEAD) else str(cell) for cell in line).rstrip())
    title = "Margins: " + " against ".join(escape(Path(file.path).stem) for file in files)
    page = [HEAD.format(title=title, summary=summary), '<div class="card wide">']
    page += [table(["", *FILE_HEAD], ([escape(cell) for cell in row] for row in facts)), "</div>"]
    page += ['<div class="card"><h3>Hardest pairs</h3><div class="wide">', table(OVERLAP_HEAD, rows)]
    page += [f'</div><p class="quiet">{NOTE}</p></div><div class="card"><h3>One point a pair</h3>', _scatter(x, y)]
    page += ["</div></body></html>\n"]
    write_page("".join(page), Path(out) if out else Path(a).with_name(f"{Path(a).stem}-vs-{Path(b).stem}.html"))


FILE_HEAD = ["file", "signal", "model", "pairs", "data"]
OVERLAP_HEAD = ["hardest", "share", "by chance", "Jaccard", "by chance", "ties A", "ties B"]


def _file_row(file: MarginsFile) -> list[str]:
    header = file.header
    options = "" if not header["options"] else f" {json.dumps(header['options'])}"
    model = "none" if header["needs"] == "rating" else str(header["base"])
    model += "" if header["adapter"] is None else f" + {header['adapter']}"
    return [file.path, header["signal"] + options, model, str(len(file.pairs)), str(header["source"])]


def _overlap_row(found: Overlap) -> list[str]:
    numbers = found.share, found.chance_share, found.jaccard, found.chance_jaccard
    return [f"{found.fraction:.0%}", *(f"{number:.3f}" for number in numbers), *map(str, found.ties)]


def _scatter(x: np.ndarray, y: np.ndarray) -> str:
    """A as x, B as y; the outermost 1 % a side lie on the border. Dashed: where the hardest 20 % end."""
    cuts = [np.sort(values)[max(1, round(0.2 * len(values))) - 1] for values in (x, y)]
    limits = [np.quantile(values, [0.01, 0.99]) for values in (x, y)]
    places = [_place(values, *ends) for values, ends in zip((x, y), limits, strict=True)]
    drawn = np.random.default_rng(0).permutation(len(x))[:POINTS]
    parts = [f'<circle cx="{places[0][i]:.1f}" cy="{SIZE - places[1][i]:.1f}" r="2"/>' for i in drawn]
    across, up = (float(_place(cut, *ends)) for cut, ends in zip(cuts, limits, strict=True))
    parts += [f'<path class="mark" d="M{across:.1f} 0V{SIZE}"/>', f'<path class="mark" d="M0 {SIZE - up:.1f}H{SIZE}"/>']
    parts += [f'<path fill="none" d="M0 0H{SIZE}V{SIZE}H0Z"/>']
    (left, right), (bottom, top) = limits
    labels = [(0, SIZE + 12, f"{left:.3g}", "start"), (SIZE, SIZE + 12, f"{right:.3g}", "end")]
    labels += [
        (SIZE / 2, SIZE + 12, "margin in A", "middle"),
        (-4, SIZE, f"{bottom:.3g}", "end"),
        (-4, 9, f"{top:.3g}", "end"),
    ]
    labels += [(-4, SIZE / 2, "in B", "end")]
    parts += [f'<text x="{h:.0f}" y="{v:.0f}" text-anchor="{anchor}">{text}</text>' for h, v, text, anchor in labels]
    style = 'style="max-width:640px" fill-opacity="0.5"'
    return f'<svg viewBox="-60 -4 {SIZE + 68} {SIZE + 22}" {style} role="img">{"".join(parts)}</svg>'


def _place(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return SIZE * (np.clip(values, low, high) - low) / ((high - low) or 1.0)
