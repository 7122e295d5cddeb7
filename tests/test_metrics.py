import math
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import build, build_sft, collate, fit, make_pairs, make_samples, write_pairs
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_modules.callbacks.logging import Throughput
from mixdpo.errors import InputError
from mixdpo.losses import DPO, SimPO
from mixdpo.metrics import PAIRWISE, VALIDATION, NamedMeans, by_difficulty, length_accuracy, pair_values
from mixdpo.model.fused_head import SequenceLogProbs
from mixdpo.routing.route import Routing


def weighted(values, weights):
    return torch.tensor(values, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32)


def test_means_over_batches_of_any_size():
    """a: (1·1 + 3·2 + 10·1) / 4; b has one value of weight ½; c has none."""
    means = NamedMeans(("a", "b", "c"))
    means.update({"a": weighted([1.0, 3.0], [1.0, 2.0])})
    means.update({"a": weighted([10.0], [1.0]), "b": weighted([5.0], [0.5])})
    means.update({})
    assert {name: value.item() for name, value in means.compute().items()} == {"a": 4.25, "b": 5.0}


def test_means_of_a_mean_are_not_taken():
    """A batch of 1 and a batch of 99 weigh 1 to 99."""
    means = NamedMeans(("a",))
    means.update({"a": weighted([1.0], [1.0])})
    means.update({"a": weighted([0.0] * 99, [1.0] * 99)})
    assert means.compute()["a"].item() == pytest.approx(0.01)


def test_many_batches_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    means = NamedMeans(("x", "y"))
    totals = {"x": [0.0, 0.0], "y": [0.0, 0.0]}
    for size in (3, 0, 1, 8, 5):
        batch = {}
        for name, total in totals.items():
            values, weights = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
            batch[name] = values, weights
            for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
                total[0] += value * weight
                total[1] += weight
        means.update(batch)
    for name, value in means.compute().items():
        assert value.item() == pytest.approx(totals[name][0] / totals[name][1], rel=1e-5)


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_a_value_of_weight_zero_is_not_read(hole):
    means = NamedMeans(("a", "b"))
    means.update({"a": weighted([2.0, hole, 4.0], [1.0, 0.0, 1.0]), "b": weighted([hole], [0.0])})
    assert {name: value.item() for name, value in means.compute().items()} == {"a": 3.0}


def test_a_nan_that_counts_is_seen():
    means = NamedMeans(("a",))
    means.update({"a": weighted([2.0, math.nan], [1.0, 1.0])})
    assert means.compute()["a"].isnan()


def test_reset_forgets():
    means = NamedMeans(("a", "b"))
    means.update({"a": weighted([7.0], [1.0])})
    means.reset()
    means.update({"b": weighted([2.0], [1.0])})
    assert {name: value.item() for name, value in means.compute().items()} == {"b": 2.0}


# two pairs and a tie; chosen first, then rejected
POLICY = SequenceLogProbs(torch.tensor([-10.0, -20.0, -6.0, -12.0, -15.0, -8.0]), torch.tensor([5, 10, 2, 4, 5, 2]))
REFERENCE = SequenceLogProbs(torch.tensor([-11.0, -18.0, -7.0, -10.0, -15.0, -9.0]), POLICY.lengths)


def test_pair_values_by_hand():
    """h_w = (1, −2, 1), h_l = (−2, 0, 1), β = .5."""
    values = pair_values(POLICY, REFERENCE, beta=0.5)
    expected = {
        "rewards/chosen": [0.5, -1.0, 0.5],
        "rewards/rejected": [-1.0, 0.0, 0.5],
        "rewards/margin": [1.5, -1.0, 0.0],
        "rewards/accuracy": [1.0, 0.0, 0.5],
        "log_probs/chosen": [-2.0, -2.0, -3.0],
        "log_probs/rejected": [-3.0, -3.0, -4.0],
        "displacement/chosen": [1.0, -2.0, 1.0],
    }
    assert set(values) == set(expected) == set(PAIRWISE)
    for name, numbers in expected.items():
        assert values[name].tolist() == pytest.approx(numbers), name


def test_a_policy_that_is_its_reference_knows_nothing():
    values = pair_values(POLICY, POLICY, beta=0.1)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margin", "displacement/chosen"):
        assert values[name].tolist() == [0.0, 0.0, 0.0]
    assert values["rewards/accuracy"].tolist() == [0.5, 0.5, 0.5]


def test_pair_values_of_no_pairs():
    nothing = SequenceLogProbs(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert {value.shape for value in pair_values(nothing, nothing, beta=0.1).values()} == {(0,)}


def test_length_accuracy_counts_ties_half():
    assert length_accuracy(torch.tensor([5, 2, 3, 4, 2, 9])).tolist() == [1.0, 0.5, 0.0]


def test_values_by_difficulty():
    pairs = [
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "margin": margin, "pair_id": index}
        for index, margin in enumerate([3.0, 0.0, 2.0])
    ]
    batch = collate(pairs, [False, True, False], evaluation=True)
    means = NamedMeans(VALIDATION)
    means.update(by_difficulty({"rewards/margin": torch.tensor([1.0, 4.0, 10.0])}, batch))
    filler = collate(pairs[:2], [False, True], weight=0.0, evaluation=True)
    means.update(by_difficulty({"rewards/margin": torch.tensor([math.nan, 100.0])}, filler))
    assert {name: value.item() for name, value in means.compute().items()} == {
        "val/all/rewards/margin": 5.0,
        "val/easy/rewards/margin": 5.5,
        "val/hard/rewards/margin": 4.0,
    }
    means.update(by_difficulty({"sft_loss": torch.tensor([1.0, 4.0, 4.0])}, batch))
    result = means.compute()
    assert [result[f"val/{group}/sft_loss"].item() for group in ("all", "easy", "hard")] == [3.0, 2.5, 4.0]


def test_a_group_without_pairs_is_left_out():
    pair = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "margin": 1.0, "pair_id": 0}
    means = NamedMeans(VALIDATION)
    means.update(by_difficulty({"sft_loss": torch.tensor([2.0])}, collate([pair], [False], evaluation=True)))
    assert set(means.compute()) == {"val/all/sft_loss", "val/easy/sft_loss"}


@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("threshold", [-1.0, 4.0, None])
@pytest.mark.parametrize("validation", [0.0, 0.4])
def test_the_names_that_can_be_monitored_are_those_that_a_run_has(
    has_reference: bool, threshold: float | None, validation: float, tiny_model: str, tmp_path: Path
) -> None:
    """Held-out pairs are all easy, of both kinds, or as the route says; and so for SFT, by source."""
    source, more = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12)), {"first": (Throughput(),)}
    data = {"validation": validation, "validation_threshold": threshold}
    loss = DPO() if has_reference else SimPO()
    trainer, module, pairs = build(tiny_model, source, tmp_path, trainer=more, data=data, preference_loss=loss)
    trainer.fit(module, pairs)
    assert module.metric_names() == set(trainer.callback_metrics)
    assert any(name.startswith("val/easy/") for name in module.metric_names()) == (validation > 0)
    if has_reference and threshold is None:
        samples = write_pairs(tmp_path / "samples.jsonl", make_samples(12))
        trainer, module, data = build_sft(tiny_model, samples, tmp_path, trainer=more, data={"validation": validation})
        trainer.fit(module, data)
        assert module.metric_names() == set(trainer.callback_metrics)
        assert ("val/loss/odd" in trainer.callback_metrics) == (validation > 0)


class Logs(Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("own", 1.0)


def test_no_step_is_logged_with_0(tiny_model: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(8))
    trainer = {"log_every_n_steps": 0, "first": (Throughput(),)}
    module = fit(tiny_model, source, tmp_path / "run", trainer=trainer, log_gradient_norms=True)
    assert module.trainer.global_step == 2 and module.metric_names() == set(module.trainer.callback_metrics) == set()


def test_a_run_without_an_easy_pair_has_no_rewards_to_monitor(tiny_model: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(8))
    early, data = EarlyStopping("rewards/accuracy"), {"routing": Routing(hard_fraction=1.0)}
    with pytest.raises(InputError, match="cannot monitor 'rewards/accuracy'"):
        fit(tiny_model, source, tmp_path / "run", trainer={"first": (Throughput(), early)}, data=data)


def test_what_ones_own_callback_logs_can_be_monitored(tiny_model: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(8))
    best = ModelCheckpoint(monitor="own", dirpath=tmp_path / "best", save_on_train_epoch_end=True)
    fit(tiny_model, source, tmp_path / "a", trainer={"first": (Logs(), best)})
    assert float(best.best_model_score) == 1.0
    with pytest.raises(InputError, match="cannot monitor 'own'"):
        fit(tiny_model, source, tmp_path / "b", trainer={"first": (ModelCheckpoint(monitor="own"),)})
    # it is none of those that an early stopping which need not find its metric, or no checkpoint, waits for
    lenient = EarlyStopping("own", strict=False), ModelCheckpoint(monitor="own", save_top_k=0)
    fit(tiny_model, source, tmp_path / "c", trainer={"first": lenient})
