"""Steps cut by tokens: the fewest micro-batches within the limit, the same updates, exact resume; and the micro-batch
that runs before the first step and leaves nothing behind."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter_weights, build, build_sft, fit, make_pairs, make_samples, same, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from test_faults import SOURCE_ROWS, At, checkpoint, full, run, terminate, whole

from lightning_modules.callbacks.faults import OutOfMemory
from lightning_modules.preference import PreferenceModule
from lightning_modules.qlora import AdapterModule
from lightning_modules.sft import SFTModule
from mixdpo.batches.steps import cut_step, micro_batches_needed
from mixdpo.errors import Stopped
from mixdpo.losses import DPO
from mixdpo.model.adapters import Lora
from mixdpo.routing.route import Routing
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss
from mixdpo.token_cleaning.selection import Selection

__all__ = ["SOURCE_ROWS", "run", "whole"]  # fixtures, and their rows
DROPOUT = {"lora": Lora(rank=4, alpha=8, dropout=0.3)}
SHUFFLED = Routing(hard_fraction=0.4, order="shuffled", reshuffle=True)


@given(st.data(), st.integers(1, 3))
def test_as_few_as_keep_every_micro_batch_of_every_rank_within_the_limit(data: Any, world: int) -> None:
    tokens = data.draw(st.lists(st.integers(1, 30), min_size=20, max_size=20))
    most = data.draw(st.integers(max(tokens), 200))
    steps = data.draw(st.lists(st.lists(st.integers(0, 19), unique=True, min_size=1), min_size=1, max_size=4))

    def heaviest(number: int) -> int:
        ranks = [cut_step(step, tokens, accumulate=number, world=world, rank=r) for step in steps for r in range(world)]
        return max(sum(tokens[i] for i in rows) for rank in ranks for rows, weight, _ in rank if weight)

    needed = next(number for number in range(1, 21) if heaviest(number) <= most)
    assert micro_batches_needed(steps, tokens, most=most, world=world) == needed


@pytest.mark.parametrize(("make", "rows"), [(build, make_pairs(11)), (build_sft, make_samples(11))])
def test_the_updates_are_the_same_for_any_limit(make: Any, rows: Any, tiny_model: str, tmp_path: Path) -> None:
    """Two epochs, of pairs in other orders; the last step has three rows only."""
    source = write_pairs(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any] = {"dtype": "float64", "trainer": {"precision": "64-true", "max_epochs": 2}, "make": make}
    data: dict[str, Any] = {"routing": SHUFFLED} if make is build else {}
    expected = fit(tiny_model, source, tmp_path / "whole", data=data, **options)
    tokens, numbers = expected.trainer.datamodule.row_sizes[0], []
    for most in (max(tokens), sum(tokens)):
        trained = fit(tiny_model, source, tmp_path / str(most), data=data | {"micro_batch_tokens": most}, **options)
        numbers.append(trained.trainer.accumulate_grad_batches)
        for key, value in adapter_weights(trained).items():
            torch.testing.assert_close(value, adapter_weights(expected)[key], rtol=0, atol=1e-10)
        batches = [each for epoch in (0, 1) for each in trained.trainer.datamodule.micro_batches(epoch)]
        loads = [sum(tokens[i] for i in rows) for rows, _, _ in batches]
        assert max(loads) == trained.trainer.datamodule.cut["heaviest"] <= most and len(loads) == 6 * numbers[-1]
    assert numbers[0] > numbers[1] == 1


def test_the_plan_says_how_the_steps_are_cut(tiny_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of four and of one pair: where two micro-batches are needed, one of four is filler."""
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(5))
    trainer, module, data = build(tiny_model, source, tmp_path / "run", data={"micro_batch_tokens": 1000})
    trainer.fit(module, data)
    tokens = data.row_sizes[0]
    loads = [sum(tokens[i] for i in rows) for rows, _, _ in data.micro_batches()]
    written = json.loads((tmp_path / "run/route.json").read_text())
    assert written["micro_batches"] == {"a_step": 1, "limit": 1000, "heaviest": max(loads), "filler": 0}
    assert f"into 1 micro-batches of at most 1000 tokens (the heaviest has {max(loads)}); 0.0% of" in caplog.text
    module = fit(tiny_model, source, tmp_path / "two", data={"micro_batch_tokens": max(loads) - 1})
    written = json.loads((tmp_path / "two/route.json").read_text())["micro_batches"]
    assert (written["a_step"], written["filler"]) == (2, 0.25) and "25.0% of them are empty" in caplog.text
    assert torch.load(checkpoint(tmp_path / "two"), weights_only=True)["PreferenceDataModule"]["cut"] == written
    module.trainer.datamodule.setup("fit")  # a second fit is not refused for the number of the first
    plain = fit(tiny_model, source, tmp_path / "plain", data={"micro_batch_tokens": "auto"}, trainer={"max_steps": 1})
    assert not plain.trainer.datamodule.cut and plain.trainer.accumulate_grad_batches == 1  # a CPU
    assert json.loads((tmp_path / "plain/route.json").read_text())["micro_batches"] is None


def test_prompts_that_are_not_shared_count_twice(tiny_model: str, source: str, tmp_path: Path) -> None:
    for share in (True, False):
        data = {"share_prompt": share, "routing": SHUFFLED}
        module = fit(tiny_model, source, tmp_path / str(share), data=data, trainer={"max_steps": 1})
        loader = module.trainer.datamodule.train_dataloader()
        for rows, _, _ in loader.plan:
            tokens = sum(module.trainer.datamodule.row_sizes[0][i] for i in rows)
            # the last token of a document predicts nothing, and is not computed
            assert 0 <= tokens - loader.collator((rows, 1.0, 4)).rows.tokens <= 2 * len(rows)


def test_a_run_cut_by_tokens_is_continued_exactly(run: Any, whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Stopped by a signal in the third step, and continued with the heaviest micro-batch before the next one."""
    options: dict[str, Any] = {"data": {"micro_batch_tokens": 70, "routing": SHUFFLED}, "trainer": {"max_epochs": 2}}
    expected = whole(**options, **DROPOUT)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", At(2, terminate), **options, **DROPOUT)
    monkeypatch.setattr(PreferenceModule, "on_gpu", True)
    assert same(run(tmp_path / "rest", after=tmp_path / "cut", **options, **DROPOUT), expected)
    assert expected.trainer.accumulate_grad_batches > 1


@pytest.mark.parametrize("later", [1000, None])
def test_auto_keeps_the_number_of_the_checkpoint_on_any_card(later, run, tmp_path, monkeypatch) -> None:
    def limited(folder: Path, limit: int | None, **more: Any) -> Any:
        monkeypatch.setattr(AdapterModule, "micro_batch_limit", lambda self, longest: limit)
        return run(folder, data={"micro_batch_tokens": "auto"}, **DROPOUT, **more)

    expected = limited(tmp_path / "whole", 70)
    limited(tmp_path / "cut", 70, trainer={"max_steps": 2})
    rest = limited(tmp_path / "rest", later, after=tmp_path / "cut")
    assert rest.trainer.accumulate_grad_batches == expected.trainer.accumulate_grad_batches > 1
    assert rest.trainer.datamodule.cut == expected.trainer.datamodule.cut and same(rest, expected)


# Before the first step.
class Remembers:
    """A user's own loss that changes with each call."""

    calls = 0

    def __call__(self, *sides: Any) -> torch.Tensor:
        self.calls += 1
        return DPO()(*sides) * self.calls


CLEANED, ONLINE = Cleaning(Loss("base"), Selection(0.5)), ExcessLoss(worse="policy")
WARMED: list[dict[str, Any]] = [
    {"preference_loss": Remembers(), "data": {"routing": SHUFFLED}, "trainer": {"max_epochs": 2}},
    {"preference_loss": Remembers(), "data": {"routing": Routing(hard_fraction=0.5)}, "cleaning": CLEANED},
    {"make": build_sft, "cleaning": Cleaning(ONLINE, Selection(0.5, scope="sample"))},
]


@pytest.mark.parametrize("options", WARMED, ids=["pairs", "clean pairs", "clean samples"])
def test_the_first_micro_batch_leaves_nothing_behind(options, tiny_model, tmp_path, monkeypatch) -> None:
    """No random number, no value of the loss or of the row, no cached reference, no weight of cleaned tokens."""
    rows = write_pairs(tmp_path / "rows.jsonl", make_samples(12) if "make" in options else make_pairs(12))
    kind: Any = SFTModule if "make" in options else PreferenceModule
    original, steps = kind.training_step, []

    def watched(self: Any, batch: Any, number: int) -> Any:
        has_gradient = any(p.grad is not None for p in self.learning())
        steps.append((self, batch.rows.tokens, has_gradient or getattr(self, "reference_cache", False)))
        return original(self, batch, number)

    monkeypatch.setattr(kind, "training_step", watched)
    modules, means = [], []
    for on_gpu in (False, True):
        monkeypatch.setattr(kind, "on_gpu", on_gpu)
        trainer = {"first": (OutOfMemory(),), "accumulate_grad_batches": 2, **options.get("trainer", {})}
        steps.clear()
        how = deepcopy({**options, **DROPOUT}) | {"trainer": trainer}
        modules.append(fit(tiny_model, rows, tmp_path / str(on_gpu), **how))
        means.append(torch.load(checkpoint(tmp_path / str(on_gpu)), weights_only=True)["row"]["means"])
    assert same(*modules) and torch.equal(*means)
    (twin, tokens, kept), *others = steps
    assert twin is not modules[1] and not kept and {each for each, *_ in others} == {modules[1]}
    assert not others[0][2] or "make" not in options  # no gradient is left
    assert tokens == max(number for _, number, _ in steps)
    assert len(others) == trainer.get("max_epochs", 1) * len(modules[1].trainer.datamodule.micro_batches())


def test_memory_that_does_not_suffice_is_said_before_the_first_step(run, tmp_path, monkeypatch) -> None:
    """Half of the 100 tokens of a micro-batch; then half of its 50 would be fewer than the 30 of the longest row."""
    monkeypatch.setattr(PreferenceModule, "on_gpu", True)
    monkeypatch.setattr(PreferenceModule, "training_step", full)
    for most, next_one in ((1000, 50), (70, 30)):
        with pytest.raises(torch.OutOfMemoryError) as error:
            run(tmp_path / str(most), data={"micro_batch_tokens": most})
        assert f"data.micro_batch_tokens {next_one} (now {most})" in str(error.value.__notes__)
