"""Tables of docs/speed.md, from what preference_step.py, token_cleaning.py and prepare.py have written."""

import json
import re
import statistics
from pathlib import Path

from measuring import median, table


def preference_trl(path: Path) -> str:
    """Medians of ours and of both settings of TRL, and the ratio of each round."""
    found, rows = json.loads(path.read_text("utf-8"))["comparison, float32"]["measured"], []
    ours = [name for name in found["runs"] if name.startswith("ours, ")]
    for name, compared in zip(ours, found["compared"], strict=True):
        case = "cached" if "cached" in name else "online"
        sides = [found["runs"][side] for side in (name, f"TRL, defaults, {case}", f"TRL, fastest, {case}")]
        cells = [f"{median(side, 'seconds'):.0f} s, {median(side, 'peak_mb') / 1e3:.1f} GB" for side in sides]
        title = re.sub(r" \(.*\)|, against plain DPO|(?<=, )reference ", "", compared["title"])
        rounds = ", ".join(f"{ratio:.1f}" for ratio in compared["speed_by_round"])
        rows.append([title, *cells, f"{compared['speed']:.1f}× ({rounds})", f"{compared['memory']:.2f}"])
    return table(["training", "ours", "TRL, defaults", "TRL, fastest", "speed", "memory"], rows)


def preference_ablation(path: Path) -> str:
    found = json.loads(path.read_text("utf-8"))["ablation, float32"]["measured"]
    costs = [(run["name"], run["seconds"], run["seconds"] / found[0]["seconds"], run["peak_mb"] / 1e3) for run in found]
    rows = [[name, f"{seconds:.0f}", f"{ratio:.2f}", f"{peak:.1f}"] for name, seconds, ratio, peak in costs]
    return table(["DPO, reference online, 8 pairs", "seconds", "ratio", "peak, GB"], rows)


def preference_profile(path: Path) -> str:
    seconds = json.loads(path.read_text("utf-8"))["profile, float32"]["measured"]
    names = {"matrix products of the body": "products of the body", "the rest": "all else"}
    head = [names.get(name, name) for name in seconds]
    return table(head, [[f"{each / sum(seconds.values()):.0%}" for each in seconds.values()]])


def token_cleaning_scoring(path: Path) -> str:
    rows = []
    for name, found in json.loads(path.read_text("utf-8"))["scoring"]["measured"].items():
        speeds, memory = (found["costs"][key]["ratios"] for key in ("tokens_per_second", "peak_above_resident_mb"))
        both = ", ".join(f"{ratio:.2f}" for ratio in speeds)
        rows.append(
            [f"samples, {name}", f"{statistics.median(speeds):.2f}× ({both})", f"{statistics.median(memory):.2f}"]
        )
    return table(["ours / published", "tokens per second", "memory"], rows)


def prepare(path: Path) -> str:
    found = json.loads(path.read_text("utf-8"))["measured"]
    rows = []
    for run in found:
        pairs, seconds = f"{run['pairs']:,}", f"{run['seconds']:,.{int(run['seconds'] < 100)}f}"
        rows.append([pairs, seconds, f"{run['peak_mb']:.0f}", f"{run['file_mb']:.3g}"])
    return table(["pairs", "seconds", "memory, MB", "file, MB"], rows)
