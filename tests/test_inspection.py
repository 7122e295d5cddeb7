"""`mixdpo inspect`: its numbers by hand or by a loop, its warnings, and texts that stay texts."""

import logging
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import make_pairs, make_samples, write_pairs
from datasets import Dataset

from lightning_modules.cli import run
from lightning_modules.verbs.estimate import EstimateCLI
from mixdpo.errors import InputError
from mixdpo.evaluation.inspection import _counts, _cuts, visible
from mixdpo.routing.route import Routing

EVIL = "<script>alert(1)</script> [red]tea[/red] <bold>x</> \x1b[2J\u202e {{ 7 * 7 }}"
REFUSES = Mock(side_effect=InputError("no [estimate]"))


@pytest.fixture
def inspect(tiny_model, tmp_path, monkeypatch, capsys):
    """Rows and options -> what the terminal shows, in one line, and the page."""
    monkeypatch.setattr(logging, "disable", lambda level: None)  # of this process, which has more tests
    monkeypatch.setenv("COLUMNS", "80")

    def inspected(rows, *options, estimate=REFUSES):
        monkeypatch.setattr(EstimateCLI, "_estimate", estimate)
        source, out = write_pairs(tmp_path / "rows.jsonl", rows), tmp_path / "made" / "page.html"
        run(["inspect", source, f"--base={tiny_model}", f"--out={out}", *options])
        printed = capsys.readouterr().out
        shown = printed.partition("\nwrote ")[0]
        assert not ({*range(32)} - {10}) & {*map(ord, shown)} and max(map(len, shown.splitlines())) <= 80
        return " ".join(printed.split()), out.read_text("utf-8")

    return inspected


def test_cuts_against_the_route():
    """τ, ties and the share of each candidate are those that a route with this hard_fraction has."""
    margins, ids = np.random.default_rng(0).integers(0, 12, 97) / 4, np.arange(97)
    cuts = _cuts(Routing(hard_fraction=0.3).plan(margins, ids))
    for count, threshold, tied, to_sft in cuts["rows"]:
        route = Routing(hard_fraction=count / 97).plan(margins, ids).summary()
        assert (route["hard"], route["threshold"], route["ties_at_threshold"]) == (count, threshold, tied)
        assert route["hard_at_threshold"] == to_sft
    clean = [k for k in range(1, 97) if (margins < sorted(margins)[k]).sum() == k]
    assert cuts["best"] == min(clean, key=lambda k: abs(k - 29))
    assert Routing(hard_fraction=cuts["share"]).plan(margins, ids).is_hard.sum() == cuts["best"]
    assert sum(easy + hard for *_, easy, hard in cuts["bins"]) == 97 and sum(row[3] for row in cuts["bins"]) == 29
    assert _cuts(Routing().plan(np.ones(20), ids[:20]))["best"] == 0  # no cut between equal margins


def test_counts():
    a, b, c = [1, 2], [3], [4, 5, 6]
    rows = [(a, b, c, 1.0), (a, c, b, -1.0), (a, b, c, 1.0), (b, a, c, 2.0)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "margin")
    counts = _counts(Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows]))
    assert counts.pop("tokens").tolist() == [[2, 1, 3], [2, 3, 1], [2, 1, 3], [1, 2, 3]]
    assert counts == {"repeated": 1, "prompts": 2, "zero": 0, "negative": 1, "tied": 2, "both": 3}


def test_pairs(inspect):
    rows = make_pairs(40)
    rows[0] |= {"prompt": EVIL, "margin": 0.1, "lang": "en"}
    rows.append(rows[3] | {"pair_id": "again"})
    options = ["--data.validation=0.2", "--data.batch_size=8", "--data.max_length=40", "--data.max_prompt_length=9"]
    printed, page = inspect(rows, *options, estimate=EstimateCLI._estimate)
    for shown in ("standard.", "margin is margin.", "not read: lang", "Suggested: --data.routing.hard_fraction"):
        assert shown in printed and shown in page
    held_out = int(re.search(r"(\d+) pairs are held out", printed)[1])
    assert f"known to ± {98 / held_out**0.5:.0f} points (95 % interval)" in printed
    assert f"{held_out} held-out pairs show an accuracy" in printed and "1 pairs repeat another one" in printed
    assert f"{-(-(41 - held_out) // 8)} steps of 8 pairs" in printed and " 24 yes " in printed
    hard = r"prompt: .*; no loss .* chosen: .* end token; SFT loss .* rejected: .* end token; no loss: the pair is hard"
    assert re.search(hard, printed)
    assert not re.search(r"http|@import|url\(|<link|<script", page) and len(page) < 100_000


def test_texts_stay_texts(inspect):
    rows = [row | {f"[red]{EVIL}": "x", "chosen": f"{EVIL} {row['chosen']}"} for row in make_pairs(30)]
    printed, page = inspect(rows, "--data.validation=0.3")
    assert "<script>alert(1)</script> [red]tea[/red] <bold>x</> ▯[2J▯ {{ 7 * 7 }}" in printed
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page + printed
    assert visible("a\tb\x9b\u2066\n") == "a    b▯▯\n"


def test_pairs_without_margins(inspect):
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_pairs(30)]
    printed, page = inspect(rows, "--data.validation=0.3")
    assert "• no [estimate]" in printed and "no margin, so no pair can be hard" in printed and "mixdpo predict" in page
    assert "hard share" not in printed and "preference loss" in printed


def test_conversations(inspect):
    printed, page = inspect(make_samples(30), "--config=configs/token_cleaning/asft.yaml", "--data.limit=null")
    assert "trained by the loss" in printed and "SFT loss" in page and "margin" not in printed
    assert not Path("runs/asft").exists()
