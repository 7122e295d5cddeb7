"""MixDPO on cleaned tokens: hard pairs learn the kept tokens of their chosen response, easy pairs notice nothing."""

import csv
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter_weights, build, collate, make_pairs, write_pairs
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from test_token_losses import fill, losses_one_by_one, one_by_one, plain_model, with_adapters
from torch import Tensor

from lightning_modules.preference import PreferenceModule
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, adapter_state, add_adapters, add_reference, role
from mixdpo.model.forward import row_log_probs, sequence_log_probs
from mixdpo.model.loading import load_base
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss, Probability, Random
from mixdpo.token_cleaning.scoring import fit_adapter
from mixdpo.token_cleaning.selection import Selection


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXDPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_pairs(12))


@pytest.fixture(scope="module")
def plain(tiny_model: str) -> Any:
    return plain_model(tiny_model)


class Starts(Callback):
    """The adapters that each optimizer step starts from, and those at the end."""

    def __init__(self) -> None:
        self.adapters: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= len(self.adapters):
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.adapters.append({key: value.clone() for key, value in adapter_state(pl_module).items()})


@dataclass
class Ran:
    """A run; `seen` holds (step, batch, losses of easy pairs, losses of hard pairs) of each micro-batch."""

    module: Any
    data: Any
    starts: list[dict[str, Tensor]]
    seen: list[tuple[int, Any, Tensor, Tensor]]
    rows: list[dict[str, str]]
    folder: Path

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / "cleaning" / f"{name}.npy")


def run(model: str, source: str, folder: Path, *, trainer: Any = None, **options: Any) -> Ran:
    """Twelve pairs, 5 of them hard, in steps of four: 4 easy ones; 3 and a hard one; 4 hard ones."""
    starts, seen = Starts(), []
    logger = CSVLogger(folder / "log", name="", version="")
    options = {"schedule": Constant(warmup=0.0), "data": {"routing": Routing(hard_fraction=5 / 12)}, **options}
    fitter, module, data = build(
        model, source, folder, trainer={"first": (starts,), "logger": logger, **(trainer or {})}, **options
    )
    route_losses = module.route_losses

    def watched(batch: Any, policy: Any, reference: Any) -> Any:
        losses, easy, hard = route_losses(batch, policy, reference)
        seen.append((fitter.global_step, batch, easy.detach().clone(), hard.detach().clone()))
        return losses, easy, hard

    module.route_losses = watched
    fitter.fit(module, data)
    with (folder / "log" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return Ran(module, data, starts.adapters, seen, rows, folder)


@pytest.fixture(scope="module")
def uncleaned(tiny_model: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run(tiny_model, source, tmp_path_factory.mktemp("uncleaned") / "run")


@pytest.fixture(scope="module")
def cleaned(tiny_model: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """By the default reference, which it fits itself."""
    cleaning = Cleaning(scorer=ExcessLoss(), selection=Selection(0.6), reference_lr=0.01)
    return run(tiny_model, source, tmp_path_factory.mktemp("cleaned") / "run", cleaning=cleaning)


def chosen(pair: dict[str, Any]) -> dict[str, Any]:
    start = len(pair["prompt_ids"])
    ids = [*pair["prompt_ids"], *pair["chosen_ids"]]
    return {"input_ids": ids, "spans": [start, len(ids)]}


def by_id(ran: Ran, indices: np.ndarray) -> list[int]:
    """The order of pairs in which the rows of the file do not matter."""
    return sorted(indices.tolist(), key=lambda i: ran.data.train_pairs[i]["pair_id"])


def hard_pairs(ran: Ran) -> tuple[list[int], list[dict[str, Any]], dict[int, slice]]:
    """Their indices in the data, their chosen responses, and by pair_id the numbers of their tokens."""
    indices = by_id(ran, np.flatnonzero(ran.data.route.is_hard))
    pairs = [ran.data.train_pairs[i] for i in indices]
    ends = np.cumsum([len(pair["chosen_ids"]) for pair in pairs]).tolist()
    places = {pair["pair_id"]: slice(end - len(pair["chosen_ids"]), end) for pair, end in zip(pairs, ends, strict=True)}
    return indices, [chosen(pair) for pair in pairs], places


def best(scores: np.ndarray) -> np.ndarray:
    """1 for the 60 % highest scores, by sorting; of equal ones the earlier."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    weights = np.zeros(len(scores))
    weights[order[: round(0.6 * len(scores))]] = 1
    return weights


def check_hard_losses(ran: Ran, plain: Any) -> list[float]:
    """−Σ w log p / Σ w of every hard pair, under the policy that its step started from; 0 where Σ w is 0."""
    weights, (_, samples, places) = ran.array("weights"), hard_pairs(ran)
    losses: list[float] = []
    for step, batch, _, found in ran.seen:
        policy = with_adapters(plain, ran.starts[step], "policy")
        for at, loss in zip(batch.sft.tolist(), found.tolist(), strict=True):
            place = places[int(batch.pair_id[at])]
            weight = torch.from_numpy(weights[place])
            with torch.no_grad():
                log_probs = one_by_one(plain, samples[list(places.values()).index(place)], policy)
            wanted = float(-(weight * log_probs).sum() / weight.sum()) if weight.any() else 0.0
            assert loss == pytest.approx(wanted, abs=1e-5)
            losses.append(loss)
    return losses


@pytest.mark.parametrize("name", ["cleaned", "uncleaned"])
def test_steps_are_as_described(name: str, request: pytest.FixtureRequest) -> None:
    ran = request.getfixturevalue(name)
    assert [(step, len(batch.preference), len(batch.sft)) for step, batch, _, _ in ran.seen] == [
        (0, 4, 0),
        (1, 3, 1),
        (2, 0, 4),
    ]


def test_all_hard_pairs_are_ranked_together(cleaned: Ran, plain: Any) -> None:
    """Though the first of them is trained in a step of easy pairs."""
    _, samples, places = hard_pairs(cleaned)
    weights, scores = cleaned.array("weights"), cleaned.array("scores")
    total = sum(place.stop - place.start for place in places.values())
    assert len(weights) == total and int(weights.sum()) == round(0.6 * total)
    fitted = with_adapters(plain, cleaned.starts[0], "cleaning_reference")
    wanted = losses_one_by_one(plain, samples) - losses_one_by_one(plain, samples, fitted)
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)
    assert np.abs(scores).max() > 1e-3
    assert set(weights) == {0, 1} and np.array_equal(weights, best(scores))
    first = places[int(cleaned.seen[1][1].pair_id[cleaned.seen[1][1].hard[0]])]
    assert not np.array_equal(weights[first], best(scores[first]))  # what ranking each stage by itself would keep


def test_a_hard_pairs_loss_is_the_mean_over_its_kept_tokens(cleaned: Ran, uncleaned: Ran, plain: Any) -> None:
    losses = check_hard_losses(cleaned, plain)
    assert len(losses) == 5
    full = [loss for _, _, _, hard in uncleaned.seen for loss in hard.tolist()]
    assert max(abs(a - b) for a, b in zip(losses, full, strict=True)) > 1e-2


def test_kept_fraction_is_logged(cleaned: Ran) -> None:
    weights, (_, _, places) = cleaned.array("weights"), hard_pairs(cleaned)
    assert cleaned.rows[0]["cleaning/kept_fraction"] == ""  # a step without hard pairs
    for step, batch, _, _ in cleaned.seen[1:]:
        tokens = np.concatenate([weights[places[int(batch.pair_id[at])]] for at in batch.sft.tolist()])
        assert float(cleaned.rows[step]["cleaning/kept_fraction"]) == pytest.approx(tokens.mean())
        assert float(cleaned.rows[step]["cleaning/empty_fraction"]) == 0


def test_easy_pairs_notice_nothing(cleaned: Ran, uncleaned: Ran) -> None:
    """To the bit, up to and with the first step that has a hard pair; after it the policies differ."""
    for (_, ours, easy, _), (_, theirs, alike, _) in zip(cleaned.seen[:2], uncleaned.seen[:2], strict=True):
        assert torch.equal(ours.pair_id, theirs.pair_id) and torch.equal(easy, alike) and len(easy)
    for step in (0, 1):
        policies = [{k: v for k, v in ran.starts[step].items() if ".policy." in k} for ran in (cleaned, uncleaned)]
        assert all(torch.equal(value, policies[1][key]) for key, value in policies[0].items())
    ours, theirs = adapter_weights(cleaned.module), adapter_weights(uncleaned.module)
    assert not all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_given_weights_one_pair_with_none(
    accumulate: int, tiny_model: str, source: str, cleaned: Ran, plain: Any, tmp_path: Path
) -> None:
    masks = shutil.copytree(cleaned.folder / "cleaning", tmp_path / "masks")
    weights = np.random.default_rng(0).choice([0.0, 0.3, 1.0], len(cleaned.array("weights"))).astype(np.float32)
    (_, _, places) = hard_pairs(cleaned)
    weights[places[int(cleaned.seen[2][1].pair_id[0])]] = 0
    np.save(masks / "weights.npy", weights)
    trainer = {"accumulate_grad_batches": accumulate}
    ran = run(tiny_model, source, tmp_path / "run", cleaning=Cleaning(masks=str(masks)), trainer=trainer)
    losses = check_hard_losses(ran, plain)
    assert losses.count(0.0) == 1 and all(math.isfinite(loss) for loss in losses)
    assert all(value.isfinite().all() for value in adapter_state(ran.module).values())
    assert float(ran.rows[2]["cleaning/empty_fraction"]) == 0.25
    assert float(ran.rows[2]["train/sft_loss"]) == pytest.approx(sum(losses[1:]) / 4)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_hard_pairs_that_keep_nothing_teach_nothing(
    optimizer: type[torch.optim.Optimizer], tiny_model: str, source: str, cleaned: Ran, tmp_path: Path
) -> None:
    """Adam would move on by what it remembers, and by its weight decay."""
    masks = shutil.copytree(cleaned.folder / "cleaning", tmp_path / "masks")
    np.save(masks / "weights.npy", np.zeros_like(np.load(masks / "weights.npy")))
    options = {"cleaning": Cleaning(masks=str(masks)), "optimizer": optimizer, "lr": 1e-2}
    ran = run(tiny_model, source, tmp_path / "run", **options)
    assert all(torch.equal(value, ran.starts[3][key]) for key, value in ran.starts[2].items())
    assert not all(torch.equal(value, ran.starts[2][key]) for key, value in ran.starts[1].items())
    for row in ran.rows[1:]:
        assert (float(row["train/sft_loss"]), float(row["cleaning/empty_fraction"])) == (0, 1)
    assert float(ran.rows[2]["train/loss"]) == 0
    assert [float(row["cleaning/empty_steps"]) for row in ran.rows] == [0, 0, 1]


@pytest.mark.parametrize("scorer", [ExcessLoss(), Random()])
def test_keeping_all_is_mixdpo_to_the_bit(scorer: Any, tiny_model: str, source: str, tmp_path: Path) -> None:
    """With dropout: neither fitting the reference nor scoring touches the policy or the random numbers."""
    options = {"lora": Lora(rank=4, alpha=8, dropout=0.3), "optimizer": torch.optim.AdamW, "lr": 1e-2}
    without = run(tiny_model, source, tmp_path / "without", **options)
    cleaning = Cleaning(scorer=scorer, selection=Selection(1.0))
    kept = run(tiny_model, source, tmp_path / "kept", cleaning=cleaning, **options)
    ours, theirs = adapter_weights(without.module), adapter_weights(kept.module)
    assert set(ours) == set(theirs) and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert [row["train/loss"] for row in kept.rows] == [row["train/loss"] for row in without.rows]
    assert (kept.array("weights") == 1).all()


def fit_by_hand(
    plain: Any, adapters: dict[str, Tensor], samples: list[dict[str, Any]], rate: float, batch_size: int
) -> dict[str, Tensor]:
    """One pass of AdamW without weight decay, the loss of a step being the mean over its response tokens."""
    adapters = {key: value.clone().requires_grad_() for key, value in adapters.items()}
    optimizer = torch.optim.AdamW(adapters.values(), lr=rate, weight_decay=0.0)
    for start in range(0, len(samples), batch_size):
        weights = with_adapters(plain, adapters, "policy")
        log_probs = [one_by_one(plain, sample, weights) for sample in samples[start : start + batch_size]]
        optimizer.zero_grad()
        (-torch.cat(log_probs).mean()).backward()
        optimizer.step()
    return {key: value.detach() for key, value in adapters.items()}


def test_a_fitted_adapter_is_one_pass_of_adamw(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = load_base(tiny_model, quantization="none", dtype="float32")
    model = add_adapters(base, Lora(rank=4, alpha=8, dropout=0.3)).train()
    fill(model, "policy", 1)
    add_reference(model, "cleaning_reference")
    pairs = [([2, 4, 6 + i, 3, 2, 5], [7 + i, *range(10, 12 + i), 3]) for i in range(7)]
    samples = [chosen({"prompt_ids": prompt, "chosen_ids": response}) for prompt, response in pairs]
    before = {key: value.clone() for key, value in adapter_state(model).items()}
    learned = {key: value for key, value in before.items() if ".policy." in key}
    wanted = fit_by_hand(plain_model(tiny_model), learned, samples, rate=0.01, batch_size=3)

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
        if ".cleaning_reference." in key:
            torch.testing.assert_close(
                value, wanted[key.replace(".cleaning_reference.", ".policy.")], rtol=0, atol=1e-5
            )
        else:
            assert torch.equal(value, before[key])


def test_the_default_reference_has_learned_the_easy_chosen_responses(cleaned: Ran, plain: Any) -> None:
    easy = by_id(cleaned, np.flatnonzero(~cleaned.data.route.is_hard))
    samples = [chosen(cleaned.data.train_pairs[i]) for i in easy]
    assert [sample["input_ids"] for sample in cleaned.data.easy_samples()] == [s["input_ids"] for s in samples]
    fitted = with_adapters(plain, cleaned.starts[-1], "cleaning_reference")
    gain = losses_one_by_one(plain, samples) - losses_one_by_one(plain, samples, fitted)
    assert gain.mean() > 0.01
    for key, value in cleaned.starts[0].items():  # it never changes again
        if ".cleaning_reference." in key:
            assert torch.equal(value, cleaned.starts[-1][key])


def test_weighted_sums_and_lengths_of_completions(tiny_model: str) -> None:
    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=4, alpha=8))
    pairs = [
        {"prompt_ids": [2, 4, 6, 3], "chosen_ids": [7, 8, 3], "rejected_ids": [9, 3], "margin": 1.0, "pair_id": 1},
        {"prompt_ids": [2, 4, 3], "chosen_ids": [10, 3], "rejected_ids": [11, 12, 3], "margin": 0.1, "pair_id": 2},
    ]
    rows = collate(pairs, [False, True]).rows
    weight = torch.linspace(0, 2, len(rows.target))
    with torch.no_grad(), role(model, "policy"):
        values, found = row_log_probs(model, rows), sequence_log_probs(model, rows, weight)
    for completion in range(4):
        mine = [m for m in range(len(rows.target)) if rows.completion[m] == completion]
        assert float(found.sums[completion]) == pytest.approx(sum(float(weight[m] * values[m]) for m in mine), abs=1e-5)
        assert float(found.lengths[completion]) == pytest.approx(sum(float(weight[m]) for m in mine), abs=1e-6)
    assert (found.sums[3], found.lengths[3]) == (0, 0)  # a hard pair's rejected response is not there


@pytest.mark.parametrize(
    ("scorer", "selection"),
    [
        (Loss(), Selection(0.6, scope="sample")),
        (Probability(), None),
        (ExcessLoss("policy", "cleaning_reference"), Selection(0.6, scope="batch")),
    ],
)
def test_a_scorer_that_reads_the_policy_is_refused(scorer: Any, selection: Any, tiny_model: str) -> None:
    with pytest.raises(InputError, match=r"model\.cleaning\.scorer"):
        PreferenceModule(tiny_model, cleaning=Cleaning(scorer=scorer, selection=selection))
