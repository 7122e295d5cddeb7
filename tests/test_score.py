"""`mixdpo score`: the table of a verdicts file, of two, and what it refuses."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixdpo.errors import InputError
from mixdpo.evaluation.score import score
from mixdpo.evaluation.verdicts import Verdict, VerdictsWriter, read_verdicts

HEADER = {"model": "ours", "baseline": "gpt", "outputs": "0f", "judge": {"model": "j", "seed": 0}}
NAME = "length-controlled win rate without instruction difficulty and gamed baselines"
GAMED = "index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
BOTH = {"model": "j", "order": "both"}


def verdict(index: int, preference: float | str, order: str = "model_first", **changes: Any) -> Verdict:
    """A text instead of a preference is why it failed."""
    failed = isinstance(preference, str)
    result = {"preference": None if failed else preference, "failed": preference if failed else None}
    lengths = {"len_model": 100 + 7 * index**2, "len_baseline": 120 + 3 * index, "tokens": 10 * index, "ended": True}
    result["source"] = None if failed else "log_probs"
    return Verdict(index=index, order=order, **(lengths | result | changes))


def write(path: Path, verdicts: Sequence[Verdict], prompts: int | None = None, **header: Any) -> str:
    count = prompts if prompts is not None else 1 + max(verdict.index for verdict in verdicts)
    path.unlink(missing_ok=True)
    with VerdictsWriter(path, HEADER | {"prompts": count} | header) as writer:
        writer.keep(*verdicts)
    return str(path)


def cells(printed: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split(" | ")] for line in printed.splitlines() if line.startswith("| ")]
    return {first.removeprefix("| "): [*middle, last.removesuffix("|").strip()] for first, *middle, last in rows}


def test_one_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [verdict(i, p) for i, p in enumerate([0.9, 0.5, 0.2, 0.4])] + [verdict(4, "no letter: 'Maybe'", len_model=0)]
    score(write(tmp_path / "v.jsonl", rows, prompts=7), samples=50)
    printed = capsys.readouterr().out
    table = cells(printed)
    assert len({line.count("|") for line in printed.splitlines()}) == 1  # one table, no row with a cell more
    assert table["against gpt, 4 prompts"] == ["", "standard error", "95 % interval"]
    assert "ours" in table and float(table[f"{NAME}, %"][1]) > 0
    # deviations 0.4, 0, -0.3, -0.1: √(0.26 / 3) / 2
    assert table["standard error of the win rate as AlpacaEval has it"][1] == "14.72"
    expected = {
        **{"win rate, %": "50.00", "discrete win rate, %": "37.50"},
        "prompts left out: 3": "not judged yet: 2; no letter: 1",
        # all five responses, the one whose verdict failed as well: 100, 107, 128, 163, 0 and 120, 123, …, 132
        "length of the model's responses, characters": "99.6",
        "length of the baseline's responses, characters": "126.0",
        "length of the model's responses, tokens": "20.0",
        **{"responses that ended by themselves, %": "100.0", "empty responses, %": "20.0"},
        "preference for the response shown first, %": "n/a",
    }
    assert {name: table[name][0] for name in expected} == expected


def test_both_orders_count_with_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(0.9, 0.5), (0.6, 0.4), (0.3, 0.1)]
    rows = [verdict(i, a) for i, (a, _) in enumerate(pairs)]
    rows += [verdict(i, b, "baseline_first") for i, (_, b) in enumerate(pairs)]
    rows += [verdict(3, 1.0), verdict(3, "timeout", "baseline_first"), verdict(4, 1.0)]
    rows += [verdict(0, 0.7)]  # asked again: the last line counts
    score(write(tmp_path / "v.jsonl", rows, judge=BOTH), samples=50)
    table = cells(capsys.readouterr().out)
    assert table["win rate, %"][0] == f"{100 * (0.6 + 0.5 + 0.2) / 3:.2f}"
    assert table["discrete win rate, %"][0] == "50.00"
    assert table["prompts left out: 2"][0] == "timeout: 1; judged in one order only: 1"
    # the model first: 0.7, 0.6, 0.3, 1, 1; the baseline first: 1 minus 0.5, 0.4, 0.1
    assert table["preference for the response shown first, %"][0] == f"{100 * (3.6 / 5 + 2 / 3) / 2:.1f}"


def test_lengths_beside_a_difference_are_of_the_same_prompts(tmp_path, capsys) -> None:
    rows = [verdict(i, 0.1 + 0.2 * i) for i in range(4)]
    long = [verdict(4, 0.5, len_model=9000, len_baseline=9000), verdict(5, "timeout", len_model=9000)]
    paths = [write(tmp_path / name, there, model=name) for name, there in (("a", rows + long), ("b", rows))]
    score(*paths, samples=10)
    printed = capsys.readouterr().out.splitlines()
    for name in ("length of the model's responses, characters", "length of the baseline's responses, characters"):
        lines = [line for line in printed if name in line]
        assert len(lines) == 2 and len(set(lines)) == 1, lines


def test_what_the_file_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [verdict(i, 0.1 + 0.2 * i, tokens=None, ended=None) for i in range(4)]
    score(write(tmp_path / "v.jsonl", rows, model="a|b"), samples=10)
    table = cells(capsys.readouterr().out)
    assert table["length of the model's responses, tokens"][0] == "n/a"
    assert table["responses that ended by themselves, %"][0] == "n/a"
    assert r"a\|b" in table
    assert table["prompts left out: 0"][0] == "none"


def test_no_length_control_is_no_reason_to_hide_the_win_rate(tmp_path, capsys) -> None:
    path = write(tmp_path / "v.jsonl", [verdict(i, 1.0) for i in range(4)])
    score(path, against=path, samples=10)
    printed = capsys.readouterr().out
    assert cells(printed)[f"{NAME}, %"] == ["n/a"] * 3
    assert cells(printed)["win rate, %"] == ["+0.00", "0.00", "+0.00 to +0.00"]  # the last: of the difference
    assert f"no {NAME}: no finite solution" in printed
    assert "| win rate, % | 100.00 |" in printed


def two_models(folder: Path, **header: Any) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    ours = [verdict(i, round(p, 3)) for i, p in enumerate(rng.uniform(size=12))]
    theirs = [replace(v, preference=0.9 * v.preference, len_model=80 + 11 * v.index) for v in ours[2:]]
    theirs[-1] = replace(theirs[-1], preference=None, failed="timeout")
    a = write(folder / "a.jsonl", ours)
    return a, write(folder / "b.jsonl", theirs, prompts=12, **({"model": "other", "outputs": "1e"} | header))


def test_two_models_over_the_prompts_that_both_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_models(tmp_path)
    score(a, against=b, samples=100, seed=4)
    printed = capsys.readouterr().out
    assert "against gpt, 9 prompts" in cells(printed)
    assert [line.strip("| ") for line in printed.splitlines() if line.endswith("|  |  |  |")] == [
        *("ours", "other", "ours minus other")
    ]
    ours, theirs, difference = map(cells, re.split(r"\| ours.*\|  \|  \|  \||\| other \|.*", printed)[1:])
    assert "prompts left out: 0" in ours
    assert theirs["prompts left out: 3"][0] == "not judged yet: 2; timeout: 1"
    shared = [verdict.preference for verdict in read_verdicts(a)[1][2:11]]
    value, error, _ = ours["win rate, %"]
    assert float(value) == pytest.approx(100 * np.mean(shared), abs=0.01)
    assert float(difference["win rate, %"][0]) == pytest.approx(10 * np.mean(shared), abs=0.01)
    assert float(difference["win rate, %"][1]) < 0.2 * float(error)
    rates = [float(rows[f"{NAME}, %"][0]) for rows in (ours, theirs, difference)]
    low, high = map(float, difference[f"{NAME}, %"][2].split(" to "))
    assert rates[2] == pytest.approx(rates[0] - rates[1], abs=0.02) and low < rates[2] < high
    score(a, against=b, samples=100, seed=4)
    assert capsys.readouterr().out == printed


def test_differently_judged_models_are_refused(tmp_path: Path) -> None:
    for header, differs in (
        ({"baseline": "davinci"}, "differ in baseline: gpt there, davinci here: judge both models alike"),
        ({"judge": {"model": "k", "seed": 0}}, "judge.model: j there, k here"),
        ({"judge": {"model": "j", "order": "random"}}, "judge.seed: 0 there, None here; judge.order: None there"),
    ):
        a, b = two_models(tmp_path, **header)
        with pytest.raises(InputError, match=re.escape(differs)):
            score(a, against=b)


def test_other_instructions_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [verdict(i, 0.5) for i in range(4)])
    b = write(tmp_path / "b.jsonl", [verdict(i, 0.5, len_baseline=120 + 3 * (3 - i)) for i in range(4)])
    with pytest.raises(InputError, match=r"the instructions or their order \(first: index 0\): judge both"):
        score(a, against=b)
    b = write(tmp_path / "b.jsonl", [verdict(i, 0.5) for i in range(3, 7)])
    with pytest.raises(InputError, match="1 judged prompts in common: need two"):
        score(a, against=b)


def test_too_few_verdicts(tmp_path: Path) -> None:
    path = write(tmp_path / "v.jsonl", [verdict(0, 0.5), verdict(1, "HTTP 500: oh")])
    with pytest.raises(InputError, match=r"1 judged prompts \(left out: {'HTTP 500': 1}\): judge at least two"):
        score(path)
    # a judge that was stopped when it had asked no prompt twice: no verdict says that half is missing
    path = write(tmp_path / "half.jsonl", [verdict(i, 0.8) for i in range(5)], judge=BOTH)
    with pytest.raises(InputError, match=r"0 judged prompts .*judged in one order only': 5"):
        score(path)
    with pytest.raises(InputError, match="no verdicts file"):
        score(str(tmp_path / "none.jsonl"))


def verdicts_with_gamed(folder: Path) -> tuple[str, str]:
    """A verdicts file of 6 prompts, and a CSV file as AlpacaEval's df_gamed.csv is: each index twice."""
    rng = np.random.default_rng(1)
    path = folder / "df_gamed.csv"
    lines = [f"{i % 6},m{i // 6},{rng.uniform():.4f},{rng.normal():.4f},{i % 6 / 3 - 1:.4f},False" for i in range(12)]
    path.write_text(GAMED + "\n".join(lines) + "\n5,m2,,0.1,0.6667,False\n")
    return write(folder / "v.jsonl", [verdict(i, p) for i, p in enumerate([0.9, 0.5, 0.2, 0.4, 0.7, 0.6])]), str(path)


def test_difficulty_and_gamed_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts, gamed = verdicts_with_gamed(tmp_path)
    difficulty = tmp_path / "instruction_difficulty.csv"  # the first column of AlpacaEval's has no name
    difficulty.write_text("\ufeff,instruction_difficulty\n" + "".join(f"{i},{i / 3 - 1:.4f}\n" for i in range(805)))
    tables = []
    for options in ({"difficulty": str(difficulty)}, {"gamed": gamed}, {"difficulty": gamed, "gamed": gamed}):
        score(verdicts, samples=10, **options)
        tables.append(cells(capsys.readouterr().out))
    assert "length-controlled win rate without gamed baselines, %" in tables[0]
    assert "length-controlled win rate without instruction difficulty, %" in tables[1]
    score(verdicts, samples=10, difficulty=str(difficulty), gamed=gamed)
    assert cells(capsys.readouterr().out) == tables[2]
    assert "length-controlled win rate, %" in tables[2]


def test_bad_files_of_difficulties(tmp_path: Path) -> None:
    (verdicts, _), path = verdicts_with_gamed(tmp_path), tmp_path / "bad.csv"
    head = "index,instruction_difficulty\n"
    for option, content, refusal in (
        ("gamed", None, "cannot be read"),
        ("difficulty", "index,difficulty\n0,1\n", "lacks the column instruction_difficulty; it has index, difficulty"),
        ("difficulty", head + "0,1\n1,2\n", "no difficulty for 4 prompts (first: index 2)"),
        ("difficulty", head + "0,1\n0,2\n", "row 2: index 0 needs one finite"),
        ("difficulty", head + "0,x\n", "row 1: index, instruction_difficulty should be numbers"),
        ("difficulty", head + "0\n", "row 1: cannot be read: ValueError: 1 values"),
        ("difficulty", head + "0,\n", "row 1: index 0 needs one finite"),
        ("gamed", GAMED + "0,m,1.5,0,0,False\n", "each preference from 0 to 1"),
        ("gamed", GAMED + "0,m,0.5,0,0,2\n", "each preference from 0 to 1"),
        ("gamed", GAMED + "0,m,,0,0,False\n", "on at least one row"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=re.escape(refusal)):
            score(verdicts, **{option: str(path)})
