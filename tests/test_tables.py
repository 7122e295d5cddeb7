"""The tables of README, docs and studies, and the rows that they are made from."""

import csv
import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readme_picture  # of benchmarks
import tables
from conftest import write_pairs

from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError
from mixdpo.evaluation import compare_runs, gold
from mixdpo.evaluation.generation import Response
from mixdpo.evaluation.study_design import Plan, Spread, Study

PARTS = ["validation"] * 3 + ["seen"] * 4 + ["unseen"] * 2
NAMES = [page.relative_to(tables.ROOT).as_posix() for page in tables.PAGES]
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.DOTALL | re.MULTILINE)
MEASURED = re.compile(r"(?<![\w.])[+−-]?\d{0,3}\.\d|\d ?[%×]")
"""In a cell of a table, outside of inline code. An arXiv number and a version such as llama3.1 are none."""


def unmarked_tables(text: str) -> list[str]:
    """Heads of tables with at least three measured cells that lie between no marks."""
    text = re.sub(r"<!-- from: [^>]*-->.*?<!-- end -->", "", FENCE.sub("", text), flags=re.DOTALL)
    blocks = re.findall(r"(?:^ *\|.*\n?)+", text, flags=re.MULTILINE)
    cells = {block: re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", block)) for block in blocks}
    return [block.splitlines()[0] for block in blocks if sum(bool(MEASURED.search(cell)) for cell in cells[block]) > 2]


def test_the_pages_are_what_the_rows_give() -> None:
    assert tables.remake(check=True) == 0
    texts = [page.read_text("utf-8") for page in tables.PAGES]
    assert {name for text in texts for _, name, _ in tables.MARK.findall(text)} == set(tables.TABLES)


@pytest.mark.parametrize("name", NAMES)
def test_measured_numbers_have_a_source(name: str) -> None:
    text = FENCE.sub("", (tables.ROOT / name).read_text("utf-8"))
    marks = re.findall(r"<!-- (from|end)\b", text)
    assert marks == ["from", "end"] * (len(marks) // 2), "a mark is left open"
    assert not unmarked_tables(text)


@pytest.mark.parametrize(
    ("row", "measured"),
    [
        *(
            ("| 1.5 | 12 % | 2× |", 1),
            ("| 1.5 | 12 |", 0),
            ("| `0.5` | `1 %` | 3.5 |", 0),
            ("| 0.1 [0, 1] | 3% | −.5 |", 1),
        ),
        *(("| arXiv 2602.00954 | llama3.1 | 1.5 | 2 % |", 0), ("```\n| 1.5 | 12 % | 2× |\n```", 0)),
        *(("<!-- from: a -->\n| 1.5 | 12 % | 2× |\n<!-- end -->", 0), ("<!-- end -->\n| 1.5 | 12 % | 2× |", 1)),
    ],
)
def test_tables_of_measurements_are_found(row: str, measured: int) -> None:
    assert len(unmarked_tables(f"Text.\n\n{row}\n\n1.5 % | 2.5 | 3.5")) == measured


CHANGES = {
    "docs/results_earlier.md": (".337 [.289", ".338 [.289"),
    "docs/results_cleaning.md": ("1.453 / 1.462", "1.453 / 1.463"),
    "noisy_labels.csv": ("0.33650793", "0.33750793"),
    "noisy_labels_against_mixdpo.csv": (",0.065,", ",0.066,"),
    "compare_alpaca_eval.json": ("0.5882353", "0.5782353"),
    "compare_signals.json": ("-0.4157523", "-0.4257523"),
    "compare_cleaning.json": ("1.4534437656402588", "1.4634437656402588"),
    "planted_noise.json": ('"recall": 0.198343', '"recall": 0.199343'),
    "preference_step.json": ('"speed": 2.26', '"speed": 2.46'),
    "prepare.json": ('"peak_mb": 164.1', '"peak_mb": 165.1'),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_changed_number_is_found(changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A study's rows of every prompt are left out, for their intervals take seconds: below a study is made."""
    shutil.copytree(tables.RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*_scores.csv"))
    shutil.copytree(tables.ROOT / "docs", tmp_path / "docs")
    pages, (old, new) = sorted((tmp_path / "docs").glob("*.md")), CHANGES[changed]
    path = tmp_path / (changed if changed.startswith("docs") else f"results/{changed}")
    kept = {page: page.read_text("utf-8") for page in pages}
    assert old in path.read_text("utf-8")
    path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")
    before = [page.read_text("utf-8") for page in pages]
    assert tables.remake(pages, tmp_path / "results", check=True) == 1
    assert before == [page.read_text("utf-8") for page in pages]
    assert "differs from its rows: python benchmarks/tables.py" in capsys.readouterr().out
    for check in (False, True):
        assert tables.remake(pages, tmp_path / "results", check) == 0
    differing = [page for page in pages if kept[page] != page.read_text("utf-8")]
    assert bool(differing) != changed.startswith("docs")


def made_study(folder: Path, same_start: bool = True) -> Study:
    """Two runs, two grid points, two seeds, all done; random scores in thirds."""
    rng, prompts = np.random.default_rng(0), [{"prompt": f"p{i}", "part": part} for i, part in enumerate(PARTS)]
    plan = Study(
        **{"config": "", "folder": str(folder / "made"), "prompts": write_pairs(folder / "prompts.jsonl", prompts)},
        **{"runs": {"dpo": Plan(), "mixdpo": Plan()}, "control": "dpo", "assumed_sd": Spread(0.3, 0), "seeds": [1, 0]},
        **{"outcomes": {"held out": ["seen", "unseen"], "unseen": ["unseen"]}, "options": {"data.validation": 0}},
        **{"grid": {"model.lr": [0.1, 0.2]}, "choose_by": "validation", "holm": ["mixdpo"]},
    )
    for job in product(plan.runs, plan.points, plan.seeds):
        rows = []
        for prompt in prompts:
            start = 0.5 if same_start else job[2] / 2
            sides = {"before": {"score": start, "tokens": 20, "ended": False}}
            sides["after"] = {"score": int(rng.integers(4)) / 3, "tokens": int(rng.integers(64)), "ended": True}
            rows.append(prompt | sides)
        path = folder / "made" / plan.name(*job) / "responses.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    return plan


def assert_shows(text: str, row: dict[str, Any]) -> None:
    """The narrow table has the row's numbers, to the digits that a study's own table has."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {row['run']} |"))
    numbers = [float(number) for number in re.findall(r"[+-]?\d*\.\d+", line.replace("−", "-"))]
    difference = [row[key] for key in ("difference", "difference_low", "difference_high")]
    expected = [row["mean"], row["low"], row["high"], row["tokens"], row["ended"], *difference, row["p"]]
    digits = [3, 3, 3, 1, 3, 3, 3, 3, 4]
    assert numbers == [round(value, n) for value, n in zip(expected, digits, strict=True)]
    assert ("**" in line) == row["verdict"].startswith("decided")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("same_start", [True, False])
def test_a_study_is_made_from_its_rows(same_start: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = made_study(tmp_path, same_start)
    names = {plan.name(*job) for job in product(plan.runs, plan.points, plan.seeds)}
    text = compare_runs.write_tables(plan, names)
    with (tmp_path / "made/scores.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == (2 * 2 * 2 + (1 if same_start else 2)) * len(PARTS)
    starts = [row for row in rows if row["run"] == "(before training)"]
    assert {row["seed"] for row in starts} == ({"1 0"} if same_start else {"1", "0"})
    for row in rows[: -len(starts)]:  # every number is restored exactly, also of a point that was not chosen
        name = f"{row['run']}-{row['point'].replace(' ', '')}-seed{row['seed']}"
        kept = json.loads((tmp_path / "made" / name / "responses.json").read_text())[int(row["prompt"]) - 1]
        assert (kept["part"], kept["after"]["tokens"], "1") == (row["part"], int(row["tokens"]), row["ended"])
        assert kept["after"]["score"] == float(row["score"])
    monkeypatch.setattr(tables, "study_of", {"made": plan}.get)
    committed = tables.keep(tmp_path / "made", tmp_path)
    scores = tables.read_scores(committed)
    outcomes = compare_runs.tables(plan, scores)
    assert committed.name == "made_scores.csv" and compare_runs.markdown(outcomes) == text
    assert_shows(tables.study(committed), outcomes["held out"][1])
    for run in plan.runs:  # the choice is made again, by hand
        means = [np.mean([float(row["score"]) for row in scores[run, f"lr {lr}", "1"][:3]]) for lr in (0.1, 0.2)]
        assert compare_runs.chosen_point(plan, run, scores) == {"model.lr": 0.1 if means[0] >= means[1] else 0.2}
    assert tables.plot("made", tmp_path).read_bytes().startswith(b"\x89PNG")
    committed.write_text(committed.read_text().rsplit("\n", 2)[0])
    with pytest.raises(InputError, match="has other prompts than the first job"):
        tables.read_scores(committed)


def test_the_demo_is_made_from_its_rows(tmp_path: Path) -> None:
    rng, rows, sides = np.random.default_rng(1), read_prompts("heldout"), {}
    for when in ("before", "after"):
        given = [Response("", int(rng.integers(64)), bool(rng.integers(2))) for _ in rows]
        sides[when] = gold.Responses(given, rng.integers(4, size=len(rows)) / 3)
    both = zip(rows, *(side.rows() for side in sides.values()), strict=True)
    content: list[dict[str, Any]] = [row | {"before": before, "after": after} for row, before, after in both]
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/responses.json").write_text(json.dumps(content))
    committed = tables.keep(tmp_path / "demo", tmp_path)
    expected = gold.markdown(gold.compare(*sides.values(), [row["part"] for row in rows]), {})
    assert committed.name == "demo.csv" and expected.startswith(tables.demo(committed) + "\n\n| training")
    assert tables.demo(committed).count("\n") == 6


def test_the_readme_picture_is_made_from_committed_rows(tmp_path: Path) -> None:
    plan = tables.study_of(readme_picture.STUDY)
    assert set(readme_picture.NAMES) == {compare_runs.START[0], *plan.runs}, "a run without a name"
    rows = readme_picture.scores(tables.RESULTS / "default_recipe_scores.csv")
    paper = next(row for row in rows if row["run"] == plan.control)
    assert f"{tables.bare(paper['mean'])} [" in (tables.ROOT / "docs/results.md").read_text()
    assert len(readme_picture.margins()) == 240
    picture = readme_picture.make(tmp_path / "mixdpo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 150_000


def test_repairs_are_made_from_their_rows(tmp_path: Path) -> None:
    """As benchmarks/planted_noise_repairs.py writes them: name, η, AUC, three AUC by kind, three shares, loss."""
    source = (tables.ROOT / "benchmarks/planted_noise_repairs.py").read_text("utf-8")
    assert all(f'"{name}"' in source for name in tables.SHORT)
    cut = "(c) the same, a fifth cut at either end"
    rows = [[name, 0.2051, 0.3, 0.4, 0.17, 0.345, 0.1, 0.2, 0.274, 1.72] for name in (*tables.SHORT, cut)]
    rows.append(["all tokens", *[None] * 7, 0.205, 1.528])
    (tmp_path / "repairs.json").write_text(json.dumps({"rows": rows}))
    head, _, *lines = tables.planted_noise_repairs(tmp_path / "repairs.json").splitlines()
    assert lines[4] == f"| {cut} | .205 | .300 | .40/.17/.34 | .100 | .200 | .274 | 1.720 |"
    assert lines[5] == "| all tokens | – | – | –/–/– | – | – | .205 | 1.528 |"
    assert max(map(len, (head, *lines))) <= 100
