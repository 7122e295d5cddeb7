"""Charts as SVG, drawn by matplotlib from plain numbers."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from mixdpo.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#4292de", "#f68c32"  # light enough to carry black text; page.html has the same two

POINTS = 3000
"""A scatter plot shows at most so many points."""

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "mixdpo", "text.parse_math": False, "font.size": 8}
DASHED: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}


def histogram(cut: np.ndarray, kept: np.ndarray, ends: tuple[float, float], threshold: float | None) -> str:
    """SVG of the scores of cut tokens and, stacked on top, of kept tokens, in 60 bars.

    Args:
        ends: of the axis; the outermost bars hold all scores beyond.
        threshold: where a dashed line stands.
    """
    with _style():
        axes = (figure := _figure(4.5, 2.4)).subplots()
        (below, edges), (above, _) = (np.histogram(np.clip(each, *ends), 60, ends) for each in (cut, kept))
        axes.stairs(below, edges, fill=True, color=ORANGE, label="cut", gid="cut")
        axes.stairs(below + above, edges, baseline=below, fill=True, color=BLUE, label="kept", gid="kept")
        if threshold is not None:
            axes.axvline(threshold, label=f"threshold {threshold:.3g}", **DASHED)
        axes.set(xlabel="score", ylabel="tokens")
        axes.legend()
        return _svg(figure)


def scatter(x: np.ndarray, y: np.ndarray, labels: tuple[str, str], cuts: tuple[float, float]) -> str:
    """SVG of one point for each of N pairs of values. The outermost 1 % a side lie on the border.

    Args:
        x, y: (N,) values; of more than `POINTS` pairs a seed draws which are shown.
        labels: of the two axes.
        cuts: where the dashed line across each axis stands.
    """
    drawn = np.random.default_rng(0).permutation(len(x))[:POINTS]
    with _style():
        axes = (figure := _figure(6, 6)).subplots()
        shown = [np.clip(values, *np.quantile(values, [0.01, 0.99]))[drawn] for values in (x, y)]
        axes.plot(*shown, "o", color=BLUE, alpha=0.5, markersize=3, markeredgewidth=0, gid="points")
        axes.axvline(cuts[0], **DASHED)
        axes.axhline(cuts[1], **DASHED)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        return _svg(figure)


def _style() -> Any:
    """
    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise InputError("charts need matplotlib, which is not installed: pip install matplotlib") from None
    return rc_context(STYLE)


def _figure(width: float, height: float) -> "Figure":
    """Of so many inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _svg(figure: "Figure") -> str:
    """The same text for the same figure, without a date; fit to stand in an HTML page or in a file of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    return text[text.index("<svg") :]
