"""Curves and histograms as SVG inside a page: a few paths, however many rows there are; colours are the page's."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

INK, SERIES = "#fe00ff", [f"#fe000{n}" for n in range(8)]  # stand for currentColor, and for var(--s0) … of page.html
DASHES = ("-", "--")
POINTS, BINS = 200, 40  # most points of a line; bars of a histogram
COLOURED = ("axes.edgecolor", "axes.labelcolor", "grid.color", "text.color", "xtick.color", "ytick.color")
STYLE: dict[str, Any] = dict.fromkeys(COLOURED, INK) | {"grid.alpha": 0.15, "lines.linewidth": 1.4, "font.size": 9}
STYLE |= {"svg.fonttype": "none", "savefig.transparent": True, "axes.formatter.limits": (-3, 4)}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}


@dataclass(frozen=True)
class Series:
    """A line through the means of y at each x (N,), or the histogram of y where x is None. There is no NaN."""

    x: np.ndarray | None
    y: np.ndarray
    label: str
    colour: int
    dash: int = 0

    def describe(self) -> str:
        """For who does not see the picture."""
        if self.x is not None:
            return f"{self.label}: {self.y[0]:.3g} at {self.x[0]:g}, {self.y[-1]:.3g} at {self.x[-1]:g}"
        low, middle, high = np.quantile(self.y, (0.05, 0.5, 0.95))
        return f"{self.label}: median {middle:.3g}, 90 % from {low:.3g} to {high:.3g}"


def thinned(values: np.ndarray) -> np.ndarray:
    """At most POINTS means of neighbours, in order."""
    return np.array([part.mean() for part in np.array_split(values, min(len(values), POINTS))])


def draw(title: str, series: Sequence[Series], label: str, marks: Sequence[float] = (), zero: bool = False) -> str:
    """The <svg> element.

    Args:
        title: makes the ids in the element differ from those of other figures on the page.
        label: of the x axis.
        marks: x of vertical lines.
        zero: the y axis starts at 0.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"svg.hashsalt": title}):
        figure, file = Figure(figsize=(4.4, 2.4)), StringIO()
        plot = figure.add_axes((0.13, 0.19, 0.84, 0.73), xlabel=label)
        plot.locator_params(nbins=5)
        every = np.concatenate([each.y for each in series])
        edges = np.histogram_bin_edges(every, int(np.clip(2 * len(every) ** 0.5, 8, BINS)))
        for each in series:
            options: Any = {"color": SERIES[each.colour % len(SERIES)], "linestyle": DASHES[each.dash]}
            if each.x is None:
                counts, _ = np.histogram(each.y, edges)
                plot.stairs(counts, edges, **options)
                plot.stairs(counts, edges, fill=True, alpha=0.5 / len(series), **options)
            else:
                x, which = np.unique(each.x, return_inverse=True)
                y = np.bincount(which, each.y) / np.bincount(which)
                plot.plot(thinned(x), thinned(y), marker="o" * (len(x) < 10), markersize=4, **options)
        for mark in marks:
            plot.axvline(mark, color=INK, linestyle="--", linewidth=1)
        if zero:
            plot.set_ylim(0, 1.1 * every.max())
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue().partition("<svg")[2].replace(INK, "currentColor")
    for number, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--s{number})")
    return "<svg" + re.sub(r'<g id="[^"]*"', "<g", svg)  # of which each figure would have the same
