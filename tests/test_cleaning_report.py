"""The page that shows what token cleaning cut."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value, load_from_disk
from test_columns import byte_tokenizer

from mixdpo.__main__ import main
from mixdpo.batches.token_pool import TokenPool
from mixdpo.errors import InputError
from mixdpo.evaluation.cleaning_page import _response
from mixdpo.model.loading import load_tokenizer
from mixdpo.token_cleaning.run_tokens import RunTokens, ScoredStage, export_labels, read_cleaning

NAN = float("nan")
PROMPT = "<|im_start|> user red blue <|im_end|> <|im_start|> assistant"
SOURCES = ["gsm", "<b>dolly</b>", "gsm", "<b>dolly</b>", "gsm", "gsm"]
LENGTHS = [3, 5, 40, 4, 2, 3]  # of the responses
TWO_TURNS = 3  # the sample whose response is in two turns, of 1 and 3 tokens
STAGES = [(0, 2, None), (1, 2, 0.5), (2, 1, -0.25)]  # stage, samples, threshold; the last sample is never reached


def pool_of(rows: list[dict[str, Any]], identity: dict[str, str]) -> TokenPool:
    number, ids = Value("int64"), [Value("int32")]
    features = {"sample_id": number, "row": number, "source": Value("string"), "input_ids": ids, "spans": ids}
    features["response_weights"] = [Value("float32")]
    return TokenPool.of(Dataset.from_list(rows, features=Features(features)), identity)


def stage_entry(stage: int, tokens: int, samples: int, threshold: float | None) -> dict[str, Any]:
    scored = threshold is not None
    return {
        **{"stage": stage, "step": 10 * stage, "samples": samples, "tokens": tokens, "threshold": threshold},
        **{"scorer": "ExcessLoss(worse='base')" if scored else None, "selection": "Selection()" if scored else None},
        **{"kept_tokens": tokens, "kept_share": 0.625 if scored else 1.0},
        **{"samples_keeping_nothing": 0, "mean_abs_score": 0.4321 if scored else None},
        **{"by_source": {"gsm": {"tokens": tokens, "kept_share": 0.375}}},
    }


def write_run(folder: Path, tokenizer_folder: str, order: Any = None, words: str = "tea sun moon cat dog") -> str:
    """Warm-up on two samples, two scored stages; scores alternate about the threshold, and those below are cut.

    Responses repeat `words` and end with the end token; in the file the samples lie in `order`.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    prompt, word_ids = (tokenizer(text)["input_ids"] for text in (PROMPT, words))
    rows, scores, weights = [], [], []
    stage_of = [stage for stage, count, _ in STAGES for _ in range(count)] + [-1]
    for n in order or range(len(LENGTHS)):
        length, threshold = LENGTHS[n], STAGES[stage_of[n]][2] if stage_of[n] >= 0 else None
        response = [*(word_ids[i % len(word_ids)] for i in range(length - 1)), tokenizer.eos_token_id]
        ids, spans = prompt + response, [len(prompt), len(prompt) + length]
        if n == TWO_TURNS:
            ids, spans = prompt + response[:1] + prompt + response[1:], [len(prompt), len(prompt) + 1]
            spans += [2 * len(prompt) + 1, len(ids)]
        row = {"sample_id": n, "row": n, "source": SOURCES[n], "input_ids": ids, "spans": spans}
        rows.append(row | {"response_weights": [1.0] * (len(spans) // 2)})
        signs = [1 if i % 2 == 0 else -1 for i in range(length)]
        scores += [NAN if threshold is None else threshold + 0.1 * sign for sign in signs]
        weights += [float(threshold is None or sign > 0) if stage_of[n] >= 0 else NAN for sign in signs]
    pool = pool_of(rows, {"data": "d&1"})
    first = np.cumsum([0, *(count for _, count, _ in STAGES)])
    stages = [stage_entry(s, sum(LENGTHS[first[s] : first[s + 1]]), count, cut) for s, count, cut in STAGES]
    decided = np.array([stage_of[row["sample_id"]] for row in rows], dtype=np.int16)
    arrays = np.array([scores, weights], dtype=np.float32)
    run = RunTokens(pool, pool.identity, tokenizer_folder, *arrays, decided, stages)
    run.write_samples(folder / "cleaning")
    run.write(folder / "cleaning")
    return str(folder)


class Page:
    """Spans of tokens and texts of cells; nothing is loaded from outside."""

    def __init__(self, text: str) -> None:
        spans = re.findall(r'<span class="(token[^"]*)" style="([^"]*)" title="([^"]*)">([^<]*)</span>', text)
        keys = ("class", "style", "title", "text")
        self.tokens = [dict(zip(keys, map(unescape, span), strict=True)) for span in spans]
        self.cells = [
            unescape(re.sub("<.*", "", cell)) for cell in re.findall(r"<(?:td|th|h3)>(.*?)</(?:td|th|h3)>", text)
        ]
        assert not re.search(r"<(script|link|img|iframe)|\s(src|href)=", text)


@pytest.fixture
def run(tmp_path: Path, tiny_model: str) -> str:
    return write_run(tmp_path / "a & b", tiny_model)


def page_of(run: str, *options: str) -> tuple[Page, str]:
    assert main(["report", run, *options]) == 0
    text = Path(run, "report.html").read_text("utf-8")
    return Page(text), text


def test_the_whole_page(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    page, text = page_of(run)
    assert f"wrote {run}/report.html" in capsys.readouterr().out
    assert "<h1>a &amp; b</h1>" in text and "data: d&amp;1" in text
    assert "<b>dolly" not in text and "&lt;b&gt;dolly&lt;/b&gt;" in text
    titles = [cell for cell in page.cells if cell.startswith("Stage ")]
    assert titles == ["Stage 1, from step 10", "Stage 2, from step 20"]
    assert {"0: all tokens", "62.5%", "0.432", "37.5%", "–"} <= set(page.cells)
    # 3 + 5 warm-up tokens, 40 / 2 + 4 / 2 + 2 / 2 kept, 3 of 57 never reached
    assert "6 samples with 57 response tokens; training has reached 54 of these and kept 31 (57.4%)" in text
    assert sorted(path.name for path in Path(run).iterdir()) == ["cleaning", "report.html"]
    # the two of the warm-up keep their ends, the three of an even length do not
    assert "the last token of 3 of 5 responses was cut" in text
    # samples 3 and 4 are short, 2 has 40 tokens; each alternates 0.1 above and below its stage's threshold
    assert len(page.tokens) == 40 + 4 + 2 and text.count("response tokens, 50% kept") == 3
    high, low = page.tokens[0], page.tokens[1]
    assert high["text"] == " tea" and low["text"] == " sun"
    assert high["title"].splitlines() == ["' tea'", "score 0.6, weight 1"]
    assert low["title"].splitlines() == ["' sun'", "score 0.4, weight 0"]
    assert high["class"] == "token" and low["class"] == "token dropped"
    # 0.1 is also the 95 % quantile of the distances, so both have their full colour
    mix = "background:color-mix(in srgb, var(--{}) {}%, var(--paper))".format
    assert high["style"] == mix("blue", 100.0) and low["style"] == mix("orange", 100.0)
    last = page.tokens[39]
    assert last["class"] == "token dropped" and last["title"].endswith("weight 0")
    assert page.tokens[-2]["title"].endswith("score -0.15, weight 1")
    turns = [(token["text"], token["title"].splitlines()[1]) for token in page.tokens[40:44]]
    labels = ["score 0.6, weight 1", "score 0.4, weight 0", "score 0.6, weight 1", "score 0.4, weight 0"]
    assert turns == list(zip([" tea", " sun", " moon", " <|im_end|>"], labels, strict=True))
    assert text.count("red blue") == 4  # the two turns have a prompt each


def test_whatever_a_file_holds_is_escaped(run: str) -> None:
    path, script = Path(run, "cleaning", "stages.json"), "<script>alert(1)</script>"
    text = re.sub(r"ExcessLoss[^\"]*|Selection\(\)|gsm", script, path.read_text())
    path.write_text(text.replace('"stage": 1', f'"stage": "{script}"'))
    assert page_of(run)[1].count("&lt;script&gt;") >= 9


def test_a_score_at_the_threshold_is_white_and_half_way_is_pale(tiny_model: str) -> None:
    stage, scores = ScoredStage({}, np.array([]), centre=0.5, reach=0.2), [0.5, 0.9, -9, 0.6, NAN]
    pieces = _response(load_tokenizer(tiny_model), [6] * 5, [(score, 1.0) for score in scores], stage)
    assert [piece["strength"] for piece in pieces] == pytest.approx([0, 1, -1, 0.5, NAN], nan_ok=True)


def test_samples_of_a_stage_may_lie_anywhere(tmp_path: Path, tiny_model: str) -> None:
    run = write_run(tmp_path / "run", tiny_model, order=[4, 2, 5, 0, 3, 1])
    page, _ = page_of(run)
    assert len(page.tokens) == 40 + 4 + 2
    cleaning = read_cleaning(run)
    stages = cleaning.scored_stages()
    assert [stage.samples.tolist() for stage in stages] == [[1, 4], [0]]
    assert [(stage.centre, stage.reach) for stage in stages] == [(0.5, pytest.approx(0.1)), (-0.25, pytest.approx(0.1))]
    examples = [(index, stage.summary["stage"]) for index, stage in cleaning.examples(9, seed=0)]
    assert examples == [(1, 1), (4, 1), (0, 2)]
    assert {len(cleaning.examples(2, seed)) for seed in range(5)} == {2}


def test_options(run: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    assert main(["report", run, "--samples", "1", "--out", str(out), "--seed", "3"]) == 0
    assert out.read_text("utf-8").count("response tokens, ") == 1 and not Path(run, "report.html").exists()


def test_without_scores(run: str) -> None:
    """As with weights from an earlier run; and where there was a warm-up only."""
    np.save(Path(run, "cleaning", "scores.npy"), np.full(57, np.nan, dtype=np.float32))
    page, text = page_of(run)
    assert not page.tokens and "No scored sample is shown" in text
    path = Path(run, "cleaning", "stages.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"stages": record["stages"][:1]}))
    page, text = page_of(run)
    assert not page.tokens and "No scored sample is shown" in text


def test_line_breaks_markup_and_split_characters_on_the_page(tmp_path: Path) -> None:
    folder = str(tmp_path / "bytes")
    byte_tokenizer().save_pretrained(folder)
    page, text = page_of(write_run(tmp_path / "run", folder, words="a\n<i>&é"))
    assert [token["text"] for token in page.tokens[:7]] == ["a", "↵\n", "<", "i", ">", "&", "é"]
    assert "&lt;</span>" in text and "&amp;</span>" in text
    split = page.tokens[6]  # scores 0.6 and 0.4 about 0.5, the second of the two tokens is cut
    assert re.findall(r"score (\S+), weight (\S+)", split["title"]) == [("0.6", "1"), ("0.4", "0")]
    assert split["class"] == "token dropped" and " 0.0%, var(--paper)" in split["style"]
    assert [token["text"] for token in page.tokens[30:35]] == ["<", "i", ">", "&", "▯"]  # 39 bytes of five times 8


# Cleaned labels as a data set: -100 where nothing is trained on, weights aligned with the tokens.
SAMPLES = [
    {"source": "gsm", "row": 5, "input_ids": [6, 7, 8, 9, 3], "spans": [2, 5], "response_weights": [1]},
    {"source": "dolly", "row": 6, "input_ids": [6, 10, 11, 12], "spans": [1, 4], "response_weights": [1]},
    {"source": "gsm", "row": 9, "input_ids": [6, 13, 3, 7, 14, 15, 3], "spans": [1, 3, 4, 7]},
]  # the second is never reached, the third has two turns
SAMPLES[2]["response_weights"] = [1, 0.25]
WEIGHTS = [1, 0, 1, NAN, NAN, NAN, 0.5, 0, NAN, 2, 0]


def write_weights(folder: Path, weights: list[float] = WEIGHTS) -> str:
    rows = [sample | {"sample_id": 100 + n} for n, sample in enumerate(SAMPLES)]
    pool = pool_of(rows, {"data": "d1", "model": "m1"})
    run = RunTokens.undecided(pool, pool.identity, "any")
    run.weights = np.array(weights, dtype=np.float32)
    run.write_samples(folder / "cleaning")
    run.write(folder / "cleaning")
    return str(folder)


def test_labels_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_weights(tmp_path / "run"), tmp_path / "deep" / "labels"
    assert main(["export-labels", run, str(out)]) == 0
    exported = load_from_disk(str(out))
    columns = {name: exported[name][:] for name in exported.column_names}
    assert columns == {
        "sample_id": [100, 102],
        "source": ["gsm", "gsm"],
        "input_ids": [[6, 7, 8, 9, 3], [6, 13, 3, 7, 14, 15, 3]],
        "labels": [[-100, -100, 8, -100, 3], [-100, 13, -100, -100, -100, 15, -100]],
        "weights": [[0, 0, 1, 0, 1], [0, 0.5, 0, 0, 0, 0.5, 0]],  # 2 × the data's 0.25
    }
    types = {name: feature.feature.dtype for name, feature in exported.features.items() if hasattr(feature, "feature")}
    assert types == {"input_ids": "int32", "labels": "int64", "weights": "float32"}
    origin = {"identity": read_cleaning(run).identity, "tokenizer": "any", "run": run}
    assert json.loads((out / "identity.json").read_text()) == origin
    printed = capsys.readouterr().out
    assert "2 samples, 4 of 11 response tokens have a label; left out 1 samples" in printed


def test_a_run_that_trained_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 3 samples"):
        export_labels(write_weights(tmp_path / "run", [NAN] * 11), str(tmp_path / "labels"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(InputError, match="exists"):  # which is never replaced
        export_labels(str(tmp_path / "run"), str(tmp_path / "run"))
