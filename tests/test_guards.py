"""What mutants and reviews showed that no other test would notice."""

from pathlib import Path

import pytest
from conftest import build, fit, make_pairs, same, write_pairs

from lightning_modules.preference import PreferenceModule
from mixdpo.data.encoding import encode_rows
from mixdpo.data.pairs import read_pairs
from mixdpo.errors import InputError
from mixdpo.model.loading import load_base, load_tokenizer
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant


def test_margins_arrive_beside_their_ids(tiny_model: str, tmp_path: Path) -> None:
    """From the file's rows to the encoded data, each pair with its own margin."""
    rows = make_pairs(9)
    pairs = read_pairs(write_pairs(tmp_path / "pairs.jsonl", rows)).dataset
    tokenizer = load_tokenizer(tiny_model)
    encoded, _ = encode_rows(pairs, tokenizer, max_length=64, max_prompt_length=32)
    assert list(encoded["margin"]) == [row["margin"] for row in rows]
    assert list(encoded["pair_id"]) == list(pairs["pair_id"]) and len(set(encoded["pair_id"])) == 9
    for ids, row in zip(encoded["chosen_ids"], rows, strict=True):
        assert tokenizer.decode(ids) == f"{row['chosen']} <|im_end|>"


def test_resume_when_the_loader_is_built_early(tiny_model, tmp_path, monkeypatch) -> None:
    """Who reads `estimated_stepping_batches` builds the loader before Lightning has its state, and then Lightning never
    restores it: the position must come from the data module. 5 steps, stopped after 2."""
    real = PreferenceModule.configure_optimizers
    early = lambda self: (self.trainer.estimated_stepping_batches, real(self))[1]  # noqa: E731
    monkeypatch.setattr(PreferenceModule, "configure_optimizers", early)
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(20))
    constant = Constant(warmup=0.0)  # the same rates for 2 steps as for 5
    whole = fit(tiny_model, source, tmp_path / "whole", schedule=constant)
    fit(tiny_model, source, tmp_path / "cut", trainer={"max_steps": 2}, schedule=constant)
    checkpoint = str(tmp_path / "cut" / "checkpoints" / "last.ckpt")
    resumed = fit(tiny_model, source, tmp_path / "rest", ckpt_path=checkpoint, schedule=constant)
    assert resumed.trainer.global_step == whole.trainer.global_step == 5 and same(resumed, whole)
    with pytest.raises(InputError, match="accumulate_grad_batches"):
        other = {"accumulate_grad_batches": 2}
        fit(tiny_model, source, tmp_path / "other", ckpt_path=checkpoint, schedule=constant, trainer=other)


def test_four_bit_weights_are_never_repacked(tiny_model: str) -> None:
    """On AVX-512 BF16 machines the first eval-mode forward would replace them in place; here the flag must be off."""
    base = load_base(tiny_model, quantization="nf4", dtype="float32")
    flags = [m.support_avx512bf16_for_cpu for m in base.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert flags and not any(flags)


def test_a_baselines_schedule_does_not_restart_with_the_epoch(tiny_model: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    starts = {}
    for order, fraction in (("shuffled", 0.0), ("easy_to_hard", 0.5)):
        data = {"routing": Routing(hard_fraction=fraction, order=order)}
        trainer, module, pairs = build(tiny_model, source, tmp_path / order, trainer={"max_epochs": 2}, data=data)
        trainer.fit(module, pairs)
        starts[order] = pairs.step_plan().stage_starts
    assert starts == {"shuffled": (0,), "easy_to_hard": (0, 1, 3, 4)}  # steps of 4: easy; half; hard | the same again
