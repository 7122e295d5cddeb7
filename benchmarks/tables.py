"""Makes the tables of README.md and docs/*.md from the rows in benchmarks/results, in place, between
`<!-- from: python benchmarks/tables.py NAME -->` and `<!-- end -->`. No row is longer than 100 characters.

    python benchmarks/tables.py                        # a table whose rows are not committed stays as it is
    python benchmarks/tables.py --check                # writes nothing; exit status 1 if a table differs from its rows
    python benchmarks/tables.py --keep runs/demo       # the rows of a run (demo.csv) or of a study (NAME_scores.csv)
    python benchmarks/tables.py --plot default_recipe  # each seed's score, mean and interval of each run: NAME.png
"""

import argparse
import csv
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import speed_tables
from measuring import table

from mixdpo.errors import InputError
from mixdpo.evaluation import compare_runs, gold
from mixdpo.evaluation.compare_runs import SCORES, START, Scores, values
from mixdpo.evaluation.study_design import Study, read_study
from mixdpo.storage.files import Row, write_csv, write_text

ROOT = Path(__file__).parents[1]
RESULTS, PAGES = ROOT / "benchmarks/results", (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARK = re.compile(r"(<!-- from: python benchmarks/tables\.py (\S+) -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
TEXT = {"outcome", "run", "chosen", "seeds", "prompts", "control", "verdict"}


def read_scores(path: Path) -> Scores:
    """The rows of a study's scores.csv.

    Raises:
        InputError: two jobs have rows of different prompts.
    """
    scores: Scores = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            scores.setdefault((row["run"], row["point"], row["seed"]), []).append(row)
    prompts = {job: [(row["prompt"], row["part"]) for row in rows] for job, rows in scores.items()}
    if lost := [job for job in prompts if prompts[job] != next(iter(prompts.values()))]:
        raise InputError(f"{path}: {lost[0]} has other prompts than the first job: keep the study's rows anew")
    return scores


def study_of(name: str) -> Study:
    return read_study(ROOT / f"configs/studies/{name}.yaml")


def study(path: Path) -> str:
    """Of the rows of every prompt, which are kept since the second study."""
    return narrow(compare_runs.tables(study_of(path.stem.removesuffix("_scores")), read_scores(path)))


def study_means(path: Path) -> str:
    """The main outcome of a study whose table.csv alone was kept."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{key: text for key, text in row.items() if text or key in TEXT} for row in csv.DictReader(file)]
    typed = [{key: text if key in TEXT else float(text) for key, text in row.items()} for row in rows]
    main = str(typed[0]["outcome"])
    return narrow({main: [row for row in typed if row["outcome"] == main]})


def bare(value: float, form: str = ".3f") -> str:
    """`.337` for 0.337: as papers write shares and scores in narrow tables."""
    return re.sub(r"^([+−]?)0\.", r"\1.", f"{value:{form}}".replace("-", "−"))


def interval(row: Row, keys: Sequence[str], form: str = ".3f") -> str:
    middle, low, high = (bare(row[key], form) for key in keys)
    return f"{middle} [{low}, {high}]"


def narrow(outcomes: Mapping[str, Sequence[Row]]) -> str:
    """compare_runs.markdown with short numbers. Bold: decided. The last column is p where the rows have it."""
    return "\n".join(_narrow(outcome, rows) for outcome, rows in outcomes.items())


def _narrow(outcome: str, rows: Sequence[Row]) -> str:
    (control, _), *_ = Counter(row["control"] for row in rows if row["control"]).most_common()
    ((seeds, prompts), _), *_ = Counter((row["seeds"], row["prompts"]) for row in rows).most_common()
    last, cells, notes = "p" if any("p" in row for row in rows) else "detectable", [], []
    for row in rows:
        run, gain = row["run"], ["", ""]
        if "difference" in row:
            gain = [interval(row, ("difference", "difference_low", "difference_high"), "+.3f"), bare(row[last])]
            gain[0] = f"**{gain[0]}**" if row["verdict"].startswith("decided") else gain[0]
            gain[1] = bare(row["p"], ".4f") if last == "p" else gain[1]
        notes += [f"`{run}` has {row['seeds']} seeds.\n"] if row["seeds"] != seeds else []
        notes += [f"`{run}` is compared with `{row['control']}`.\n"] if row["control"] not in ("", control) else []
        rate = re.sub(r"lr (\S+)", lambda match: f"{float(match[1]):.0e}".replace("e-0", "e-"), row["chosen"])
        cells.append([run, rate, interval(row, ("mean", "low", "high")), f"{row['tokens']:.1f}", bare(row["ended"])])
        cells[-1] += gain
    head = [f"{outcome}, {seeds} × {prompts}", "lr", "mean [95 %]", "tokens", "ended", f"against {control}", last]
    return table(head, cells).replace(" nan ", " ") + "\n" * bool(notes) + "".join(notes)


def demo(path: Path) -> str:
    """Before and after one run."""
    sides = []
    for rows in read_scores(path).values():
        score, tokens, ended = values(rows, sorted({row["part"] for row in rows}))
        given: Any = [SimpleNamespace(tokens=t, ended=e) for t, e in zip(tokens, ended, strict=True)]
        sides.append(gold.Responses(given, score))
    return gold.markdown(gold.compare(*sides, [row["part"] for row in rows]), {}).split("\n\n")[0]


def compare_methods(*paths: Path) -> str:
    methods = [each["values"] for path in paths for each in json.loads(path.read_text("utf-8"))["results"].values()]
    head = ["", "AlpacaEval: MixDPO", "DPO", "SFT", "UltraFeedback: MixDPO", "DPO", "SFT"]
    names = {key: key.replace("answer", "response").replace("before training", "before") for key in methods[0]}
    return table(head, [[name, *(method[key] for method in methods)] for key, name in names.items()])


def compare_signals(path: Path) -> str:
    """Spearman's correlation, and the share of the hardest 30 % that two signals have in common."""
    content = json.loads(path.read_text("utf-8"))
    rows: dict[str, list[str]] = {}
    for pair in content["comparisons"]:
        cell = f"{pair['spearman']:+.2f}, {pair['hardest']['30%']['share']:.2f}"
        rows.setdefault(f"{pair['a']} and {pair['b']}", []).append(cell)
    for of_data in content["length"].values():
        for signal, correlation in of_data.items():
            first = "*characters of chosen − rejected*" if signal == "rating" else "…"
            rows.setdefault(f"{first} and {signal}", []).append(f"{correlation:+.2f}")
    head = ["", "AlpacaEval, judged", "UltraFeedback, rated", "PandaLM, human votes"]
    cells = [[name.replace(", per", " per"), *(cell.replace("-", "−") for cell in of)] for name, of in rows.items()]
    return table(head, cells)


def compare_cleaning(path: Path) -> str:
    """Of each method the loss of each seed, then means over the seeds."""
    content, rows = json.loads(path.read_text("utf-8")), []
    losses = content["held_out_loss"]
    for method in dict.fromkeys(re.sub(r"-\d+$", "", name) for name in losses):
        runs = [name for name in losses if re.sub(r"-\d+$", "", name) == method]
        means = [mean(losses[run][key] for run in runs) for key in losses["start"] if key != "loss"]
        shares = [stage["kept_share"] for run in runs for stage in content["stages"][run]]
        kept = f"{mean(shares):.1f}" if shares else None
        rows.append([method.replace("_", "-"), " / ".join(f"{losses[run]['loss']:.3f}" for run in runs), *means, kept])
    return table(["", "loss, seeds 0 / 1", "Alpaca", "Dolly", "GSM8K", "kept"], rows)


def planted_noise(path: Path) -> str:
    """Scorers on slice 3, then rounds on slices 3 and 4. The held-out loss is that after the last one."""
    content, rows = json.loads(path.read_text("utf-8")), []
    names = ["keep-0.6", *(name for name in content["stages"] if not name.startswith("keep"))]
    for name in sorted(names, key=lambda name: len(content["stages"][name])):
        stages, kinds, loss = (content[key][name] for key in ("stages", "auc_by_kind", "held_out_loss"))
        warm_up = "clean" if "clean" in name else "noisy"
        for number, found in enumerate((stage["planted"] for stage in stages), 3):
            title = name.replace("keep-0.6", "Token Cleaning, fixed")
            by_kind = " / ".join(f"{auc:.2f}" for auc in kinds.values())
            if len(stages) == 2:
                title, by_kind = f"{name.split(',')[0]}, {warm_up} warm-up, slice {number}", ""
            cells = [found["auc"], by_kind, found["precision"], found["recall"], found["kept_noise_rate"]]
            rows.append([title, *cells, loss["loss"] if number == 2 + len(stages) else ""])
    head = ["scorer", "AUC", "swap / boilerplate / shuffle", "precision", "recall", "η kept", "held-out loss"]
    return table(head, rows)


SHORT = {
    "(a) the third of them with the lowest base loss": "(a) third with the lowest base loss",
    "(b) halves of slice 3, each scores the other": "(b) halves of slice 3, crossed",
    "control: the same, each scores its own half": "control: each half scores its own",
    "(c) slices 0 to 2, cut by distance from the median": "(c) slices 0 to 2, near the median",
}


def planted_noise_repairs(path: Path) -> str:
    """Of planted_noise_repairs.py: name, η of the reference's data, AUC, AUC of three kinds, and what was kept."""
    rows = []
    for name, *numbers in json.loads(path.read_text("utf-8"))["rows"]:
        noise, auc, *kinds, precision, recall, kept, loss = numbers
        by_kind = "/".join("–" if each is None else bare(each, ".2f") for each in kinds)
        cells = [None if each is None else bare(each) for each in (noise, auc, precision, recall, kept)]
        rows.append([SHORT.get(name, name), *cells[:2], by_kind, *cells[2:], loss])
    return table(["slice 3 scored by", "η", "AUC", "three kinds", "prec.", "recall", "η kept", "loss"], rows)


TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "demo": (demo, ("demo.csv",)),
    "compare_methods": (compare_methods, ("compare_alpaca_eval.json", "compare_ultrafeedback_sample.json")),
    "compare_signals": (compare_signals, ("compare_signals.json",)),
    "noisy_labels": (study_means, ("noisy_labels.csv",)),
    "noisy_labels_against_mixdpo": (study_means, ("noisy_labels_against_mixdpo.csv",)),
    "default_recipe": (study, ("default_recipe_scores.csv",)),
    "compare_cleaning": (compare_cleaning, ("compare_cleaning.json",)),
    "planted_noise": (planted_noise, ("planted_noise.json",)),
    "planted_noise_repairs": (planted_noise_repairs, ("planted_noise_repairs.json",)),
    "preference_trl": (speed_tables.preference_trl, ("preference_step.json",)),
    "preference_ablation": (speed_tables.preference_ablation, ("preference_step.json",)),
    "preference_profile": (speed_tables.preference_profile, ("preference_step.json",)),
    "token_cleaning_scoring": (speed_tables.token_cleaning_scoring, ("token_cleaning.json",)),
    "prepare": (speed_tables.prepare, ("prepare.json",)),
}
"""Name -> what makes the table, and from which files of benchmarks/results."""


def sections(text: str, results: Path) -> Iterator[tuple[str, str, str]]:
    """Name, table as it is and table as its rows have it, of each table of the page whose rows are committed."""
    for _, name, now in MARK.findall(text):
        make, files = TABLES[name]
        if all((results / file).exists() for file in files):
            yield name, now, make(*(results / file for file in files)).rstrip() + "\n"


def filled(text: str, new: Mapping[str, str]) -> str:
    return MARK.sub(lambda match: match[1] + new.get(match[2], match[3]), text)


def remake(pages: Sequence[Path] = PAGES, results: Path = RESULTS, check: bool = False) -> int:
    """Exit status; with `check` 1 if a table differs from its rows."""
    differs = False
    for page in pages:
        text = page.read_text("utf-8")
        new = {name: made for name, now, made in sections(text, results) if now != made}
        for name in new:
            print(f"{page}: {name} {'differs from its rows: python benchmarks/tables.py' if check else 'is made anew'}")
        if new and not check:
            write_text(page, filled(text, new))
        differs |= bool(new)
    return int(check and differs)


def keep(folder: Path, results: Path = RESULTS) -> Path:
    """Copy a study's scores.csv, or make such rows of a run that has responded to the held-out prompts."""
    if (folder / "scores.csv").exists():
        return Path(shutil.copy(folder / "scores.csv", results / f"{folder.name}_scores.csv"))
    sides = {START[0]: compare_runs.job_scores(folder, "heldout", "before")}
    sides[folder.name] = compare_runs.job_scores(folder, "heldout")
    rows = ({"run": run, "point": "", "seed": "", **row} for run, rows in sides.items() for row in rows)
    write_csv(results / f"{folder.name}.csv", SCORES, rows)
    return results / f"{folder.name}.csv"


def plot(name: str, results: Path = RESULTS) -> Path:
    """Gold score of the main outcome: a dot for each seed, mean and 95 % interval over prompts and seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plan, scores = study_of(name), read_scores(results / f"{name}_scores.csv")
    outcome, parts = next(iter(plan.outcomes.items()))
    (rows,) = compare_runs.tables(replace(plan, outcomes={outcome: parts}), scores).values()
    figure, axes = pyplot.subplots(figsize=(7.2, 0.9 + 0.42 * len(rows)))
    for height, row in enumerate(reversed(rows)):
        jobs = [] if row["run"] in START else compare_runs.seeds_done(plan, row["run"], scores).values()
        seeds = [values(scores[job], parts)[0].mean() for job in jobs]
        color = "#d9761a" if "decided" in row.get("verdict", "").split(",") else "#1f5fa8"
        axes.plot([row["low"], row["high"]], [height, height], color=color, linewidth=2)
        axes.plot(seeds, np.full(len(seeds), height + 0.2), "o", color="0.6", markersize=4)
        axes.plot(row["mean"], height, "D", color=color, markersize=6)
    axes.set_yticks(range(len(rows)), [row["run"] for row in reversed(rows)])
    axes.set_xlabel(f"gold score, {outcome}")
    axes.set_title("mean [95 %] and seeds (grey); orange: decided against the run's control", fontsize=9, loc="left")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(results / f"{name}.png", dpi=120)
    return results / f"{name}.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a table differs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of a run or a study")
    parser.add_argument("--plot", metavar="NAME", help="of a study in configs/studies")
    options = parser.parse_args()
    if options.keep or options.plot:
        print(keep(options.keep) if options.keep else plot(options.plot))
    else:
        sys.exit(remake(check=options.check))


if __name__ == "__main__":
    main()
