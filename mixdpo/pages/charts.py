"""Charts as SVG, drawn by matplotlib from plain numbers."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mixdpo.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#4292de", "#f68c32"  # light enough to carry black text; page.html has the same two

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "mixdpo", "text.parse_math": False, "font.size": 8}
DASHED: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}


@dataclass
class Panel:
    """One of the axes of a line chart.

    Args:
        title, x, y: texts above the axes and beside them.
        lines: (label, xs, ys, options of matplotlib's `plot`) of each line; an empty label is left out of the legend.
    """

    title: str
    x: str
    y: str
    lines: list[tuple[str, Sequence[float], Sequence[float], dict[str, Any]]] = field(default_factory=list)


def line_chart(panels: Sequence[Panel]) -> str:
    """SVG of the panels side by side, each with its legend."""
    with _style():
        figure = _figure(5 * len(panels), 3.5)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for label, xs, ys, options in panel.lines:
                axes.plot(xs, ys, label=label, **options)
            axes.set(xlabel=panel.x, ylabel=panel.y)
            axes.set_title(panel.title, wrap=True)
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        return _svg(figure)


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
