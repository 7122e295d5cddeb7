"""Two margins files over the pairs they share: rank correlation, overlap of the hard sets, a scatter plot."""

import json
from html import escape
from pathlib import Path

import numpy as np

from mixdpo.errors import InputError
from mixdpo.signals.margins_file import MarginsFile, read_margins
from mixdpo.token_cleaning.report import table, write_page

HARDEST = (0.1, 0.2, 0.3)


POINTS, SIZE = 3000, 360  # most pairs in the plot, drawn by a seed; its width


COLUMNS = ("hardest", "share", "by chance", "Jaccard", "by chance", "ties at A's cut", "at B's")


NOTE = """Small margin = hard. Share: how much of one set is in the other. Pairs that tie at a cut are in it in part, as
if drawn at random, so a signal with ties does not overlap fully even with itself."""


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of x and y (N,), equal values at their mean rank; NaN if one side is constant."""
    from scipy.stats import rankdata  # spearmanr would warn of a constant side

    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def overlap(x: np.ndarray, y: np.ndarray, fraction: float) -> dict[str, float]:
    """Of the hardest round(fraction · N) pairs (at least 1) by two margins (N,): the share of one set that is in the
    other, Jaccard's index, both also for random sets, and ties at the cuts. Expected values, as if ties are drawn."""
    count = max(1, round(fraction * len(x)))
    (one, ties_x), (other, ties_y) = (_membership(values, count) for values in (x, y))
    both, chance = float(one @ other), count**2 / len(x)
    found = {"share": both / count, "chance_share": chance / count, "jaccard": both / (2 * count - both)}
    return {**found, "chance_jaccard": chance / (2 * count - chance), "ties_a": ties_x, "ties_b": ties_y}


def _membership(margins: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """(N,) probability of being among the `count` smallest, and how many tie at the cut."""
    cut = np.sort(margins)[count - 1]
    below, ties = margins < cut, margins == cut
    return below + ties * ((count - below.sum()) / ties.sum()), int(ties.sum())


def compared(a: MarginsFile, b: MarginsFile) -> tuple[np.ndarray, np.ndarray]:
    """Margins (N,) by either file of the pairs that both have, with the same text.

    Raises:
        InputError: there is none.
    """
    common = [(margin, b.pairs[i][1]) for i, (text, margin) in a.pairs.items() if b.pairs.get(i, ("",))[0] == text]
    if not common:
        raise InputError(
            f"{a.path} (of {a.header['source']}) and {b.path} (of {b.header['source']}) have no pair in common: give "
            "two files of the same data"
        )
    x, y = np.array(common).T
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
    x, y = compared(*files)
    about = [f"{name}: {_describe(file)}" for name, file in zip("AB", files, strict=True)]
    about.append(f"{len(x)} pairs in common, Spearman's rank correlation {spearman(x, y):.3f}")
    found = [(f"{fraction:.0%}", *overlap(x, y, fraction).values()) for fraction in HARDEST]
    rows = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in found]
    print("\n".join([*about, *("  ".join(f"{cell:<15}" for cell in row).rstrip() for row in (COLUMNS, *rows))]))
    title = escape(" against ".join(file.path.stem for file in files))
    body = f"""<h2>Hardest pairs</h2><div class="card"><div class="wide">{table(map(escape, COLUMNS), rows)}</div>
<p class="quiet">{NOTE}</p></div><h2>One point a pair</h2><div class="card">{_scatter(x, y)}</div>"""
    path = Path(out) if out else files[0].path.with_name(f"{files[0].path.stem}-vs-{files[1].path.stem}.html")
    write_page(path, f"Margins: {title}", "<br>".join(map(escape, about)), body)


def _describe(file: MarginsFile) -> str:
    header = file.header
    options = f" {json.dumps(header['options'])}" if header["options"] else ""
    model = "" if header["needs"] == "rating" else f", {header['base']}{' + ' * bool(header['adapter'])}"
    return f"{file.path}: {header['signal']}{options}{model}{header['adapter'] or ''}, {len(file.pairs)} pairs"


def _scatter(x: np.ndarray, y: np.ndarray) -> str:
    """A to the right, B upwards; the outermost 1 % a side lie on the border; dashed where the hardest 20 % end."""
    (across, cut_x, low_x, high_x), (up, cut_y, low_y, high_y) = (_scaled(values) for values in (x, y))
    drawn = np.random.default_rng(0).permutation(len(x))[:POINTS]
    points = (f'<circle cx="{across[i]:.1f}" cy="{SIZE - up[i]:.1f}" r="2"/>' for i in drawn)
    parts = [f'<g class="kept" fill-opacity="0.5">{"".join(points)}</g>']
    parts += [f'<path class="mark" d="M{cut_x:.1f} 0V{SIZE}M0 {SIZE - cut_y:.1f}H{SIZE}"/>']
    parts += [f'<path fill="none" d="M0 0H{SIZE}V{SIZE}H0Z"/>']
    below = ((0, "start", low_x), (SIZE / 2, "middle", "margin in A"), (SIZE, "end", high_x))
    parts += [f'<text x="{h}" y="{SIZE + 12}" text-anchor="{anchor}">{text}</text>' for h, anchor, text in below]
    left = ((SIZE, low_y), (SIZE / 2, "in B"), (9, high_y))
    parts += [f'<text x="-4" y="{v}" text-anchor="end">{text}</text>' for v, text in left]
    box = f'viewBox="-60 -4 {SIZE + 68} {SIZE + 22}" style="max-width:640px"'
    return f'<svg {box} role="img">{"".join(parts)}</svg>'


def _scaled(values: np.ndarray) -> tuple[np.ndarray, float, str, str]:
    """Places on an axis (N,), that of the cut of the hardest 20 %, and what is written at the axis' ends."""
    low, high = np.quantile(values, [0.01, 0.99])
    places = SIZE * (np.clip(values, low, high) - low) / ((high - low) or 1.0)
    return places, float(np.sort(places)[max(1, round(0.2 * len(places))) - 1]), f"{low:.3g}", f"{high:.3g}"
