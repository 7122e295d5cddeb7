"""MixDPO on cleaned tokens: hard pairs learn the kept tokens of their chosen response, easy pairs notice nothing."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter_weights, build, build_sft, make_pairs, make_samples, make_trainer, write_pairs
from lightning.pytorch.callbacks import Callback
from test_clean_tokens import BASE_LOSS, CONSTANT, Ran, best, own_cache, policy_of, same  # noqa: F401  (a fixture)
from test_clean_tokens import run as run_steps
from test_scoring import fill, losses_one_by_one, one_by_one, plain_model, with_adapters
from torch import Tensor

from lightning_modules.callbacks.clean_tokens import RefreshReference
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, adapter_state, add_adapters, add_reference
from mixdpo.model.forward import row_log_probs
from mixdpo.model.loading import load_base
from mixdpo.routing.route import Routing
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss
from mixdpo.token_cleaning.scoring import fit_adapter
from mixdpo.token_cleaning.selection import Selection


class Losses(Callback):
    """(step, batch, losses of easy pairs, losses of hard pairs) of each micro-batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any, Tensor, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        route_losses = pl_module.route_losses

        def watched(batch: Any, policy: Any, reference: Any) -> Any:
            losses, easy, hard = route_losses(batch, policy, reference)
            self.seen.append((trainer.global_step, batch, easy.detach().clone(), hard.detach().clone()))
            return losses, easy, hard

        pl_module.route_losses = watched


def run(model: str, source: str, folder: Path, *first: Any, **options: Any) -> Ran:
    """Twelve pairs, 5 of them hard, in steps of four: 4 easy ones; 3 and a hard one; 4 hard ones."""
    losses = Losses()
    options = {"schedule": CONSTANT, "data": {"routing": Routing(hard_fraction=5 / 12)}, **options}
    ran = run_steps(model, source, folder, *first, losses, make=build, **options)
    ran.seen = losses.seen
    return ran


@pytest.fixture(scope="module")
def train(tiny_model: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    def train(*first: Any, source: str = source, **options: Any) -> Ran:
        return run(tiny_model, source, tmp_path_factory.mktemp("run"), *first, **options)

    return train


@pytest.fixture(scope="module")
def uncleaned(train: Any) -> Ran:
    return train()


@pytest.fixture(scope="module")
def cleaned(train: Any) -> Ran:
    """By the default reference, which it fits itself."""
    return train(cleaning=Cleaning(scorer=ExcessLoss(), selection=Selection(0.6), reference_lr=0.01))


def chosen(pair: dict[str, Any]) -> dict[str, Any]:
    start = len(pair["prompt_ids"])
    ids = [*pair["prompt_ids"], *pair["chosen_ids"]]
    return {"input_ids": ids, "spans": [start, len(ids)], "response_weights": [1.0]}


def pairs_of(ran: Ran, indices: np.ndarray) -> list[Any]:
    """In the order in which the rows of the file do not matter."""
    return sorted((ran.data.train_pairs[i] for i in indices.tolist()), key=lambda pair: pair["pair_id"])


def hard_pairs(ran: Ran) -> tuple[dict[int, Any], dict[int, slice]]:
    """By pair_id: their chosen responses, and the numbers of their tokens."""
    pairs = pairs_of(ran, np.flatnonzero(ran.data.route.is_hard))
    ends = np.cumsum([len(pair["chosen_ids"]) for pair in pairs]).tolist()
    places = {pair["pair_id"]: slice(end - len(pair["chosen_ids"]), end) for pair, end in zip(pairs, ends, strict=True)}
    return {pair["pair_id"]: chosen(pair) for pair in pairs}, places


def check_hard_losses(ran: Ran, plain: Any) -> list[float]:
    """−Σ w log p / Σ w of every hard pair, under the policy that its step started from; 0 where Σ w is 0."""
    weights, (samples, places) = ran.array("weights"), hard_pairs(ran)
    losses: list[float] = []
    for step, batch, _, found in ran.seen:
        policy = with_adapters(plain, ran.steps.adapters[step], "policy")
        for pair, loss in zip(batch.ids[batch.sft].tolist(), found.tolist(), strict=True):
            weight = torch.from_numpy(weights[places[pair]])
            with torch.no_grad():
                log_probs = one_by_one(plain, samples[pair], policy)
            wanted = float(-(weight * log_probs).sum() / weight.sum()) if weight.any() else 0.0
            assert loss == pytest.approx(wanted, abs=1e-5)
            losses.append(loss)
    return losses


def test_all_hard_pairs_are_ranked_together(cleaned: Ran, uncleaned: Ran, plain: Any) -> None:
    """Though the first of them is trained in a step of easy pairs."""
    for ran in (cleaned, uncleaned):
        steps = [(step, len(batch.preference), len(batch.sft)) for step, batch, _, _ in ran.seen]
        assert steps == [(0, 4, 0), (1, 3, 1), (2, 0, 4)]
    weights, scores, (samples, places) = cleaned.array("weights"), cleaned.array("scores"), hard_pairs(cleaned)
    total = sum(place.stop - place.start for place in places.values())
    assert len(weights) == total and int(weights.sum()) == round(0.6 * total)
    fitted = with_adapters(plain, cleaned.steps.adapters[0], "cleaning_reference")
    chosen_ones = list(samples.values())
    wanted = losses_one_by_one(plain, chosen_ones) - losses_one_by_one(plain, chosen_ones, fitted)
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)
    assert np.abs(scores).max() > 1e-3
    assert set(weights) == {0, 1} and np.array_equal(weights, best(scores))
    _, batch, _, _ = cleaned.seen[1]
    first = places[int(batch.ids[batch.sft[0]])]
    assert not np.array_equal(weights[first], best(scores[first]))  # what ranking each stage by itself would keep


def test_a_hard_pairs_loss_is_the_mean_over_its_kept_tokens(cleaned: Ran, uncleaned: Ran, plain: Any) -> None:
    losses = check_hard_losses(cleaned, plain)
    assert len(losses) == 5
    full = [loss for _, _, _, hard in uncleaned.seen for loss in hard.tolist()]
    assert max(abs(a - b) for a, b in zip(losses, full, strict=True)) > 1e-2


def test_kept_fraction_is_logged(cleaned: Ran) -> None:
    weights, (_, places) = cleaned.array("weights"), hard_pairs(cleaned)
    assert cleaned.rows[0]["cleaning/kept_fraction"] == ""  # a step without hard pairs
    for step, batch, _, _ in cleaned.seen[1:]:
        tokens = np.concatenate([weights[places[pair]] for pair in batch.ids[batch.sft].tolist()])
        assert float(cleaned.rows[step]["cleaning/kept_fraction"]) == pytest.approx(tokens.mean())
        assert float(cleaned.rows[step]["cleaning/empty_fraction"]) == 0


def test_easy_pairs_notice_nothing(cleaned: Ran, uncleaned: Ran) -> None:
    """To the bit, up to and with the first step that has a hard pair; after it the policies differ."""
    for (_, ours, easy, _), (_, theirs, alike, _) in zip(cleaned.seen[:2], uncleaned.seen[:2], strict=True):
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(easy, alike) and len(easy)
    for step in (0, 1):
        assert same(*(policy_of(ran.steps.adapters[step]) for ran in (cleaned, uncleaned)))
    assert not same(adapter_weights(cleaned.module), adapter_weights(uncleaned.module))


def test_given_weights_one_pair_with_none(train: Any, cleaned: Ran, plain: Any, tmp_path: Path) -> None:
    masks = shutil.copytree(cleaned.masks, tmp_path / "masks")
    weights = np.random.default_rng(0).choice([0.0, 0.3, 1.0], len(cleaned.array("weights"))).astype(np.float32)
    weights[hard_pairs(cleaned)[1][int(cleaned.seen[2][1].ids[0])]] = 0
    np.save(masks / "weights.npy", weights)
    ran = train(cleaning=Cleaning(masks=str(masks)), trainer={"accumulate_grad_batches": 2})
    losses = check_hard_losses(ran, plain)
    assert losses.count(0.0) == 1 and all(math.isfinite(loss) for loss in losses)
    assert all(value.isfinite().all() for value in adapter_state(ran.module).values())
    assert float(ran.rows[2]["cleaning/empty_fraction"]) == 0.25
    assert float(ran.rows[2]["train/sft_loss"]) == pytest.approx(sum(losses[1:]) / 4)


def test_hard_pairs_that_keep_nothing_teach_nothing(train: Any, cleaned: Ran, tmp_path: Path) -> None:
    """Adam would move on by what it remembers, and by its weight decay."""
    masks = shutil.copytree(cleaned.masks, tmp_path / "masks")
    np.save(masks / "weights.npy", np.zeros_like(np.load(masks / "weights.npy")))
    ran = train(cleaning=Cleaning(masks=str(masks)), optimizer=torch.optim.AdamW, lr=1e-2)
    starts = ran.steps.adapters
    assert same(starts[2], starts[3]) and not same(starts[1], starts[2])
    for row in ran.rows[1:]:
        assert (float(row["train/sft_loss"]), float(row["cleaning/empty_fraction"])) == (0, 1)
    assert float(ran.rows[2]["train/loss"]) == 0
    assert [float(row["cleaning/empty_steps"]) for row in ran.rows] == [0, 0, 1]


def test_keeping_all_is_mixdpo_to_the_bit(train: Any) -> None:
    """With dropout: neither fitting the reference nor scoring touches the policy or the random numbers."""
    options = {"lora": Lora(rank=4, alpha=8, dropout=0.3), "optimizer": torch.optim.AdamW, "lr": 1e-2}
    without, kept = train(**options), train(cleaning=Cleaning(selection=Selection(1.0)), **options)
    assert same(adapter_weights(without.module), adapter_weights(kept.module))
    assert [row["train/loss"] for row in kept.rows] == [row["train/loss"] for row in without.rows]
    assert (kept.array("weights") == 1).all()


def fit_by_hand(plain: Any, adapters: Any, samples: list[Any], rate: float, size: int) -> dict[str, Tensor]:
    """One pass of AdamW without weight decay, the loss of a step being the mean over its response tokens."""
    adapters = policy_of(adapters)
    optimizer = torch.optim.AdamW(adapters.values(), lr=rate, weight_decay=0.0)
    for start in range(0, len(samples), size):
        weights = with_adapters(plain, adapters, "policy")
        log_probs = [one_by_one(plain, sample, weights) for sample in samples[start : start + size]]
        optimizer.zero_grad()
        (-torch.cat(log_probs).mean()).backward()
        optimizer.step()
    return {key: value.detach() for key, value in adapters.items()}


def test_a_fitted_adapter_is_one_pass_of_adamw(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(tiny_model, quantization="none", dtype="float32")
    model = add_adapters(base, Lora(rank=4, alpha=8, dropout=0.3)).train()
    fill(model, "policy", 1)
    add_reference(model, "cleaning_reference")
    pairs = [([2, 4, 6 + i, 3, 2, 5], [7 + i, *range(10, 12 + i), 3]) for i in range(7)]
    samples = [chosen({"prompt_ids": prompt, "chosen_ids": response}) for prompt, response in pairs]
    before = {key: value.clone() for key, value in adapter_state(model).items()}
    wanted = fit_by_hand(plain_model(tiny_model), before, samples, rate=0.01, size=3)
    pulled: list[Tensor] = []

    def watched(*given: Any) -> Tensor:
        log_probs = row_log_probs(*given)
        log_probs.register_hook(pulled.append)
        return log_probs

    monkeypatch.setattr("mixdpo.token_cleaning.scoring.row_log_probs", watched)
    random, trainable = torch.get_rng_state(), [parameter.requires_grad for parameter in model.parameters()]
    fit_adapter(model, "cleaning_reference", samples, learning_rate=0.01, batch_size=3)
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert set(torch.cat(pulled).tolist()) == {-1.0}  # 1/tokens would leave half precision nothing to compute with
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in adapter_state(model).items():
        is_fitted = ".cleaning_reference." in key
        target = wanted[key.replace(".cleaning_reference.", ".policy.")] if is_fitted else before[key]
        torch.testing.assert_close(value, target, rtol=0, atol=1e-5 if is_fitted else 0)


def test_the_default_reference_has_learned_the_easy_chosen_responses(cleaned: Ran, plain: Any) -> None:
    samples = [chosen(pair) for pair in pairs_of(cleaned, np.flatnonzero(~cleaned.data.route.is_hard))]
    assert [sample["input_ids"] for sample in cleaned.data.easy_samples()] == [s["input_ids"] for s in samples]
    start, end = cleaned.steps.adapters[0], cleaned.steps.adapters[-1]
    fitted = with_adapters(plain, end, "cleaning_reference")
    assert (losses_one_by_one(plain, samples) - losses_one_by_one(plain, samples, fitted)).mean() > 0.01
    for key, value in start.items():  # it never changes again
        assert torch.equal(value, end[key]) or ".policy." in key


# What belongs to a run of pairs, and what is refused.
def hard(fraction: float = 0.5, **options: Any) -> dict[str, Any]:
    return {"routing": Routing(hard_fraction=fraction, **options)}


def test_pairs_with_other_texts_and_the_same_ids_are_other_pairs(train: Any, tmp_path: Path) -> None:
    """Ids and margins alone would find the losses, masks and checkpoints of the old texts."""
    edited = [row | {"chosen": f"fish {row['chosen']}"} for row in make_pairs(12)]
    source = write_pairs(tmp_path / "new.jsonl", edited)
    old = train(cleaning=BASE_LOSS, data=hard())
    new = train(cleaning=BASE_LOSS, data=hard(), source=source)
    assert len(new.pool) == len(old.pool) + 6 and np.isfinite(new.array("scores")).all()
    with pytest.raises(InputError, match="data: "):
        train(cleaning=Cleaning(masks=old.masks), data=hard(), source=source)
    with pytest.raises(InputError, match="another run"):
        checkpoint = str(old.folder / "checkpoints/last.ckpt")
        train(cleaning=BASE_LOSS, data=hard(), source=source, ckpt_path=checkpoint)
    with pytest.raises(InputError, match=r"\(hard pairs: 6, \w+ there, 3, \w+ here\)"):
        train(cleaning=Cleaning(masks=old.masks), data=hard(0.25))


def test_the_last_epoch_of_reshuffled_pairs_is_cleaned_in_its_own_order(train: Any) -> None:
    """6 steps × 2 epochs, refreshes at steps 5 and 10."""
    data = hard(order="shuffled", reshuffle=True) | {"batch_size": 2}
    ran = train(RefreshReference(every=5), cleaning=Cleaning(), trainer={"max_epochs": 2}, data=data)
    first, second = (ran.data.pool_steps(epoch) for epoch in (0, 1))
    assert first != second
    again = {sample for step in second[4:] for sample in step}
    assert set(np.flatnonzero(ran.array("decided") == 2)) == again != set()


def test_hard_pairs_are_scored_when_the_first_of_them_comes(train: Any) -> None:
    (stage,) = train(cleaning=BASE_LOSS, data=hard(1 / 3)).stages()
    assert (stage["step"], stage["samples"]) == (2, 4)


def test_modules_and_data_that_do_not_belong_together(tiny_model: str, source: str, tmp_path: Path) -> None:
    samples = write_pairs(tmp_path / "samples.jsonl", make_samples(8))
    _, preference, pairs = build(tiny_model, source, tmp_path / "a")
    _, sft, conversations = build_sft(tiny_model, samples, tmp_path / "b")
    for module, data in ((preference, conversations), (sft, pairs)):
        with pytest.raises(InputError, match=f"{type(module).__name__} cannot train on {type(data).__name__}"):
            make_trainer(tmp_path / "run").fit(module, data)
