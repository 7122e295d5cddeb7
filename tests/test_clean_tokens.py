"""SFT on cleaned tokens: what is scored by whom, when scores are made anew, what a step's loss is, what is refused."""

import csv
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter_weights, build_sft, fit, make_samples, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from test_scoring import (
    SCALE,
    alone,
    as_role,
    changed_model,
    losses_one_by_one,
    one_by_one,
    plain_model,
    saved_adapter,
    with_adapters,
)
from torch import Tensor

from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.sft import SFTModule
from mixdpo.batches.steps import Slices, plan_stages
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, adapter_state, role
from mixdpo.model.fused_head import divergence, entropy
from mixdpo.model.identity import adapter_fingerprint
from mixdpo.routing.schedules import Constant
from mixdpo.storage.store import read_store
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.run_tokens import read_cleaning
from mixdpo.token_cleaning.scorers import Column, Entropy, ExcessLoss, Loss, Probability, Random
from mixdpo.token_cleaning.selection import Selection

SOURCE_ROWS = make_samples(24)
BASE_LOSS, EVOLVING = Cleaning(scorer=Loss("base"), selection=Selection(0.5)), Cleaning(warm_up_stages=1)
CONSTANT = Constant(warmup=0.0)
ADAMW: dict[str, Any] = {"optimizer": torch.optim.AdamW, "lr": 1e-2, "schedule": CONSTANT}
Adapters = dict[str, Tensor]


class Steps(Callback):
    """What each optimizer step started from (and, last, where the run ended), and what each micro-batch was."""

    def __init__(self) -> None:
        self.adapters: list[Adapters] = []
        self.optimizer: list[Adapters] = []
        self.batches: list[Any] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= len(self.adapters):
            self.on_train_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.adapters.append({key: value.clone() for key, value in adapter_state(pl_module).items()})
        states = trainer.optimizers[0].state.values()
        self.optimizer.append({f"{i} {key}": v.clone() for i, state in enumerate(states) for key, v in state.items()})


@dataclass
class Ran:
    module: Any
    steps: Steps
    rows: list[dict[str, str]]
    folder: Path

    def __post_init__(self) -> None:
        self.data: Any = self.module.trainer.datamodule
        self.masks = str(self.folder / "cleaning")

    @property
    def pool(self) -> Any:
        return self.data.pool

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / "cleaning" / f"{name}.npy")

    def stages(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "cleaning" / "stages.json").read_text())["stages"]


def run(model: str, source: str, folder: Path, *first: Any, trainer: Any = None, **more: Any) -> Ran:
    steps, logger = Steps(), CSVLogger(folder / "log", name="", version="")
    trainer = {"first": (*first, steps), "logger": logger, **(trainer or {})}
    module = fit(model, source, folder, trainer=trainer, **{"make": build_sft, **more})
    with (folder / "log" / "metrics.csv").open() as file:
        return Ran(module, steps, list(csv.DictReader(file)), folder)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # runs that are shared begin before conftest's own, and stay
        patch.setenv("MIXDPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def train(tiny_model: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    return lambda *first, **options: run(tiny_model, source, tmp_path_factory.mktemp("run"), *first, **options)


@pytest.fixture(scope="module")
def earlier(train: Any) -> Ran:
    """A run on random tokens, whose adapter and whose masks others use."""
    return train(cleaning=Cleaning(scorer=Random(), selection=Selection(0.5)), **ADAMW | {"lr": 0.03})


def best(scores: np.ndarray, ratio: float = 0.6) -> np.ndarray:
    """Mask of the round(k·m) highest scores, by sorting; of equal ones the earlier."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    mask = np.zeros(len(scores), dtype=bool)
    mask[order[: round(ratio * len(scores))]] = True
    return mask


def same(ours: Adapters, theirs: Adapters) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def policy_of(adapters: Adapters) -> Adapters:
    return {key: value.clone().requires_grad_() for key, value in adapters.items() if ".policy." in key}


DROPOUT: dict[str, Any] = {**ADAMW, "lora": Lora(rank=4, alpha=8, dropout=0.3), "data": {"limit": 12}}
KEEP_ALL = {
    "excess": Cleaning(ExcessLoss(), Selection(1.0, scope="sample"), reference="earlier"),
    "online": Cleaning(Loss(), Selection(1.0, scope="batch")),
}


@pytest.fixture(scope="module")
def full(train: Any) -> Ran:
    return train(**DROPOUT)


@pytest.mark.parametrize("name", KEEP_ALL)
def test_keeping_all_is_full_sft_to_the_bit(name: str, train: Any, full: Ran, earlier: Ran) -> None:
    """With dropout: scoring draws no random numbers."""
    cleaning = KEEP_ALL[name]
    reference = cleaning.reference and str(earlier.folder / "adapter")
    kept = train(cleaning=replace(cleaning, reference=reference), **DROPOUT)
    assert same(adapter_weights(full.module), adapter_weights(kept.module))
    assert [row["train/loss"] for row in kept.rows] == [row["train/loss"] for row in full.rows]
    assert [float(row["cleaning/kept_fraction"]) for row in kept.rows] == [1.0] * 3
    assert (kept.array("weights") == 1).all()


def sgd_by_hand(ran: Ran, plain: Any, weights: np.ndarray, lr: float) -> tuple[Adapters, list[float]]:
    """The run's steps from its first adapters, one sample at a time: −Σ w log p / Σ w over the step's tokens."""
    adapters, logged = policy_of(ran.steps.adapters[0]), []
    for step in ran.data.pool_steps():
        total, kept = torch.zeros((), dtype=torch.float64), 0.0
        for i in step:
            weight = torch.from_numpy(weights[ran.pool.tokens([i])]).double()
            log_probs = one_by_one(plain, ran.pool.samples[i], with_adapters(plain, adapters, "policy"))
            total, kept = total - (weight * log_probs).sum(), kept + float(weight.sum())
        gradients = torch.autograd.grad(total / kept, list(adapters.values()))
        logged.append(float(total.detach()) / kept)
        moved = zip(adapters.items(), gradients, strict=True)
        adapters = {key: (value.detach() - lr * gradient).requires_grad_() for (key, value), gradient in moved}
    return {key: value.detach() for key, value in adapters.items()}, logged


@pytest.mark.usefixtures("full_precision_norms")
@pytest.mark.parametrize(("accumulate", "pack"), [(1, 0), (2, 64), (4, 0)])
def test_a_step_is_normalised_by_its_kept_weight(accumulate: int, pack: int, train: Any, tiny_model: str) -> None:
    """Weights 0, ¼ and 1, one sample without any, over steps of 4, 4 and 2 samples."""
    options: dict[str, Any] = {"dtype": "float64", "lr": 2.0, "schedule": CONSTANT, "data": {"limit": 10, "pack": pack}}
    options["trainer"] = {"precision": "64-true", "accumulate_grad_batches": accumulate}
    first = train(cleaning=Cleaning(scorer=Random(), selection=Selection(0.5)), **options)
    weights = np.random.default_rng(0).choice([0, 0.25, 1], len(first.pool)).astype(np.float32)
    weights[first.pool.tokens([first.data.pool_steps()[1][0]])] = 0
    np.save(first.folder / "cleaning" / "weights.npy", weights)
    wanted, losses = sgd_by_hand(first, plain_model(tiny_model, torch.float64), weights, lr=2.0)
    ran = train(cleaning=Cleaning(masks=first.masks), **options)
    state, start = adapter_state(ran.module), ran.steps.adapters[0]
    for key, value in wanted.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-9)
    assert max(float((value - start[key]).abs().max()) for key, value in wanted.items()) > 0.05
    np.testing.assert_allclose([float(row["train/loss"]) for row in ran.rows], losses, rtol=0, atol=1e-9)


def test_a_step_that_keeps_nothing_changes_nothing(train: Any, earlier: Ran, tmp_path: Path) -> None:
    """Steps 2 and 5 of 6, each of two micro-batches, under AdamW with momentum and weight decay."""
    masks = shutil.copytree(earlier.masks, tmp_path / "masks")
    weights = np.load(masks / "weights.npy")
    for step in (2, 5):
        weights[earlier.pool.tokens(earlier.data.pool_steps()[step])] = 0
    np.save(masks / "weights.npy", weights)
    decaying = functools.partial(torch.optim.AdamW, weight_decay=0.5)
    options = ADAMW | {"optimizer": decaying, "cleaning": Cleaning(masks=str(masks))}
    ran = train(trainer={"accumulate_grad_batches": 2}, **options)
    assert len(ran.steps.adapters) == len(ran.rows) + 1 == 7
    for step in range(6):
        assert same(*ran.steps.adapters[step : step + 2]) == (step in (2, 5))
        assert all(value.isfinite().all() for value in ran.steps.adapters[step + 1].values())
    for step in (2, 5):
        assert ran.steps.optimizer[step] and same(*ran.steps.optimizer[step : step + 2])
        assert ran.steps.losses[2 * step : 2 * step + 2] == [0.0, 0.0]
    assert all(math.isfinite(loss) for loss in ran.steps.losses)
    assert [float(row["cleaning/empty_steps"]) for row in ran.rows] == [0, 0, 1, 1, 1, 2]
    assert [float(row["cleaning/kept_fraction"]) for row in ran.rows][2::3] == [0, 0]


@pytest.mark.parametrize("part", ["data", "model"])
def test_masks_of_another_run_are_refused(part, tiny_model, source, earlier, tmp_path):
    model = tiny_model
    if part == "data":
        source = write_pairs(tmp_path / "samples.jsonl", make_samples(24, seed=1))
    else:
        model = changed_model(tiny_model, tmp_path / "other")
    trainer, module, data = build_sft(model, source, tmp_path / "run", cleaning=Cleaning(masks=earlier.masks))
    data.tokenizer = tiny_model
    with pytest.raises(InputError, match=r"cleaning\.masks") as error:
        trainer.fit(module, data)
    assert re.search(r"\(([a-z ]+): [^;]*\)", str(error.value)).group(1) == part  # and nothing else


def evolve(train: Any, scorer: Any = ExcessLoss(), **options: Any) -> Ran:  # noqa: B008
    """Three slices of 24 samples, two steps each."""
    cleaning = replace(EVOLVING, scorer=scorer, selection=Selection(0.6))
    return train(RefreshReference(), cleaning=cleaning, data={"slices": Slices(3)}, **ADAMW, **options)


@pytest.fixture(scope="module")
def evolved(train: Any) -> Ran:
    return evolve(train)


def of_slice(ran: Ran, number: int) -> tuple[list[Any], np.ndarray]:
    """Samples of a contiguous slice of 8, and the numbers of their tokens."""
    indices = range(8 * number, 8 * number + 8)
    return [ran.pool.samples[i] for i in indices], ran.pool.tokens(indices)


def under(plain: Any, samples: Any, adapters: Adapters) -> np.ndarray:
    """Losses under a policy with these adapters."""
    return losses_one_by_one(plain, samples, with_adapters(plain, adapters, "policy"))


def test_slice_2_is_scored_by_what_a_run_of_two_slices_leaves(train, tiny_model, plain, evolved):
    from peft import PeftModel

    stopped = evolve(train, trainer={"max_steps": 4})
    assert (stopped.array("decided") == [0] * 8 + [1] * 8 + [-1] * 8).all()
    assert (evolved.array("decided") == [0] * 8 + [1] * 8 + [2] * 8).all()
    samples, tokens = of_slice(evolved, 2)
    left = PeftModel.from_pretrained(plain_model(tiny_model), str(stopped.folder / "adapter")).eval()
    scores = losses_one_by_one(plain, samples) - losses_one_by_one(left.get_base_model(), samples)
    np.testing.assert_allclose(evolved.array("scores")[tokens], scores, rtol=0, atol=1e-6)
    assert np.abs(scores).max() > 0.05
    trained = np.concatenate([of_slice(evolved, number)[1] for number in (0, 1)])
    for name in ("scores", "weights"):  # where the run ends moves no boundary
        assert np.array_equal(stopped.array(name)[trained], evolved.array(name)[trained], equal_nan=True)
        assert np.isnan(stopped.array(name)[tokens]).all()
    assert all(torch.equal(v, evolved.steps.adapters[4][k]) for k, v in adapter_weights(stopped.module).items())


def test_every_slice_is_scored_by_base_and_latest_and_ranked_by_itself(evolved: Ran, plain: Any) -> None:
    scores, weights = evolved.array("scores"), evolved.array("weights")
    _, warm_up = of_slice(evolved, 0)
    assert np.isnan(scores[warm_up]).all() and (weights[warm_up] == 1).all()
    for number in (1, 2):
        samples, tokens = of_slice(evolved, number)
        wanted = losses_one_by_one(plain, samples) - under(plain, samples, evolved.steps.adapters[2 * number])
        np.testing.assert_allclose(scores[tokens], wanted, rtol=0, atol=1e-6)
        assert np.array_equal(weights[tokens], best(scores[tokens]))
        assert evolved.stages()[number]["kept_tokens"] == round(0.6 * len(tokens))
    base = {key: value for key, value in evolved.module.model.get_base_model().named_parameters() if "lora_" not in key}
    original = plain.state_dict()
    assert base and all(torch.equal(v, original[key.replace(".base_layer", "")]) for key, v in base.items())


def test_a_moving_base_is_the_reference_before(train: Any, plain: Any) -> None:
    moving = evolve(train, ExcessLoss(worse="previous"))
    for number in (1, 2):
        samples, tokens = of_slice(moving, number)
        before, latest = (under(plain, samples, moving.steps.adapters[2 * number - back]) for back in (2, 0))
        np.testing.assert_allclose(moving.array("scores")[tokens], before - latest, rtol=0, atol=1e-6)
        assert np.abs(before - latest).max() > 0.02


def test_refreshing_within_a_stage_rescores_what_comes_next(train: Any, plain: Any, earlier: Ran) -> None:
    """Six steps: the given reference scores all, the policy of step 2 steps 2 to 5, that of step 4 steps 4 and 5."""
    cleaning = Cleaning(reference=str(earlier.folder / "adapter"), selection=Selection(0.6))
    ran = train(RefreshReference(every=2), cleaning=cleaning, trainer={"accumulate_grad_batches": 2}, **ADAMW)
    planned, weights = ran.data.pool_steps(), ran.array("weights")
    base = losses_one_by_one(plain, ran.pool.samples)
    references = [earlier.steps.adapters[-1], ran.steps.adapters[2], ran.steps.adapters[4]]
    for turn, adapters in enumerate(references):
        scores = base - under(plain, ran.pool.samples, adapters)
        trained = sorted(i for step in planned[2 * turn : 2 * turn + 2] for i in step)
        tokens = ran.pool.tokens(trained)
        np.testing.assert_allclose(ran.array("scores")[tokens], scores[tokens], rtol=0, atol=1e-6)
        assert (ran.array("decided")[trained] == turn).all()
        coming = ran.pool.tokens(sorted(i for step in planned[2 * turn :] for i in step))
        mask = np.zeros(len(ran.pool), dtype=bool)
        mask[coming] = best(scores[coming])
        assert np.array_equal(weights[tokens], mask[tokens])
    for batch in ran.steps.batches:
        assert torch.equal(batch.token_weight, torch.from_numpy(weights[batch.token.numpy()]))


@pytest.mark.parametrize("stage_start", ["continue", "restart", "fresh_adapter"])
def test_what_a_stage_starts_with(stage_start: Any, train: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages of two steps, of two micro-batches each: the same function, and what the optimizer remembers."""
    starts, start = [], SFTModule.on_train_batch_start

    def watched(self: Any, *arguments: Any) -> None:
        before = as_role(self.model)
        start(self, *arguments)
        starts.append((before, as_role(self.model)))

    monkeypatch.setattr(SFTModule, "on_train_batch_start", watched)
    cleaning = replace(EVOLVING, selection=Selection(0.6))
    options: dict[str, Any] = {"trainer": {"accumulate_grad_batches": 2}, "stage_start": stage_start, **ADAMW}
    options["data"] = {"slices": Slices(3), "batch_size": 2, "limit": 12}
    ran = train(RefreshReference(), cleaning=cleaning, **options | {"lr": 0.05})
    remembered = [{float(v) for k, v in state.items() if k.endswith(" step")} for state in ran.steps.optimizer[1:]]
    assert remembered == [{float(n)} for n in ([1, 2, 3, 4, 5, 6] if stage_start == "continue" else [1, 2] * 3)]
    for step in (4, 8):  # micro-batches that begin a stage
        torch.testing.assert_close(*starts[step], rtol=0, atol=1e-6)
        assert (starts[step + 2][0] - starts[step][1]).abs().max() > 1e-3
    for state, steps in zip(ran.steps.optimizer[1:], remembered, strict=True):
        moments = [(state[f"{i} exp_avg"], state[f"{i} exp_avg_sq"]) for i in range(len(state) // 3)]
        # after one AdamW step m is 0.1 g and v is 0.001 g²; with a past they are not
        assert all(torch.allclose(v, 0.1 * m**2, rtol=1e-4) for m, v in moments) == (steps == {1.0})
    final = adapter_state(ran.module)
    names = {key.split(".lora_A.")[1].split(".")[0] for key in final if ".lora_A." in key}
    if stage_start == "fresh_adapter":
        for stage, end in ((1, 2), (2, 4)):
            for key, value in policy_of(ran.steps.adapters[end]).items():
                assert torch.equal(final[key.replace(".policy.", f".stage_{stage}.")], value)
    else:
        assert names == {"policy", "cleaning_reference"}
    assert {name for name, p in ran.module.named_parameters() if p.requires_grad} == set(policy_of(final))
    stack = [*sorted(names - {"policy", "cleaning_reference"}), "policy"]
    trained = as_role(ran.module.model)
    assert (trained - alone(plain)).abs().max() > 0.1
    torch.testing.assert_close(trained, alone(plain, with_adapters(plain, final, *stack)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("max_steps", "schedule_steps", "scored"), [
    (-1, None, [(0, 12), (2, 12), (4, 8)]), (4, None, [(0, 12), (2, 8)]), (4, 6, [(0, 12), (2, 12)]),
])  # fmt: skip
def test_another_epoch_is_cleaned_by_the_reference_in_force(max_steps, schedule_steps, scored, train, earlier):
    """3 steps × 2 epochs, refreshes at steps 2 and 4: step 3 trains again what step 0 trained by the old scores. What
    is never trained again keeps the weights that it was trained with; a run that pauses goes on."""
    options = {"trainer": {"max_epochs": 2, "max_steps": max_steps}, "schedule_steps": schedule_steps}
    cleaning = Cleaning(reference=str(earlier.folder / "adapter"))
    ran = train(RefreshReference(every=2), cleaning=cleaning, data={"limit": 12}, **options)
    assert [(stage["step"], stage["samples"]) for stage in ran.stages()] == scored
    if max_steps == -1:
        assert (ran.array("decided")[list(ran.data.pool_steps()[0])] == 1).all()


def min_max(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.min()) / (np.ptp(scores) or 1)


SIXTY, SAMPLE = Selection(0.6, scope="batch"), Selection(0.6, scope="sample")
HISTORY = ExcessLoss("cleaning_reference", "policy", normalise=True)
ONLINE: dict[str, tuple[Any, Selection | None, Any]] = {
    "rho": (ExcessLoss("policy", "cleaning_reference"), SIXTY, lambda policy, reference: policy - reference),
    "profit": (Probability(), Selection(None, 0.04), lambda policy, _: np.exp(-policy)),
    "dft": (Probability(), None, lambda policy, _: np.exp(-policy)),
    "high_loss": (Loss(), SIXTY, lambda policy, _: policy),
    "ss_token": (HISTORY, SAMPLE, lambda policy, reference: min_max(reference - policy)),
}


@pytest.mark.parametrize("name", ONLINE)
def test_online_scorers(name: str, train: Any, plain: Any, earlier: Ran) -> None:
    scorer, selection, score = ONLINE[name]
    reference = str(earlier.folder / "adapter") if "cleaning_reference" in scorer.roles else None
    cleaning = Cleaning(scorer=scorer, selection=selection, reference=reference)
    ran = train(cleaning=cleaning, data={"limit": 12}, trainer={"accumulate_grad_batches": 2}, **ADAMW)
    weights, scores, samples = ran.array("weights"), ran.array("scores"), ran.pool.samples
    assert np.isfinite(ran.steps.losses).all() and np.isfinite(weights).all() and np.isfinite(scores).all()
    policy, given = losses_one_by_one(plain, samples), under(plain, samples, earlier.steps.adapters[-1])  # B is 0
    places = {sample_id: place for place, sample_id in enumerate(samples["sample_id"])}
    for number, batch in enumerate(ran.steps.batches):
        tokens, samples_of_batch = batch.token.numpy(), [places[each] for each in batch.ids.tolist()]
        assert np.array_equal(batch.token_weight.numpy(), weights[tokens])
        for group in [ran.pool.tokens([i]) for i in samples_of_batch] if selection is SAMPLE else [tokens]:
            if selection in (SIXTY, SAMPLE):
                assert weights[group].sum() == round(0.6 * len(group)) and set(weights[group]) <= {0, 1}
            if number < 2:  # the micro-batches of the first step
                wanted = score(policy[group], given[group])
                np.testing.assert_allclose(scores[group], wanted, rtol=0, atol=1e-5)
                if selection is None:
                    np.testing.assert_allclose(weights[group], wanted, rtol=0, atol=1e-5)
                else:
                    kept = best(wanted) if selection.keep_ratio else wanted > 0.04
                    assert np.array_equal(weights[group], kept) and 0 < kept.sum() < len(kept)
    (stage,) = ran.stages()
    assert (stage["tokens"], stage["kept_tokens"]) == (len(weights), (weights > 0).sum())
    assert stage["kept_share"] == pytest.approx(weights.mean())


def entropies(plain: Any, sample: Any, weights: Any, top: int | None) -> Tensor:
    """−Σ q ln q of each response token's prediction: one forward, and a loop over the sorted probabilities."""
    ids, spans, found = torch.tensor([sample["input_ids"]]), sample["spans"], []
    p = torch.func.functional_call(plain, dict(weights), (ids,)).logits[0].softmax(-1).tolist()
    for place in (t for start, end in zip(spans[::2], spans[1::2], strict=True) for t in range(start, end)):
        best = sorted(p[place - 1], reverse=True)[:top]
        found.append(-sum(q / sum(best) * math.log(q / sum(best)) for q in best))
    return torch.tensor(found)


@pytest.mark.parametrize("scorer", [Probability(), Entropy(), Entropy(top=4, scale=1.5, power=2.0)], ids=repr)
def test_a_score_of_the_policy_weighs_without_a_gradient_through_it(scorer: Any, train: Any, plain: Any) -> None:
    """DFT and EAFT. One SGD step: Σ w·nll / Σ w with w held fixed."""
    options = {"data": {"limit": 4}, "trainer": {"accumulate_grad_batches": 2}, "schedule": CONSTANT, "lr": 1.0}
    ran = train(cleaning=Cleaning(scorer=scorer, selection=None), **options)
    adapters, samples = policy_of(ran.steps.adapters[0]), ran.pool.samples
    weights = with_adapters(plain, adapters, "policy")
    log_probs = torch.cat([one_by_one(plain, sample, weights) for sample in samples])
    if isinstance(scorer, Entropy):
        by_hand = torch.cat([entropies(plain, sample, weights, scorer.top) for sample in samples])
        w = (by_hand / scorer.scale) ** scorer.power
    else:
        w = log_probs.exp().detach()
    loss = -(w * log_probs).sum() / w.sum()
    np.testing.assert_allclose(ran.array("weights"), w, rtol=0, atol=1e-5)
    assert float(ran.rows[0]["train/loss"]) == pytest.approx(float(loss.detach()), abs=1e-5)
    gradients = torch.autograd.grad(loss, list(adapters.values()))
    for (key, value), gradient in zip(adapters.items(), gradients, strict=True):
        torch.testing.assert_close(adapter_state(ran.module)[key], (value - gradient).detach(), rtol=0, atol=1e-5)
    assert ran.module.lora.alpha / ran.module.lora.rank == SCALE


@dataclass(frozen=True)
class Drift:
    roles, needs = (), (entropy, divergence)

    def __call__(self, statistics: Any) -> Tensor:
        return statistics.measured[1]


ANCHORED = [(None, 0.3), (Probability(), 0.3), (Drift(), 0.3), (Drift(), 0.0), (Entropy(top=None, scale=1.0), 0.0)]


@pytest.mark.parametrize(("scorer", "kl_weight"), ANCHORED, ids=repr)
def test_divergence_from_the_base(scorer, kl_weight, train, plain, earlier, monkeypatch) -> None:
    """In the loss (ASFT, plain SFT) and in one's own scorer. One SGD step: Σ (w·nll + λ·KL) / Σ w, w held fixed."""
    roles: list[str] = []
    monkeypatch.setattr("lightning_modules.sft.role", lambda model, name: roles.append(name) or role(model, name))
    options = {"data": {"limit": 4}, "trainer": {"accumulate_grad_batches": 2}, "lr": 1.0, "kl_weight": kl_weight}
    ran = train(adapter=str(earlier.folder / "adapter"), cleaning=scorer and Cleaning(scorer, None), **options)
    assert roles == ["base"] * (0 if isinstance(scorer, Entropy) else 2), "once in each micro-batch that reads it"
    adapters, found = policy_of(ran.steps.adapters[0]), []
    for sample in ran.pool.samples:
        ids, spans = torch.tensor([sample["input_ids"]]), sample["spans"]
        weights = with_adapters(plain, adapters, "policy")
        p = torch.func.functional_call(plain, weights, (ids,)).logits[0].softmax(-1)
        b = plain(ids).logits[0].softmax(-1).detach()
        for t in (t for start, end in zip(spans[::2], spans[1::2], strict=True) for t in range(start, end)):
            kl = (b[t - 1] * (b[t - 1] / p[t - 1]).log()).sum()
            found.append(torch.stack([p[t - 1, ids[0, t]].log(), kl, -(p[t - 1] * p[t - 1].log()).sum()]))
    log_p, kl, uncertainty = torch.stack(found).T
    w = {Probability: log_p.exp(), Drift: kl, Entropy: uncertainty}.get(type(scorer), torch.ones(len(kl))).detach()
    assert kl.mean() > 0.01 and ("train/kl" in ran.rows[0]) == (kl_weight > 0)
    assert float(ran.rows[0].get("train/kl", kl.detach().mean())) == pytest.approx(float(kl.detach().mean()), rel=1e-4)
    if scorer is not None:
        np.testing.assert_allclose(ran.array("scores"), w, rtol=1e-3, atol=1e-5)
    gradients = torch.autograd.grad((kl_weight * kl - w * log_p).sum() / w.sum(), list(adapters.values()))
    for (key, value), gradient in zip(adapters.items(), gradients, strict=True):
        torch.testing.assert_close(adapter_state(ran.module)[key], (value - gradient).detach(), rtol=0, atol=1e-5)


def with_column(earlier: Ran, path: Path, shift: float = 0.0) -> list[dict[str, Any]]:
    """The rows of `earlier` with its scores, as docs/token_scores.md makes a column."""
    run, rows = read_cleaning(str(earlier.folder)), [dict(row) for row in SOURCE_ROWS]
    for index, sample in enumerate(run.pool.samples):
        scores = run.scores[run.pool.of_sample(index)]
        rows[sample["row"] - 1]["quality"] = (scores + shift).tolist()
    write_pairs(path, rows)
    return rows


@pytest.mark.parametrize("one_each", [False, True])
def test_scores_come_from_a_column(one_each, tiny_model, earlier, tmp_path) -> None:
    """The masks of the run that had made the scores; with a sample for each response, the same tokens by them."""
    with_column(earlier, tmp_path / "rows.jsonl")
    options: dict[str, Any] = {"cleaning": Cleaning(scorer=Column("quality"), selection=Selection(0.5))}
    options["data"] = {"one_response_per_sample": one_each}
    ran = run(tiny_model, str(tmp_path / "rows.jsonl"), tmp_path / "run", **options, **ADAMW | {"lr": 0.03})
    for name in ("scores", "weights"):
        assert np.array_equal(ran.array(name), earlier.array(name))
    assert one_each or same(adapter_weights(ran.module), adapter_weights(earlier.module))
    assert ran.stages()[0]["scorer"] == "Column(column='quality')"


def test_numbers_of_a_column_that_do_not_fit_are_refused(tiny_model, earlier, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = with_column(earlier, path)
    count = len(rows[2]["quality"])
    options: dict[str, Any] = {"cleaning": Cleaning(scorer=Column("quality"), selection=Selection(0.5))}

    def refused(**more: Any) -> str:
        with pytest.raises(InputError) as error:
            run(tiny_model, str(path), tmp_path / "run", **options, **more)
        return str(error.value)

    for value in (None, "0.5", rows[2]["quality"][1:], ["0.5"] * count, [*rows[2]["quality"], 1]):
        write_pairs(path, [*rows[:2], rows[2] | {"quality": value}, *rows[3:]])
        told = refused()
        assert f"{path}, row 3: 'quality' should list {count} numbers" in told
    write_pairs(path, rows)
    assert "row " in (told := refused(data={"max_length": 20})) and "data.overlong" in told  # cut rows
    first = run(tiny_model, str(path), tmp_path / "first", trainer={"max_steps": 1}, schedule=CONSTANT, **options)
    with_column(earlier, path, shift=1.0)  # of a continued run, whose scores so far would be of other numbers
    last = str(first.folder / "checkpoints/last.ckpt")
    assert "had other numbers in the column 'quality'" in refused(ckpt_path=last, schedule=CONSTANT)


@given(
    samples=st.integers(8, 60),
    slices=st.builds(Slices, st.integers(1, 8), st.sampled_from(["contiguous", "shuffled"]), passes=st.integers(1, 3)),
    batch_size=st.integers(1, 9),
)
def test_stages_are_equal_slices_that_hold_every_sample_once(samples: int, slices: Slices, batch_size: int) -> None:
    stages = plan_stages(samples, slices, batch_size=batch_size)
    sizes = [len(stage.samples) for stage in stages]
    assert len(stages) == slices.count and sum(sizes) == samples and max(sizes) - min(sizes) <= 1
    assert sorted(i for stage in stages for i in stage.samples) == list(range(samples))
    if slices.split == "contiguous":
        assert [i for stage in stages for i in sorted(stage.samples)] == list(range(samples))
    for number, (stage, size) in enumerate(zip(stages, sizes, strict=True)):
        assert stage.slice == number and all(1 <= len(step) <= batch_size for step in stage.steps)
        assert len(stage.steps) == slices.passes * math.ceil(size / batch_size)
        order = [i for step in stage.steps for i in step]
        for turn in range(slices.passes):
            assert sorted(order[turn * size : (turn + 1) * size]) == sorted(stage.samples)
    if slices.count > 1:  # some slices alone are what they are among all, and a plan is the same each time
        only = plan_stages(samples, replace(slices, only=[1]), batch_size=batch_size)
        assert [(stage.slice, stage.steps) for stage in only] == [(1, stages[1].steps)]


REFRESH = RefreshReference()
OTHERS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str]] = {
    "selection": ((BASE_LOSS,), (replace(BASE_LOSS, selection=Selection(0.2)),), r"cleaning\.selection: .*0\.2"),
    "masks dropped": ((Cleaning(masks="earlier"),), (None,), r"cleaning: .*masks of .* there, None here"),
    "a longer warm-up": ((BASE_LOSS,), (replace(BASE_LOSS, warm_up_stages=1),), r"warm_up_stages: 0 there, 1 here"),
    "another reference": ((Cleaning(reference="a"),), (Cleaning(reference="b"),), r"\.reference: .*a there, .*b"),
    "refreshed no more": ((EVOLVING, REFRESH), (EVOLVING,), r"RefreshReference: .* there, None here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_with_another_cleaning_is_refused(name, train, tiny_model, earlier, tmp_path):
    def go(cleaning: Cleaning | None, *refresh: Any, **options: Any) -> Ran:
        if cleaning and cleaning.reference:
            cleaning = replace(cleaning, reference=saved_adapter(tiny_model, tmp_path / cleaning.reference, rank=4))
        if cleaning and cleaning.masks:
            cleaning = replace(cleaning, masks=earlier.masks)
        options |= {"trainer": {"max_steps": 1}, "schedule": CONSTANT, "data": {"slices": Slices(3)}}
        return train(*refresh, cleaning=cleaning, **options)

    first, other, message = OTHERS[name]
    checkpoint = go(*first).folder / "checkpoints/last.ckpt"
    with pytest.raises(InputError, match=f"another run.*{message}"):
        go(*other, ckpt_path=str(checkpoint))


def test_base_losses_belong_to_how_they_were_computed(train, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    for attention in ("by_segment", "sdpa", "sdpa"):
        train(cleaning=BASE_LOSS, attention=attention, data={"pack": 0, "limit": 4})
    heads = [read_store(path, "token losses", "")[0] for path in (tmp_path / "token_losses").iterdir()]
    computed = sorted(head["computed"].replace("'", "").strip("[]").split(", ") for head in heads)
    assert [(each[0], each[-1]) for each in computed] == [("by_segment", "cpu"), ("sdpa", "cpu")]


def test_a_reference_of_another_scale_cannot_be_refreshed(train: Any, tiny_model: str, tmp_path: Path) -> None:
    """At the start, not after the first stage has been trained."""
    cleaning = Cleaning(reference=saved_adapter(tiny_model, tmp_path, rank=4, alpha=32))
    with pytest.raises(InputError, match="rank, alpha or targets"):
        train(RefreshReference(), cleaning=cleaning, data={"slices": Slices(2)})


def test_a_reference_may_have_fewer_modules(train: Any, tiny_model: str, tmp_path: Path) -> None:
    ran = train(cleaning=Cleaning(reference=saved_adapter(tiny_model, tmp_path, targets=["q_proj", "v_proj"])))
    prints = {adapter_fingerprint(ran.module.model, name) for name in ("policy", "cleaning_reference")}
    assert len(prints) == 2 and "none" not in prints and ran.array("scores").any()


@pytest.mark.parametrize("worse", ["previous", "base"])
def test_a_scorer_of_one_model_under_two_names_is_refused(worse, train, tiny_model, tmp_path):
    """A given adapter starts policy, reference and previous alike: all scores would be 0, the first tokens be kept."""
    start = saved_adapter(tiny_model, tmp_path) if worse == "previous" else None
    options: dict[str, Any] = {"cleaning": Cleaning(scorer=ExcessLoss(worse=worse)), "adapter": start}
    with pytest.raises(InputError, match=f"every score would be 0: {worse} and cleaning_reference"):
        train(RefreshReference(), data={"slices": Slices(3, only=[1, 2])}, **options)
