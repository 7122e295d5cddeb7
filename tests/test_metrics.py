import math
from pathlib import Path

import pytest
import torch
from conftest import collate, fit

from lightning_modules.callbacks.logging import Throughput
from mixdpo.losses import DPO
from mixdpo.metrics import PAIRWISE, VALIDATION, NamedMeans, by_difficulty, pair_values
from mixdpo.model.fused_head import SequenceLogProbs


def weighted(values, weights):
    return torch.tensor(values, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32)


def of(means):
    return {name: value.item() for name, value in means.compute().items()}


def test_means_over_batches_of_any_size():
    """a: (1·1 + 3·2 + 10·1) / 4; b has one value of weight ½; c has none. Reset forgets all of them."""
    means = NamedMeans(("a", "b", "c"))
    means.update({"a": weighted([1.0, 3.0], [1.0, 2.0])})
    means.update({"a": weighted([10.0], [1.0]), "b": weighted([5.0], [0.5])})
    means.update({})
    assert of(means) == {"a": 4.25, "b": 5.0}
    means.reset()
    means.update({"b": weighted([2.0], [1.0])})
    assert of(means) == {"b": 2.0}


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_seen_only_where_it_counts(hole):
    means = NamedMeans(("a", "b"))
    means.update({"a": weighted([2.0, hole, 4.0], [1.0, 0.0, 1.0]), "b": weighted([hole], [0.0])})
    assert of(means) == {"a": 3.0}
    means.update({"b": weighted([2.0, hole], [1.0, 1.0])})
    assert not math.isfinite(of(means)["b"])


def test_means_are_not_rounded_by_a_move_to_bfloat16():
    """Counts in bfloat16 stop growing at 256."""
    means = NamedMeans(("a",)).to(torch.bfloat16)
    for _ in range(300):
        means.update({"a": (torch.ones(1), torch.ones(1))})
    assert means.counts.item() == 300 and means.counts.dtype == torch.float64


# two pairs and a tie; chosen first, then rejected
POLICY = SequenceLogProbs(torch.tensor([-10.0, -20.0, -6.0, -12.0, -15.0, -8.0]), torch.tensor([5, 10, 2, 4, 5, 2]))
REFERENCE = SequenceLogProbs(torch.tensor([-11.0, -18.0, -7.0, -10.0, -15.0, -9.0]), POLICY.lengths)


def test_pair_values_by_hand():
    """h_w = (1, −2, 1), h_l = (−2, 0, 1), β = .5."""
    values = pair_values(POLICY, REFERENCE, DPO(beta=0.5))
    expected = {
        "rewards/chosen": [0.5, -1.0, 0.5], "rewards/rejected": [-1.0, 0.0, 0.5], "rewards/margin": [1.5, -1.0, 0.0],
        "rewards/accuracy": [1.0, 0.0, 0.5], "log_probs/chosen": [-2.0, -2.0, -3.0],
        "log_probs/rejected": [-3.0, -3.0, -4.0], "displacement/chosen": [1.0, -2.0, 1.0],
    }  # fmt: skip
    assert set(values) == set(expected) == set(PAIRWISE)
    for name, numbers in expected.items():
        assert values[name].tolist() == pytest.approx(numbers), name


def test_values_by_difficulty():
    """Means over all, easy and hard pairs, filler not counted; a group without pairs is left out."""
    pairs = [
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "margin": margin, "pair_id": index}
        for index, margin in enumerate([3.0, 0.0, 2.0])
    ]
    batch, means = collate(pairs, [False, True, False], evaluation=True), NamedMeans(VALIDATION)
    means.update(by_difficulty({"rewards/margin": torch.tensor([1.0, 4.0, 10.0])}, batch))
    filler = collate(pairs[:2], [False, True], weight=0.0, evaluation=True)
    means.update(by_difficulty({"rewards/margin": torch.tensor([math.nan, 100.0])}, filler))
    assert of(means) == {f"val/{group}/rewards/margin": v for group, v in (("all", 5.0), ("easy", 5.5), ("hard", 4.0))}
    means.reset()
    means.update(by_difficulty({"sft_loss": torch.tensor([2.0])}, collate(pairs[:1], [False], evaluation=True)))
    assert of(means) == {"val/all/sft_loss": 2.0, "val/easy/sft_loss": 2.0}


def test_no_step_is_logged_with_0(tiny_model: str, source: str, tmp_path: Path) -> None:
    trainer = {"log_every_n_steps": 0, "first": (Throughput(),)}
    module = fit(tiny_model, source, tmp_path / "run", trainer=trainer)
    assert module.trainer.global_step == 3 and not module.trainer.callback_metrics
