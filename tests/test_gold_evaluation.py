"""The gold score before and after training: the table by hand, and the callback around a short run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEMPLATE, WORDS, adapter_weights, build, make_pairs, write_pairs
from lightning.pytorch.callbacks import ModelCheckpoint
from test_scoring import changed_model, plain_model

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.callbacks.gold_evaluation import GoldEvaluation
from lightning_modules.callbacks.logging import Throughput
from lightning_modules.callbacks.run_files import RunFiles
from lightning_modules.preference import PreferenceModule
from mixdpo.errors import InputError
from mixdpo.evaluation import gold, kept_responses
from mixdpo.evaluation.generation import Response
from mixdpo.evaluation.gold import Responses, compare, greedy, markdown
from mixdpo.model.adapters import Lora
from mixdpo.model.loading import load_tokenizer
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant


def responses(scores: Sequence[float], tokens: Sequence[int], ended: Sequence[bool]) -> Responses:
    given = [Response("text", length, end) for length, end in zip(tokens, ended, strict=True)]
    return Responses(given, np.array(scores))


# Seen prompts gain 1 each, so their interval has no width; of the others one gains ½ and one loses ½.
BEFORE = responses([0.0, 0.25, 0.5, 1.0], [10, 20, 30, 64], [True, True, True, False])
AFTER = responses([1.0, 1.25, 1.0, 0.5], [20, 30, 40, 50], [True, True, True, True])
PARTS = ["seen", "seen", "new", "new"]


def test_compare_by_hand() -> None:
    rows = compare(BEFORE, AFTER, PARTS)
    assert list(rows) == [
        *("gold score, all prompts", "gold score, seen", "gold score, new"),
        *("response length, tokens", "ended by itself"),
    ]
    expected = {  # n, before, after, difference
        "gold score, all prompts": (4, 1.75 / 4, 3.75 / 4, 0.5),
        "gold score, seen": (2, 0.125, 1.125, 1.0),
        "gold score, new": (2, 0.75, 0.75, 0.0),
        "response length, tokens": (4, 31.0, 35.0, 4.0),
        "ended by itself": (4, 0.75, 1.0, 0.25),
    }
    for name, values in expected.items():
        assert [rows[name][key] for key in ("n", "before", "after", "difference")] == pytest.approx(values), name
    assert (rows["gold score, seen"]["low"], rows["gold score, seen"]["high"]) == (1.0, 1.0)
    # two resampled differences of ±½: means −½, 0 and ½ with chances ¼, ½ and ¼
    assert (rows["gold score, new"]["low"], rows["gold score, new"]["high"]) == (-0.5, 0.5)
    # four of which one is 1: the mean is 0 in 32 % of the resamples and above ¾ in 0.4 %
    assert (rows["ended by itself"]["low"], rows["ended by itself"]["high"]) == (0.0, 0.75)


def test_compare_without_scores() -> None:
    before, after = (Responses(one.given, np.full(4, np.nan)) for one in (BEFORE, AFTER))
    assert list(compare(before, after, PARTS)) == ["response length, tokens", "ended by itself"]


def test_markdown_by_hand() -> None:
    rows = {
        "gold score, seen": {"n": 2, "before": 0.125, "after": 1.0625, "difference": 0.9375, "low": -0.25, "high": 1.0},
        "response length, tokens": {"n": 2, "before": 31, "after": 28.5, "difference": -2.5, "low": -4, "high": 0.75},
    }
    assert markdown(rows, {"optimizer steps": "7"}).splitlines() == [
        "| held-out prompts | n | before | after | difference [95 % interval] |",
        "|---|---|---|---|---|",
        "| gold score, seen | 2 | 0.125 | 1.062 | +0.938 [-0.250, +1.000] |",
        "| response length, tokens | 2 | 31.0 | 28.5 | -2.5 [-4.0, +0.8] |",
        "",
        "| training and held-out pairs | |",
        "|---|---|",
        "| optimizer steps | 7 |",
    ]


class CountsWord:
    """A scorer from outside the project: how often the response says the row's word."""

    def __call__(self, row: Mapping[str, Any], texts: Sequence[str]) -> list[float]:
        return [float(text.split().count(row["word"])) for text in texts]


def write_prompts(folder: Path) -> str:
    parts = ["even", "odd"] * 3
    rows = [{"prompt": f"{WORDS[i]} {WORDS[-i]} 7", "word": WORDS[0], "part": part} for i, part in enumerate(parts)]
    return write_pairs(folder / "prompts.jsonl", rows)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write_prompts(tmp_path)


def run(model: str, folder: Path, callback: Any, **options: Any) -> tuple[PreferenceModule, dict[str, torch.Tensor]]:
    """A fit with dropout, so that any random number that the evaluation draws would show in the adapter."""
    source, ckpt_path = write_pairs(folder.with_suffix(".jsonl"), make_pairs(12)), options.pop("ckpt_path", None)
    callbacks = [RunFiles(), ExactResume(), Throughput(), *([callback] if callback else [])]
    defaults: dict[str, Any] = {"lora": Lora(rank=4, alpha=8, dropout=0.3), "schedule": Constant(warmup=0.0), "lr": 5.0}
    defaults |= {"data": {"validation": 0.2}, "trainer": {"callbacks": callbacks}}
    trainer, module, data = build(model, source, folder, **{**defaults, **options})
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, adapter_weights(module)


def evaluation(prompts: str, **options: Any) -> GoldEvaluation:
    return GoldEvaluation(prompts, **{"scorer": CountsWord(), "max_new_tokens": 4, "batch_size": 2, **options})


Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def watched(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Weights]]:
    """Runs that start from the adapter of the run `start`: alone, and watched with a dequantised copy and without."""
    folder, weights = tmp_path_factory.mktemp("watched"), {}
    held_out, adapter = write_prompts(folder), str(folder / "start/adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_responses, "cache_root", lambda: folder / "cache")
        run(tiny_model, folder / "start", None)
        _, weights["alone"] = run(tiny_model, folder / "alone", None, adapter=adapter)
        for name, dequantise in (("copy", True), ("as_trained", False)):
            callback = evaluation(held_out, dequantise=dequantise)
            module, weights[name] = run(tiny_model, folder / name, callback, adapter=adapter)
            policy = {name: p.requires_grad for name, p in module.model.named_parameters()}
            assert module.model.training and policy == {name: ".policy." in name for name in policy}
    return folder, weights


def test_files_of_the_run(watched: tuple[Path, dict[str, Weights]]) -> None:
    folder = watched[0] / "copy"
    results, rows = (json.loads((folder / name).read_text()) for name in ("results.json", "responses.json"))
    assert (folder / "results.md").read_text() == markdown(results["heldout_prompts"], results["summary"]) + "\n"
    assert results["summary"]["optimizer steps"] == str(results["steps"]) != "0"
    assert "reward accuracy, 1 easy pairs (longer response wins)" in results["summary"]
    assert [row["part"] for row in rows] == ["even", "odd"] * 3
    for row in rows:
        for when in ("before", "after"):
            assert row[when]["score"] == row[when]["text"].split().count(row["word"])
            assert 1 <= row[when]["tokens"] <= 4 and row[when]["ended"] in (True, False)
    for name, chosen in (("all prompts", rows), ("even", rows[::2]), ("odd", rows[1::2])):
        means = results["heldout_prompts"][f"gold score, {name}"]
        for when in ("before", "after"):
            assert means[when] == pytest.approx(sum(row[when]["score"] for row in chosen) / len(chosen))


@pytest.mark.parametrize("name", ["copy", "as_trained"])
def test_before_is_the_start_and_after_is_the_policy(name, tiny_model, watched) -> None:
    """Before is the adapter that training starts from, neither the bare base nor the trained policy. The run is the one
    without the callback."""
    folder, weights = watched
    prompts = str(folder / "prompts.jsonl")
    expected = {"base": plain_responses(plain_model(tiny_model), prompts, load_tokenizer(tiny_model))}
    expected |= {each: responses_of(tiny_model, folder / each / "adapter", prompts) for each in ("start", name)}
    assert len({tuple(texts) for texts in expected.values()}) == 3, "the three models respond alike: nothing could fail"
    rows = json.loads((folder / name / "responses.json").read_text())
    assert [row["before"]["text"] for row in rows] == expected["start"]
    assert [row["after"]["text"] for row in rows] == expected[name]
    assert all(torch.equal(value, weights[name][key]) for key, value in weights["alone"].items())


def plain_responses(model: Any, prompts: str, tokenizer: Any) -> list[str]:
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    return [each.text for each in greedy(model, tokenizer, rows, max_new_tokens=4, batch_size=2)]


def responses_of(model: str, adapter: Path, prompts: str) -> list[str]:
    from peft import PeftModel

    policy = PeftModel.from_pretrained(plain_model(model), str(adapter))
    return plain_responses(policy, prompts, load_tokenizer(model))


def test_after_is_what_adapter_holds(tiny_model: str, prompts: str, tmp_path: Path) -> None:
    """The best policy where a checkpoint monitors a metric, although RunFiles, which loads it, comes later."""
    best = ModelCheckpoint(monitor="val/all/sft_loss", mode="max", dirpath=tmp_path / "best")  # the first epoch's
    callbacks = [evaluation(prompts), RunFiles(), ExactResume(), Throughput(), best]
    data = {"validation": 0.3, "routing": Routing(hard_fraction=1.0)}
    run(tiny_model, tmp_path / "run", None, data=data, lr=0.5, trainer={"callbacks": callbacks, "max_epochs": 3})
    assert "epoch=0" in best.best_model_path
    rows = json.loads((tmp_path / "run/responses.json").read_text())
    assert [row["after"]["text"] for row in rows] == responses_of(tiny_model, tmp_path / "run/adapter", prompts)
    results = (tmp_path / "run/results.md").read_text()
    assert f"| responses after training | of the best val/all/sft_loss, {best.best_model_score:.4f} |" in results
    # the last validation's, of another policy
    assert "reward accuracy" not in results and "displacement" not in results


def test_before_is_the_start_of_a_continued_run(tiny_model, prompts, tmp_path, monkeypatch) -> None:
    """The reference was refreshed before the checkpoint, which is what its responses would be of."""
    options: dict[str, Any] = {"optimizer": torch.optim.AdamW, "lr": 0.3, "schedule": Constant(warmup=0.0)}

    def trained(name: str, ckpt_path: str | None = None, how: Any = None, **trainer: Any) -> GoldEvaluation:
        first = evaluation(prompts, **(how or {})), RefreshReference(every=1, role="reference")
        callbacks = [*first, RunFiles(), ExactResume(), Throughput(), LastCheckpoint()]
        trainer |= {"callbacks": callbacks, "max_epochs": 2}
        run(tiny_model, tmp_path / name, None, ckpt_path=ckpt_path, trainer=trainer, **options)
        return first[0]

    cut = trained("cut", max_steps=3)
    monkeypatch.setattr("mixdpo.evaluation.kept_responses.cache_root", lambda: tmp_path / "cache")
    checkpoint = str(tmp_path / "cut/checkpoints/last.ckpt")
    rest = trained("rest", checkpoint, {"batch_size": 2, "dequantise": False})  # what memory allows may change
    assert cut.before is not None and rest.before is not None and rest.before.rows() == cut.before.rows()
    steps = [json.loads((tmp_path / name / "results.json").read_text())["steps"] for name in ("cut", "rest")]
    assert steps[0] == 3 < steps[1]
    rows = json.loads((tmp_path / "cut/responses.json").read_text())
    assert any(row["before"]["text"] != row["after"]["text"] for row in rows), "refreshing changed no response"
    write_pairs(Path(prompts), [{"prompt": "other", "word": "red"}])
    with pytest.raises(InputError, match=r"another run.*GoldEvaluation\.prompts: "):
        trained("other", checkpoint)
    with pytest.raises(InputError, match=r"another run.*GoldEvaluation\.max_new_tokens: "):
        trained("longer", checkpoint, {"max_new_tokens": 3})


class TwiceThat(CountsWord):
    def __call__(self, row: Mapping[str, Any], texts: Sequence[str]) -> list[float]:
        return [2 * score for score in super().__call__(row, texts)]


def test_responses_of_the_start_are_kept(tiny_model, prompts, tmp_path, monkeypatch, capsys) -> None:
    """Generated once for runs from the same start; again for whatever they depend on. Scores are never kept."""
    generated: list[int] = []
    count = iter(range(99))

    def greedy(*arguments: Any, **options: Any) -> Any:
        generated.append(1)
        return gold.greedy(*arguments, **options)

    def times(callback: GoldEvaluation, **options: Any) -> int:
        """How often a run of one step generates."""
        generated.clear()
        callbacks = {"callbacks": [RunFiles(), ExactResume(), Throughput(), callback], "max_steps": 1}
        run(options.pop("model", tiny_model), tmp_path / f"run{next(count)}", None, trainer=callbacks, **options)
        return len(generated)

    monkeypatch.setattr("lightning_modules.callbacks.gold_evaluation.greedy", greedy)
    first, second, third = evaluation(prompts), evaluation(prompts), evaluation(prompts, scorer=TwiceThat())
    assert times(first) == 2 and "the responses are kept in" not in capsys.readouterr().out
    assert times(second, lr=1.0, lora=Lora(rank=2)) == 1 and "the responses are kept in" in capsys.readouterr().out
    assert times(third) == 1
    assert first.before is not None and second.before is not None and third.before is not None
    assert first.before.rows() == second.before.rows() and third.before.given == first.before.given
    assert third.before.scores.tolist() == (2 * first.before.scores).tolist()
    for name, other in {"dequantise": False, "max_new_tokens": 3}.items():
        assert times(evaluation(prompts, **{name: other})) == 2, name
    assert times(evaluation(prompts), adapter=str(tmp_path / "run0/adapter")) == 2
    template = tmp_path / "template"
    template.write_text(TEMPLATE.replace("<|im_start|>", "<|im_start|>red "))
    assert times(evaluation(prompts), data={"validation": 0.2, "chat_template": str(template)}) == 2
    assert times(evaluation(prompts), model=changed_model(tiny_model, tmp_path / "changed")) == 2
    assert times(evaluation(prompts)) == 1  # nothing was written over


def test_responses_that_cannot_be_kept_are_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept_responses, "cache_root", lambda: tmp_path / "file")
    responses = [Response("red", 2, True)]
    with pytest.warns(UserWarning, match=rf"responses, {tmp_path}/file/.*, cannot be used .*MIXDPO_CACHE"):
        assert kept_responses.kept_responses({}, lambda: responses) == responses


def test_kept_responses_depend_on_the_code_and_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def times() -> int:
        """How often they have been generated."""
        kept_responses.kept_responses({}, lambda: made.append(1) or [])  # type: ignore[func-returns-value]
        return len(made)

    assert [times(), times()] == [1, 1]
    (tmp_path / "other.py").touch()
    for count, module in enumerate(("generation", "export", "tokenization"), 2):
        with monkeypatch.context() as patch:
            patch.setattr(kept_responses, module, SimpleNamespace(__file__=tmp_path / "other.py"))
            assert times() == count, module
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for card, count in (("A", 5), ("B", 6), ("A", 6)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=card: card)
        assert times() == count
