"""Charts as SVG, drawn by matplotlib from plain numbers."""

import io
from typing import Any

import numpy as np

from mixdpo.errors import InputError

BLUE, ORANGE = "#4292de", "#f68c32"  # light enough to carry black text; page.html has the same two

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "mixdpo", "text.parse_math": False, "font.size": 8}


def histogram(cut: np.ndarray, kept: np.ndarray, ends: tuple[float, float], threshold: float | None) -> str:
    """SVG of the scores of cut tokens and, stacked on top, of kept tokens, in 60 bars.

    Args:
        ends: of the axis; the outermost bars hold all scores beyond.
        threshold: where a dashed line stands.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("charts need matplotlib, which is not installed: pip install matplotlib") from None
    (below, edges), (above, _) = (np.histogram(np.clip(each, *ends), 60, ends) for each in (cut, kept))
    file, metadata = (
        io.StringIO(),
        dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )  # the same text each time
    with rc_context(STYLE):
        figure: Any = Figure((4.5, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.stairs(below, edges, fill=True, color=ORANGE, label="cut", gid="cut")
        axes.stairs(below + above, edges, baseline=below, fill=True, color=BLUE, label="kept", gid="kept")
        if threshold is not None:
            axes.axvline(threshold, label=f"threshold {threshold:.3g}", color="black", linestyle="--", linewidth=1)
        axes.set(xlabel="score", ylabel="tokens")
        axes.legend()
        figure.savefig(file, format="svg", metadata=metadata)
    return file.getvalue()[file.getvalue().index("<svg") :]
