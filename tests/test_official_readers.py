"""AlpacaEval 0.6.6's own code, offline: it reads our files, and computes the win rates that we compute."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from test_cli import in_process
from test_responses import responses

from mixdpo.evaluation.win_rate import (
    read_difficulties,
    read_gamed,
    resampled_length_controlled,
    resampled_win_rates,
    standard_error_of_mean,
)

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.filterwarnings("ignore")  # it is of 2025, what it imports is newer
COLUMNS = ["dataset", "instruction", "output", "generator", "tokens", "ended"]
RESPONSES = {  # instruction: (ours, the baseline's); with what a reader of JSON or of templates could trip over
    "Name a fruit.": ("An apple, or {output_2}.", "Fig."),
    'Say "ß" | twice,\nplease': ("ß ß 🙂", "I would rather say it three times: ß ß ß"),
    "2024-01-02": ("", "A day."),
    "123": ("007", "1.50 and more"),
}


@pytest.fixture(scope="module")
def official() -> Iterator[ModuleType]:
    """The package; pkg_resources, which it imports and never uses here, left setuptools with version 82."""
    level, root = logging.getLogger().level, logging.getLogger()
    added = "pkg_resources" not in sys.modules
    sys.modules.setdefault("pkg_resources", ModuleType("pkg_resources"))
    try:
        yield pytest.importorskip("alpaca_eval", reason="alpaca-eval is not installed", exc_type=ImportError)
    finally:
        root.setLevel(level)  # it sets this to INFO
        if added:
            del sys.modules["pkg_resources"]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of a model and a baseline, whose order differs, in AlpacaEval's format, made by hand."""
    paths = [tmp_path / "ours.json", tmp_path / "gpt.json"]
    for path, texts, order in zip(paths, zip(*RESPONSES.values(), strict=True), (1, -1), strict=True):
        values = [("made", *pair, path.stem, len(pair[1]), True) for pair in zip(RESPONSES, texts, strict=True)]
        rows = [dict(zip(COLUMNS, each, strict=True)) for each in values]
        path.write_text(json.dumps(rows[::order], ensure_ascii=False), "utf-8")
    return paths


def assert_official_reads(official: ModuleType, path: Path) -> None:
    """What `alpaca_eval --model_outputs` makes of a file is what the file says, row by row."""
    frame, rows = official.utils.load_or_convert_to_dataframe(path), json.loads(path.read_text("utf-8"))
    assert list(frame.columns) == list(rows[0])
    assert frame.to_dict("records") == rows
    assert official.utils.get_generator_name(None, frame) == rows[0]["generator"]


def test_official_reader_loads_what_predict_writes(official, files, tiny_model, tmp_path) -> None:
    for path in files:
        assert_official_reads(official, path)
    source = tmp_path / "prompts.json"
    source.write_text(json.dumps([{"instruction": i, "dataset": "made"} for i in RESPONSES]))
    assert in_process(*responses("predict", "AlpacaEval", str(source), tmp_path, tiny_model)) == 0
    assert_official_reads(official, tmp_path / "tiny.json")
    rows = json.loads((tmp_path / "tiny.json").read_text("utf-8"))
    assert [row["instruction"] for row in rows] == list(RESPONSES) and list(rows[0]) == COLUMNS


def test_official_evaluation_of_our_files(official, files, tmp_path, monkeypatch) -> None:
    """`alpaca_eval` from files to leaderboard, but for the model behind the judge: the longer response wins."""
    shown: list[tuple[str, ...]] = []

    def longer(prompts: Sequence[str], **_: Any) -> dict[str, list[Any]]:
        shown.extend(tuple(prompt.split("<->")) for prompt in prompts)
        wins = ["first" if len(first) > len(second) else "second" for _, first, second in shown[-len(prompts) :]]
        return {"completions": wins, **{f"{what}_per_example": [0.0] * len(wins) for what in ("price", "time")}}

    folder = tmp_path / "annotators" / "longer"
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text("{instruction}<->{output_1}<->{output_2}")
    parser = "fn_completion_parser: regex_parser, completion_parser_kwargs: {outputs_to_match: {1: first, 2: second}}"
    (folder / "configs.yaml").write_text(f"longer: {{prompt_template: longer/prompt.txt, {parser}}}")
    monkeypatch.setattr("alpaca_eval.annotators.base.get_fn_completions", lambda _: longer)
    monkeypatch.setattr("alpaca_eval.utils.get_multi_package_version", lambda *_: "")

    model, baseline = files
    options = dict.fromkeys(("precomputed_leaderboard", "output_path", "caching_path"))
    options |= {"fn_metric": "get_winrate", "sort_by": "win_rate", "is_return_instead_of_print": True}
    leaderboard, annotations = official.evaluate(model, baseline, annotators_config=folder, **options)
    assert leaderboard.loc["ours", ["n_total", "n_wins", "n_wins_base", "n_draws"]].tolist() == [4, 1, 3, 0]
    assert leaderboard.loc["ours", "avg_length"] == int(np.mean([len(ours) for ours, _ in RESPONSES.values()]))
    found = {row["instruction"]: (row["output_2"], row["output_1"], row["preference"]) for row in annotations}
    assert found == {i: (*pair, 2.0 if len(pair[0]) > len(pair[1]) else 1.0) for i, pair in RESPONSES.items()}
    assert {(row["generator_1"], row["generator_2"]) for row in annotations} == {("gpt", "ours")}


@pytest.mark.parametrize("preferences", [[1.0, 1.2, 1.9], [0.0, 1.5, 2.0], [1.5 - 2**-52, 1.5 + 2**-52, 1.5, 1.0]])
def test_official_win_rates_are_ours(official: ModuleType, preferences: list[float]) -> None:
    theirs = official.metrics.get_winrate([{"preference": p} for p in preferences])
    ours = [0.5 if p == 0 else p - 1 for p in preferences]  # 0 was its draw once
    rates = [*(rate.mean for rate in resampled_win_rates(ours, samples=2)), standard_error_of_mean(ours)]
    names = ("win_rate", "discrete_win_rate", "standard_error")
    assert rates == pytest.approx([theirs[name] for name in names], abs=1e-12)


@pytest.mark.shared
@pytest.mark.parametrize("model", ["NullModel", "alpaca-7b", "gpt-3.5-turbo-1106_verbose"])
def test_official_length_controlled_win_rate_is_ours(official, model, monkeypatch) -> None:
    """But for its L1 penalty and cross-validation: about 0.1 points."""
    folder = SHARED / "lc"
    gamed = str(folder / "df_gamed_reconstructed.csv")
    monkeypatch.setattr("alpaca_eval.metrics.glm_winrate.hf_hub_download", lambda **_: gamed)
    rows = pd.read_csv(folder / "annotations.csv").query("model == @model").reset_index(drop=True)
    texts = {f"output_{i}": ["x" * length for length in rows[name]] for i, name in ((1, "len_ref"), (2, "len_model"))}
    annotations = rows[["preference", "index"]].assign(**texts, generator_1="gpt", generator_2=model)
    theirs = official.metrics.get_length_controlled_winrate(annotations, save_weights_dir=None)
    difficulty = read_difficulties(gamed, rows["index"].tolist())
    preferences = rows["preference"] - 1
    columns = preferences, rows["len_model"], rows["len_ref"], difficulty, read_gamed(gamed)
    _, ours = resampled_length_controlled(*columns, samples=2)
    assert ours.mean == pytest.approx(theirs["length_controlled_winrate"], abs=0.2)
    _, discrete = resampled_win_rates(preferences, samples=2)
    assert discrete.mean == pytest.approx(theirs["discrete_win_rate"], abs=1e-9)
