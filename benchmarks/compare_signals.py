"""Difficulty signals against each other on 300 seeded pairs of each shared data set: rank correlation and hard sets.

    python benchmarks/compare_signals.py [--folder runs/compare_signals] [--pairs 300] [--data.… --trainer.…]

Policy log-prob and CHES (summed and per token) of SmolLM2-135M-Instruct (NF4, fp32), and the data's own rating. Margins
files are kept in the folder: a stopped comparison goes on where it was, and is refused with other options. Further
options go to `run.py predict`. Each signal of the model is a pass over about 355,000 tokens.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

from cleaning_runs import write
from measuring import about, table

from mixdpo.signals.compare_margins import HARDEST, compared, overlap, spearman
from mixdpo.signals.margins_file import read_margins

DATA = ("alpaca_eval_pairs", "ultrafeedback_pairs", "pandalm_human_pairs")
LIMITS = ["--data.max_length", "512", "--data.max_prompt_length", "256", "--trainer.accelerator", "cpu"]
CLASSES = {
    "log-prob": {"class_path": "mixdpo.signals.PolicyLogProb"},
    "CHES": {"class_path": "mixdpo.signals.CHES"},
    "CHES, per token": {"class_path": "mixdpo.signals.CHES", "init_args": {"normalised": True}},
}


def draw(source: Path, pairs: int, folder: Path) -> Path:
    """The sample as a file: rows drawn with seed 0, in the order of the data, whole or not at all."""
    out = folder / f"{source.name.removesuffix('.jsonl.gz')}-{pairs}.jsonl"
    if not out.exists():
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            rows = list(lines)
        chosen = sorted(random.Random(0).sample(range(len(rows)), min(pairs, len(rows))))
        out.with_suffix(".tmp").write_text("".join(rows[i] for i in chosen), encoding="utf-8")
        out.with_suffix(".tmp").rename(out)
    return out


def predict(folder: Path, source: Path, options: list[str]) -> dict[str, Path]:
    """The margins file of each signal; `run.py predict` continues those that were begun and leaves complete ones."""
    names = {signal: f"{source.stem}-{signal.replace(', ', '-').replace(' ', '_')}" for signal in ("rating", *CLASSES)}
    paths = {signal: folder / f"{name}.margins" for signal, name in names.items()}
    of_model = [("policy_log_prob", signal, ["--model.signal", json.dumps(kind)]) for signal, kind in CLASSES.items()]
    for config, signal, more in [("rating", "rating", []), *of_model]:
        given = ["--config", f"configs/signals/{config}.yaml", "--data.source", str(source), *LIMITS, *more, *options]
        command = [sys.executable, "run.py", "predict", *given, "--model.output", str(paths[signal])]
        subprocess.run(command, check=True)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/compare_signals"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--name", default="compare_signals", help="of the files in benchmarks/results")
    arguments, options = parser.parse_known_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    by_length: dict[str, dict[str, float]] = {}
    rows, content = [], {"about": about(), "seed": 0, "options": [*LIMITS, *options], "comparisons": []}
    for data in DATA:
        source = draw(arguments.data / f"{data}.jsonl.gz", arguments.pairs, arguments.folder)
        files = {name: read_margins(path) for name, path in predict(arguments.folder, source, options).items()}
        pairs = map(json.loads, source.read_text("utf-8").splitlines())
        # the margins files are in the order of the data
        longer = [len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs]
        by_length[data] = {name: spearman([m for _, m in file.pairs.values()], longer) for name, file in files.items()}
        for a, b in combinations(files, 2):
            x, y = compared(files[a], files[b])
            found = {"data": data, "a": a, "b": b, "pairs": len(x), "spearman": spearman(x, y)}
            found["hardest"] = {f"{fraction:.0%}": overlap(x, y, fraction) for fraction in HARDEST}
            content["comparisons"].append(found)
            rows.append([data, a, b, len(x), found["spearman"], *(e["share"] for e in found["hardest"].values())])
    chance = [f"hardest {fraction:.0%} shared (chance {fraction:.3f})" for fraction in HARDEST]
    content["length"] = by_length
    lengths = [[data, *found.values()] for data, found in by_length.items()]
    heads = ["Spearman with characters of chosen − rejected", *next(iter(by_length.values()))]
    tables = [table(["data", "A", "B", "pairs", "Spearman", *chance], rows), table(heads, lengths)]
    write(arguments.name, content, "\n".join(tables))


if __name__ == "__main__":
    main()
