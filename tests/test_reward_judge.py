"""A reward model as a judge: the sigmoid of the difference of its scores."""

import json

import pytest
import torch
from conftest import WORDS
from test_signals import classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mixdpo.errors import InputError
from mixdpo.evaluation.judge import judge
from mixdpo.evaluation.verdicts import read_verdicts


@pytest.fixture
def judging(tiny_model, tmp_path):
    """Options of `judge`; 5 prompts, the last one's baseline too long for the reward model's 256 positions."""
    for who, shift in (("model", 0), ("baseline", 7)):
        texts = [" ".join(WORDS[i + shift : i + shift + 3]) for i in range(5)]
        texts[4] *= 200 if who == "baseline" else 1
        rows = [{"instruction": WORDS[i], "output": text, "generator": who} for i, text in enumerate(texts)]
        (tmp_path / f"{who}.json").write_text(json.dumps(rows))
    model = classifier(tmp_path / "reward", tiny_model, "llama", 1)
    files = {"responses": str(tmp_path / "model.json"), "baseline": str(tmp_path / "baseline.json")}
    return {**files, "model": model, "reward_model": True, "out": str(tmp_path / "verdicts.jsonl")}


def score(name: str, row: dict[str, str]) -> float:
    tokenizer = AutoTokenizer.from_pretrained(name)
    roles = {"user": row["instruction"], "assistant": row["output"]}
    chat = [{"role": role, "content": content} for role, content in roles.items()]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False).strip(), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return float(AutoModelForSequenceClassification.from_pretrained(name).eval()(torch.tensor([ids])).logits.item())


def test_preference_is_the_sigmoid_of_the_difference(judging, tmp_path, capsys):
    assert judge(**judging, limit=2) == 0
    assert judge(**judging) == 1
    file = read_verdicts(tmp_path / "verdicts.jsonl")
    assert file.header["judge"]["kind"] == "reward model" and "order" not in file.header["judge"]
    rows = {who: json.loads((tmp_path / f"{who}.json").read_text()) for who in ("model", "baseline")}
    assert [verdict.index for verdict in file.verdicts] == list(range(5))
    for verdict in file.verdicts[:4]:
        scores = [score(judging["model"], rows[who][verdict.index]) for who in ("model", "baseline")]
        expected = torch.tensor(scores[0] - scores[1], dtype=torch.float64).sigmoid().item()
        assert verdict.preference == pytest.approx(expected, rel=1e-4)
        assert (verdict.source, verdict.order, verdict.judge_prompt_tokens) == ("reward_model", "model_first", None)
    assert file.verdicts[4].failed.startswith("too long: ") and "reads 256" in file.verdicts[4].failed
    printed = capsys.readouterr().out
    assert "has 2 of the 5 verdicts" in printed and "judged 4 of 5, failed 1" in printed
    assert "position bias" not in printed


def test_another_reward_model_is_another_judgement(judging, tiny_model, tmp_path):
    judge(**judging, limit=1)
    model = AutoModelForSequenceClassification.from_pretrained(judging["model"])
    model.score.weight.data.mul_(2)
    model.save_pretrained(judging["model"])
    with pytest.raises(InputError, match="weights: "):
        judge(**judging)
    with pytest.raises(InputError, match="no reward model"):
        judge(**(judging | {"model": tiny_model}))
