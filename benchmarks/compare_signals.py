"""Difficulty signals against each other on 300 seeded pairs of each shared data set: rank correlation and hard sets.

    python benchmarks/compare_signals.py [FOLDER] [--data ../shared/data] [--pairs 300] [--model.… --trainer.…]

Policy log-prob and CHES (summed and per token) of SmolLM2-135M-Instruct (NF4, fp32), and the data's own rating. Margins
files are kept in FOLDER (default runs/compare_signals): a stopped comparison goes on where it was. Further options go
to `run.py predict`. One signal of the model is about 355,000 tokens: 35 minutes at 170 tokens a second.
"""

import argparse
import gzip
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

from cleaning_runs import about, table, write

from mixdpo.margins_file import read_margins
from mixdpo.margins_report import HARDEST, compared, overlap, spearman

DATA = ("alpaca_eval_pairs", "ultrafeedback_pairs", "pandalm_human_pairs")
LIMITS = ["--data.max_length", "512", "--data.max_prompt_length", "256", "--trainer.accelerator", "cpu"]
SIGNALS = {
    "rating": ("rating", []),
    "log-prob": ("policy_log_prob", []),
    "CHES": ("ches", []),
    "CHES, per token": ("ches", ["--model.signal.normalised", "true"]),
}


def draw(source: Path, pairs: int, out: Path) -> Path:
    """The sample as a file: rows drawn with seed 0, in the order of the data, whole or not at all."""
    if not out.exists():
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            rows = list(lines)
        chosen = sorted(random.Random(0).sample(range(len(rows)), min(pairs, len(rows))))
        out.with_suffix(".tmp").write_text("".join(rows[i] for i in chosen), encoding="utf-8")
        out.with_suffix(".tmp").rename(out)
    return out


def predict(folder: Path, source: Path, signal: str, options: list[str]) -> Path:
    """The margins file of one signal; `run.py predict` continues one that was begun and leaves a complete one alone."""
    config, more = SIGNALS[signal]
    path = folder / f"{source.stem}-{signal.replace(', ', '-').replace(' ', '_')}.margins"
    if not path.exists():
        given = ["--config", f"configs/signals/{config}.yaml", "--data.source", str(source), *LIMITS, *more, *options]
        subprocess.run([sys.executable, "run.py", "predict", *given, "--model.output", str(path)], check=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/compare_signals"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--signals", nargs="+", default=list(SIGNALS), choices=SIGNALS)
    parser.add_argument("--name", default="compare_signals", help="of the files in benchmarks/results")
    arguments, options = parser.parse_known_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows, content = [], {"about": about(), "seed": 0, "options": [*LIMITS, *options], "comparisons": []}
    for data in DATA:
        source = draw(arguments.data / f"{data}.jsonl.gz", arguments.pairs, arguments.folder / f"{data}.jsonl")
        files = {name: read_margins(predict(arguments.folder, source, name, options)) for name in arguments.signals}
        for a, b in combinations(files, 2):
            x, y = compared(files[a], files[b])
            found = {"data": data, "a": a, "b": b, "pairs": len(x), "spearman": spearman(x, y)}
            found["hardest"] = {f"{fraction:.0%}": overlap(x, y, fraction) for fraction in HARDEST}
            content["comparisons"].append(found)
            rows.append([data, a, b, len(x), found["spearman"], *(e["share"] for e in found["hardest"].values())])
    chance = [f"hardest {fraction:.0%} shared (chance {fraction:.3f})" for fraction in HARDEST]
    write(arguments.name, content, table(["data", "A", "B", "pairs", "Spearman", *chance], rows))


if __name__ == "__main__":
    main()
