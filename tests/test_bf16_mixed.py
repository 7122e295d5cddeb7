"""What is computed outside of Lightning's steps, where bf16-mixed has to be entered by hand: the adapter is fp32, the
model's states are bf16."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import WORDS, build, build_sft, fit, make_pairs, make_samples, write_pairs
from test_adapters import saved_adapter

from lightning_modules.callbacks.checkpoint import ExactResume
from lightning_modules.callbacks.gold_evaluation import GoldEvaluation
from lightning_modules.callbacks.logging import Throughput
from lightning_modules.callbacks.run_files import RunFiles
from mixdpo.routing.route import Routing
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.selection import Selection

MIXED: dict[str, Any] = {"dtype": "bfloat16", "trainer": {"precision": "bf16-mixed"}}


def scores(make: Any, model: str, source: str, folder: Path, **options: Any) -> np.ndarray:
    """Of the same cleaning in bf16-mixed and in fp32: (2, M)."""
    for name, how in (("mixed", MIXED), ("full", {})):
        fit(model, source, folder / name, make=make, **options, **how)
    return np.stack([np.load(folder / name / "cleaning/scores.npy") for name in ("mixed", "full")])


def test_scores_of_a_given_reference(tiny_model: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "samples.jsonl", make_samples(12))
    cleaning = Cleaning(reference=saved_adapter(tiny_model, tmp_path / "reference", rank=4))
    mixed, full = scores(build_sft, tiny_model, source, tmp_path, cleaning=cleaning)
    assert np.abs(full).max() > 0.5 and 0 < np.abs(mixed - full).max() < 0.1


def test_a_reference_fitted_to_easy_pairs(tiny_model: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    options: dict[str, Any] = {"cleaning": Cleaning(selection=Selection(0.6), reference_lr=0.01)}
    options["data"] = {"routing": Routing(hard_fraction=0.5)}
    mixed, full = scores(build, tiny_model, source, tmp_path, **options)
    assert np.abs(full).max() > 0.1 and 0 < np.abs(mixed - full).max() < 0.1


def test_responses_of_the_model_as_it_is_trained(tiny_model: str, tmp_path: Path) -> None:
    prompts = write_pairs(tmp_path / "prompts.jsonl", [{"prompt": f"{word} 7"} for word in WORDS[:3]])
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    evaluation = GoldEvaluation(prompts, scorer=None, max_new_tokens=4, batch_size=2, dequantise=False)
    trainer = {"callbacks": [RunFiles(), ExactResume(), Throughput(), evaluation], **MIXED["trainer"]}
    start = saved_adapter(tiny_model, tmp_path / "start", rank=4)
    fit(tiny_model, source, tmp_path / "run", **MIXED | {"trainer": trainer}, adapter=start, lr=1.0)
    rows = json.loads((tmp_path / "run/responses.json").read_text())
    assert any(row["before"]["text"] != row["after"]["text"] for row in rows)
    assert not torch.is_autocast_enabled("cpu")
