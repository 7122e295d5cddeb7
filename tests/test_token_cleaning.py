"""SFT on cleaned tokens: what is scored by whom, what a step's loss is, and what a run refuses."""

import csv
import functools
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEMPLATE, adapter_weights, build_sft, fit, make_samples, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from test_token_losses import SCALE, losses_one_by_one, one_by_one, plain_model, with_adapters
from torch import Tensor

from lightning_modules.callbacks.clean_tokens import RefreshReference
from mixdpo.batches.steps import Slices, plan_stages
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, adapter_state
from mixdpo.routing.schedules import Constant
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss, Probability, Random
from mixdpo.token_cleaning.selection import Selection

ADAMW: dict[str, Any] = {"optimizer": torch.optim.AdamW, "lr": 1e-2, "schedule": Constant(warmup=0.0)}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXDPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data") / "samples.jsonl", make_samples(24))


@pytest.fixture(scope="module")
def plain(tiny_model: str) -> Any:
    return plain_model(tiny_model)


class Steps(Callback):
    """What each optimizer step started from (and, last, where the run ended), and what each micro-batch was."""

    def __init__(self) -> None:
        self.adapters: list[dict[str, Tensor]] = []
        self.optimizer: list[dict[str, Tensor]] = []
        self.batches: list[Any] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((trainer.global_step, batch))
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step >= len(self.adapters):
            self._keep(trainer, pl_module)

    def _keep(self, trainer: Any, pl_module: Any) -> None:
        self.adapters.append({key: value.clone() for key, value in adapter_state(pl_module).items()})
        states = trainer.optimizers[0].state.values()
        self.optimizer.append({f"{i} {key}": v.clone() for i, state in enumerate(states) for key, v in state.items()})


@dataclass
class Ran:
    module: Any
    steps: Steps
    rows: list[dict[str, str]]
    folder: Path

    @property
    def pool(self) -> Any:
        return self.module.trainer.datamodule.cleaning_pool()

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / "cleaning" / f"{name}.npy")

    def stages(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "cleaning" / "stages.json").read_text())["stages"]


def run(
    model: str, source: str, folder: Path, *, first: tuple[Any, ...] = (), trainer: Any = None, **options: Any
) -> Ran:
    steps = Steps()
    logger = CSVLogger(folder / "log", name="", version="")
    trainer = {"first": (*first, steps), "logger": logger, **(trainer or {})}
    module = fit(model, source, folder, make=build_sft, trainer=trainer, **options)
    with (folder / "log" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return Ran(module, steps, rows, folder)


@pytest.fixture(scope="module")
def earlier(tiny_model: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run on random tokens, whose adapter and whose masks others use."""
    cleaning = Cleaning(scorer=Random(), selection=Selection(0.5))
    return run(
        tiny_model, source, tmp_path_factory.mktemp("earlier") / "run", cleaning=cleaning, **ADAMW | {"lr": 0.03}
    )


def best(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Mask of the round(k·m) highest scores, by sorting; of equal ones the earlier."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    mask = np.zeros(len(scores), dtype=bool)
    mask[order[: round(ratio * len(scores))]] = True
    return mask


def same_adapters(one: Any, other: Any) -> bool:
    ours, theirs = adapter_weights(one), adapter_weights(other)
    return set(ours) == set(theirs) and all(torch.equal(value, theirs[key]) for key, value in ours.items())


# Keeping everything ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ones:
    roles: tuple[str, ...] = ()

    def __call__(self, statistics: Any) -> Tensor:
        return torch.ones(len(statistics.token))


DROPOUT: dict[str, Any] = {**ADAMW, "lora": Lora(rank=4, alpha=8, dropout=0.3), "data": {"limit": 12}}


@pytest.fixture(scope="module")
def full(tiny_model: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run(tiny_model, source, tmp_path_factory.mktemp("full") / "run", **DROPOUT)


KEEP_ALL = {
    "random": {"scorer": Random(), "selection": Selection(1.0)},
    "excess": {"scorer": ExcessLoss(), "selection": Selection(1.0, scope="sample"), "reference": "earlier"},
    "weights": {"scorer": Ones(), "selection": None},
    "online": {"scorer": Loss(), "selection": Selection(1.0, scope="batch")},
}


@pytest.mark.parametrize("name", KEEP_ALL)
def test_keeping_all_is_full_sft_to_the_bit(
    name: str, tiny_model: str, source: str, full: Ran, earlier: Ran, tmp_path: Path
) -> None:
    """With dropout: scoring draws no random numbers."""
    options = dict(KEEP_ALL[name])
    if "reference" in options:
        options["reference"] = str(earlier.folder / "adapter")
    kept = run(tiny_model, source, tmp_path / "run", cleaning=Cleaning(**options), **DROPOUT)
    assert same_adapters(full.module, kept.module)
    assert [row["train/loss"] for row in kept.rows] == [row["train/loss"] for row in full.rows]
    assert [float(row["cleaning/kept_fraction"]) for row in kept.rows] == [1.0] * 3
    assert (kept.array("weights") == 1).all()


# The loss of a step ---------------------------------------------------------------------------------------------------


@contextmanager
def full_precision_norms() -> Iterator[None]:
    """transformers rounds RMSNorm to fp32 even in an fp64 model, which blurs 1e-16 differences to 1e-8."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


def sgd_by_hand(ran: Ran, plain: Any, weights: np.ndarray, lr: float) -> tuple[dict[str, Tensor], list[float]]:
    """The run's steps from its first adapters, one sample at a time: −Σ w log p / Σ w over the step's tokens."""
    pool = ran.pool
    adapters = {k: v.clone().requires_grad_() for k, v in ran.steps.adapters[0].items() if ".policy." in k}
    logged = []
    for step in ran.module.trainer.datamodule.pool_steps():
        total, kept = torch.zeros((), dtype=torch.float64), 0.0
        for i in step:
            weight = torch.from_numpy(weights[pool.offsets[i] : pool.offsets[i + 1]]).double()
            total = (
                total - (weight * one_by_one(plain, pool.samples[i], with_adapters(plain, adapters, "policy"))).sum()
            )
            kept += float(weight.sum())
        gradients = torch.autograd.grad(total / kept, list(adapters.values()))
        logged.append(float(total.detach()) / kept)
        for (key, value), gradient in zip(list(adapters.items()), gradients, strict=True):
            adapters[key] = (value.detach() - lr * gradient).requires_grad_()
    return {key: value.detach() for key, value in adapters.items()}, logged


EXACT: dict[str, Any] = {"dtype": "float64", "lr": 2.0, "schedule": Constant(warmup=0.0)}


@dataclass
class ByHand:
    masks: str
    adapters: dict[str, Tensor]
    losses: list[float]


@pytest.fixture(scope="module")
def by_hand(tiny_model: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    """Weights 0, ¼ and 1, one sample without any, over steps of 4, 4 and 2 samples."""
    folder = tmp_path_factory.mktemp("exact") / "run"
    cleaning = Cleaning(scorer=Random(), selection=Selection(0.5))
    with full_precision_norms():
        trainer = {"precision": "64-true"}
        ran = run(tiny_model, source, folder, cleaning=cleaning, trainer=trainer, data={"limit": 10}, **EXACT)
        weights = np.random.default_rng(0).choice([0, 0.25, 1], len(ran.pool)).astype(np.float32)
        weights[ran.pool.tokens([ran.module.trainer.datamodule.pool_steps()[1][0]])] = 0
        np.save(folder / "cleaning" / "weights.npy", weights)
        result = sgd_by_hand(ran, plain_model(tiny_model, torch.float64), weights, lr=2.0)
    return ByHand(str(folder / "cleaning"), *result)


@pytest.mark.parametrize("pack", [0, 64])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_is_normalised_by_its_kept_weight(
    accumulate: int, pack: int, by_hand: ByHand, tiny_model: str, source: str, tmp_path: Path
) -> None:
    with full_precision_norms():
        ran = run(
            tiny_model,
            source,
            tmp_path / "run",
            cleaning=Cleaning(masks=by_hand.masks),
            trainer={"precision": "64-true", "accumulate_grad_batches": accumulate},
            data={"limit": 10, "pack": pack},
            **EXACT,
        )
    moved = 0.0
    for key, value in by_hand.adapters.items():
        torch.testing.assert_close(adapter_state(ran.module)[key], value, rtol=0, atol=1e-9)
        moved = max(moved, float((value - ran.steps.adapters[0][key]).abs().max()))
    assert moved > 0.05
    np.testing.assert_allclose([float(row["train/loss"]) for row in ran.rows], by_hand.losses, rtol=0, atol=1e-9)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_keeps_nothing_changes_nothing(
    accumulate: int, tiny_model: str, source: str, earlier: Ran, tmp_path: Path
) -> None:
    """Steps 2 and 5 of 6, under AdamW with momentum and weight decay."""
    masks = shutil.copytree(earlier.folder / "cleaning", tmp_path / "masks")
    weights = np.load(masks / "weights.npy")
    planned = earlier.module.trainer.datamodule.pool_steps()
    for step in (2, 5):
        weights[earlier.pool.tokens(planned[step])] = 0
    np.save(masks / "weights.npy", weights)
    decaying = functools.partial(torch.optim.AdamW, weight_decay=0.5)
    options = ADAMW | {"optimizer": decaying, "cleaning": Cleaning(masks=str(masks))}
    ran = run(tiny_model, source, tmp_path / "run", trainer={"accumulate_grad_batches": accumulate}, **options)
    assert len(ran.steps.adapters) == len(ran.rows) + 1 == 7
    for step in range(6):
        before, after = ran.steps.adapters[step : step + 2]
        assert all(torch.equal(before[key], after[key]) for key in before) == (step in (2, 5))
        assert all(value.isfinite().all() for value in after.values())
    for step in (2, 5):
        before, after = ran.steps.optimizer[step : step + 2]
        assert before and set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
        assert ran.steps.losses[accumulate * step : accumulate * (step + 1)] == [0.0] * accumulate
    assert all(math.isfinite(loss) for loss in ran.steps.losses)
    assert [float(row["cleaning/empty_steps"]) for row in ran.rows] == [0, 0, 1, 1, 1, 2]
    assert [float(row["cleaning/kept_fraction"]) for row in ran.rows][2::3] == [0, 0]
    assert "nan" not in (ran.folder / "log" / "metrics.csv").read_text()


# Masks of an earlier run ----------------------------------------------------------------------------------------------


def other_tokenizer(model: str, folder: Path) -> str:
    """Two words have changed their numbers."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    path.write_text(json.dumps(content))
    return str(folder)


def other_model(model: str, folder: Path) -> str:
    """One weight has changed."""
    changed = plain_model(model)
    changed.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1e-3
    shutil.copytree(model, folder)
    changed.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("part", ["data", "tokenizer", "template", "model"])
def test_masks_of_another_run_are_refused(
    part: str, tiny_model: str, source: str, earlier: Ran, tmp_path: Path
) -> None:
    model, tokenizer, options = tiny_model, tiny_model, {}
    if part == "data":
        source = write_pairs(tmp_path / "samples.jsonl", make_samples(24, seed=1))
    elif part == "tokenizer":
        tokenizer = other_tokenizer(tiny_model, tmp_path / "other")
    elif part == "template":
        with_tea = TEMPLATE.replace("{{ m['role'] }} {{", "{{ m['role'] }} tea {{")
        options = {"chat_template": with_tea.replace("assistant {%", "assistant tea {%")}
    else:
        model = other_model(tiny_model, tmp_path / "other")
    cleaning = Cleaning(masks=str(earlier.folder / "cleaning"))
    trainer, module, data = build_sft(model, source, tmp_path / "run", cleaning=cleaning, data=options)
    data.tokenizer = tokenizer
    with pytest.raises(InputError, match=r"cleaning\.masks") as error:
        trainer.fit(module, data)
    assert re.search(r"\(([a-z ]+): [^;]*\)", str(error.value)).group(1) == part  # and nothing else


def test_masks_that_are_not_there_are_refused(tiny_model: str, source: str, tmp_path: Path) -> None:
    cleaning = Cleaning(masks=str(tmp_path))
    with pytest.raises(InputError, match="RUN/cleaning"):
        fit(tiny_model, source, tmp_path / "run", make=build_sft, cleaning=cleaning)


# Self-evolving cleaning -----------------------------------------------------------------------------------------------


def evolve(model: str, source: str, folder: Path, *, scorer: Any = None, ema: float = 0.0, **options: Any) -> Ran:
    """Three slices of 24 samples, two steps each."""
    cleaning = Cleaning(scorer=scorer or ExcessLoss(), selection=Selection(0.6), warm_up_stages=1)
    first = (RefreshReference(ema=ema),)
    return run(model, source, folder, first=first, cleaning=cleaning, data={"slices": Slices(3)}, **ADAMW, **options)


@pytest.fixture(scope="module")
def evolved(tiny_model: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return evolve(tiny_model, source, tmp_path_factory.mktemp("evolved") / "run")


def of_slice(ran: Ran, number: int) -> tuple[list[Any], np.ndarray]:
    """Samples of a contiguous slice of 8, and the numbers of their tokens."""
    indices = range(8 * number, 8 * number + 8)
    return [ran.pool.samples[i] for i in indices], ran.pool.tokens(indices)


def test_slice_2_is_scored_by_what_a_run_of_two_slices_leaves(
    tiny_model: str, source: str, plain: Any, evolved: Ran, tmp_path: Path
) -> None:
    from peft import PeftModel

    stopped = evolve(tiny_model, source, tmp_path / "run", trainer={"max_steps": 4})
    assert (stopped.array("decided") == [0] * 8 + [1] * 8 + [-1] * 8).all()
    assert (evolved.array("decided") == [0] * 8 + [1] * 8 + [2] * 8).all()
    samples, tokens = of_slice(evolved, 2)
    base = losses_one_by_one(plain, samples)
    left = PeftModel.from_pretrained(plain_model(tiny_model), str(stopped.folder / "adapter")).eval()
    scores = base - losses_one_by_one(left.get_base_model(), samples)
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
        latest = with_adapters(plain, evolved.steps.adapters[2 * number], "policy")
        wanted = losses_one_by_one(plain, samples) - losses_one_by_one(plain, samples, latest)
        np.testing.assert_allclose(scores[tokens], wanted, rtol=0, atol=1e-6)
        assert np.array_equal(weights[tokens], best(scores[tokens], 0.6))
        assert evolved.stages()[number]["kept_tokens"] == round(0.6 * len(tokens))
    base = {key: value for key, value in evolved.module.model.get_base_model().named_parameters() if "lora_" not in key}
    original = plain.state_dict()
    assert base and all(torch.equal(v, original[key.replace(".base_layer", "")]) for key, v in base.items())


def test_a_moving_base_is_the_reference_before(tiny_model: str, source: str, plain: Any, tmp_path: Path) -> None:
    moving = evolve(tiny_model, source, tmp_path / "run", scorer=ExcessLoss(worse="previous"))
    for number in (1, 2):
        samples, tokens = of_slice(moving, number)
        before, latest = (
            losses_one_by_one(plain, samples, with_adapters(plain, moving.steps.adapters[step], "policy"))
            for step in (2 * number - 2, 2 * number)
        )
        np.testing.assert_allclose(moving.array("scores")[tokens], before - latest, rtol=0, atol=1e-6)
        assert np.abs(before - latest).max() > 0.02


def test_ema_is_the_mean_of_the_matrices(tiny_model: str, source: str, plain: Any, tmp_path: Path) -> None:
    ran = evolve(tiny_model, source, tmp_path / "run", ema=0.5)
    start, first, second = (ran.steps.adapters[step] for step in (0, 2, 4))
    keys = [key for key in start if ".policy." in key]
    mean = {key: 0.5 * (0.5 * start[key] + 0.5 * first[key]) + 0.5 * second[key] for key in keys}
    for key in keys:
        found = adapter_state(ran.module)[key.replace(".policy.", ".cleaning_reference.")]
        torch.testing.assert_close(found, mean[key], rtol=0, atol=1e-7)
    samples, tokens = of_slice(ran, 2)
    wanted = losses_one_by_one(plain, samples) - losses_one_by_one(plain, samples, with_adapters(plain, mean, "policy"))
    np.testing.assert_allclose(ran.array("scores")[tokens], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_refreshing_within_a_stage_rescores_what_comes_next(
    accumulate: int, tiny_model: str, source: str, plain: Any, earlier: Ran, tmp_path: Path
) -> None:
    """Six steps; the given reference scores all, the policy of step 2 steps 2 to 5, that of step 4 steps 4 and 5."""
    cleaning = Cleaning(reference=str(earlier.folder / "adapter"), selection=Selection(0.6))
    trainer = {"accumulate_grad_batches": accumulate}
    first = (RefreshReference(every=2),)
    ran = run(tiny_model, source, tmp_path / "run", first=first, cleaning=cleaning, trainer=trainer, **ADAMW)
    planned = ran.module.trainer.datamodule.pool_steps()
    base, weights = losses_one_by_one(plain, ran.pool.samples), ran.array("weights")
    references = [earlier.steps.adapters[-1], ran.steps.adapters[2], ran.steps.adapters[4]]
    for turn, adapters in enumerate(references):
        scores = base - losses_one_by_one(plain, ran.pool.samples, with_adapters(plain, adapters, "policy"))
        trained = sorted(i for step in planned[2 * turn : 2 * turn + 2] for i in step)
        tokens = ran.pool.tokens(trained)
        np.testing.assert_allclose(ran.array("scores")[tokens], scores[tokens], rtol=0, atol=1e-6)
        assert (ran.array("decided")[trained] == turn).all()
        coming = ran.pool.tokens(sorted(i for step in planned[2 * turn :] for i in step))
        mask = np.zeros(len(ran.pool), dtype=bool)
        mask[coming] = best(scores[coming], 0.6)
        assert np.array_equal(weights[tokens], mask[tokens])
    for step, batch in ran.steps.batches:
        assert torch.equal(batch.token_weight, torch.from_numpy(weights[batch.token.numpy()])), step


# Scorers that read the policy -----------------------------------------------------------------------------------------


def start_losses(ran: Ran, plain: Any, earlier: Ran) -> dict[str, np.ndarray]:
    """Where B is still 0: the policy is the base."""
    reference = with_adapters(plain, earlier.steps.adapters[-1], "policy")
    samples = ran.pool.samples
    return {
        "policy": losses_one_by_one(plain, samples),
        "cleaning_reference": losses_one_by_one(plain, samples, reference),
    }


def min_max(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.min()) / (np.ptp(scores) or 1)


SIXTY, SAMPLE = Selection(0.6, scope="batch"), Selection(0.6, scope="sample")
ONLINE: dict[str, tuple[Any, Selection | None, Any]] = {
    "rho": (
        ExcessLoss("policy", "cleaning_reference"),
        SIXTY,
        lambda losses: losses["policy"] - losses["cleaning_reference"],
    ),
    "profit": (Probability(), Selection(None, 0.04), lambda losses: np.exp(-losses["policy"])),
    "dft": (Probability(), None, lambda losses: np.exp(-losses["policy"])),
    "high_loss": (Loss(), SIXTY, lambda losses: losses["policy"]),
    "ss_token": (
        ExcessLoss("cleaning_reference", "policy", normalise=True),
        SAMPLE,
        lambda losses: min_max(losses["cleaning_reference"] - losses["policy"]),
    ),
}


@pytest.mark.parametrize("name", ONLINE)
def test_online_scorers(name: str, tiny_model: str, source: str, plain: Any, earlier: Ran, tmp_path: Path) -> None:
    scorer, selection, score = ONLINE[name]
    reference = str(earlier.folder / "adapter") if "cleaning_reference" in scorer.roles else None
    cleaning = Cleaning(scorer=scorer, selection=selection, reference=reference)
    options = {"data": {"limit": 12}, "trainer": {"accumulate_grad_batches": 2}, **ADAMW}
    ran = run(tiny_model, source, tmp_path / "run", cleaning=cleaning, **options)
    weights, scores, offsets = ran.array("weights"), ran.array("scores"), ran.pool.offsets
    assert np.isfinite(ran.steps.losses).all() and np.isfinite(weights).all() and np.isfinite(scores).all()
    losses = start_losses(ran, plain, earlier)
    for number, (_, batch) in enumerate(ran.steps.batches):
        tokens, samples = batch.token.numpy(), batch.sample.tolist()
        assert np.array_equal(batch.token_weight.numpy(), weights[tokens])
        groups = [np.arange(offsets[i], offsets[i + 1]) for i in samples] if selection is SAMPLE else [tokens]
        for group in groups:
            if selection in (SIXTY, SAMPLE):
                assert weights[group].sum() == round(0.6 * len(group)) and set(weights[group]) <= {0, 1}
            if number < 2:  # the micro-batches of the first step
                wanted = score({role: values[group] for role, values in losses.items()})
                np.testing.assert_allclose(scores[group], wanted, rtol=0, atol=1e-5)
                if selection is None:
                    np.testing.assert_allclose(weights[group], wanted, rtol=0, atol=1e-5)
                else:
                    kept = best(wanted, 0.6) if selection.keep_ratio else wanted > 0.04
                    assert np.array_equal(weights[group], kept) and 0 < kept.sum() < len(kept)
    assert same_kept(ran, weights)


def same_kept(ran: Ran, weights: np.ndarray) -> bool:
    (stage,) = ran.stages()
    return (stage["tokens"], stage["kept_tokens"], stage["kept_share"]) == (
        len(weights),
        int((weights > 0).sum()),
        pytest.approx(weights.mean()),
    )


def test_dft_weighs_by_its_own_probability_without_a_gradient_through_it(
    tiny_model: str, source: str, plain: Any, tmp_path: Path
) -> None:
    """One SGD step: Σ p·nll / Σ p with p held fixed."""
    cleaning = Cleaning(scorer=Probability(), selection=None)
    options = {"data": {"limit": 4}, "trainer": {"accumulate_grad_batches": 2}, "schedule": Constant(warmup=0.0)}
    ran = run(tiny_model, source, tmp_path / "run", cleaning=cleaning, lr=1.0, **options)
    adapters = {k: v.clone().requires_grad_() for k, v in ran.steps.adapters[0].items() if ".policy." in k}
    weights = with_adapters(plain, adapters, "policy")
    log_probs = torch.cat([one_by_one(plain, sample, weights) for sample in ran.pool.samples])
    p = log_probs.exp().detach()
    loss = -(p * log_probs).sum() / p.sum()
    assert float(ran.rows[0]["train/loss"]) == pytest.approx(float(loss.detach()), abs=1e-5)
    for (key, value), gradient in zip(
        adapters.items(), torch.autograd.grad(loss, list(adapters.values())), strict=True
    ):
        torch.testing.assert_close(adapter_state(ran.module)[key], (value - gradient).detach(), rtol=0, atol=1e-5)
    assert ran.module.lora.alpha / ran.module.lora.rank == SCALE


# Slices ---------------------------------------------------------------------------------------------------------------


@given(
    samples=st.integers(1, 60),
    count=st.integers(1, 8),
    split=st.sampled_from(["contiguous", "shuffled"]),
    passes=st.integers(1, 3),
    seed=st.integers(0, 3),
    batch_size=st.integers(1, 9),
)
def test_stages_are_equal_slices_that_hold_every_sample_once(
    samples: int, count: int, split: Any, passes: int, seed: int, batch_size: int
) -> None:
    slices = Slices(count, split, passes=passes, seed=seed)
    if samples < count:
        with pytest.raises(InputError, match=r"data\.slices\.count"):
            plan_stages(samples, slices, batch_size=batch_size)
        return
    stages = plan_stages(samples, slices, batch_size=batch_size)
    sizes = [len(stage.samples) for stage in stages]
    assert len(stages) == count and sum(sizes) == samples and max(sizes) - min(sizes) <= 1
    assert sorted(i for stage in stages for i in stage.samples) == list(range(samples))
    if split == "contiguous":
        assert [i for stage in stages for i in sorted(stage.samples)] == list(range(samples))
    for number, stage in enumerate(stages):
        assert stage.slice == number and all(1 <= len(step) <= batch_size for step in stage.steps)
        assert len(stage.steps) == passes * math.ceil(len(stage.samples) / batch_size)
        order = [i for step in stage.steps for i in step]
        for turn in range(passes):
            once = order[turn * len(stage.samples) : (turn + 1) * len(stage.samples)]
            assert sorted(once) == sorted(stage.samples)
    again = plan_stages(samples, slices, batch_size=batch_size)
    assert [stage.steps for stage in again] == [stage.steps for stage in stages]
    if count > 1:  # some slices alone are what they are among all
        only = plan_stages(samples, Slices(count, split, [1], passes, seed), batch_size=batch_size)
        assert [(stage.slice, stage.steps) for stage in only] == [(1, stages[1].steps)]


def test_shuffled_slices_follow_the_seed() -> None:
    members = {
        (split, seed): [
            tuple(sorted(stage.samples)) for stage in plan_stages(40, Slices(2, split, seed=seed), batch_size=4)
        ]
        for split in ("contiguous", "shuffled")
        for seed in (0, 1)
    }
    assert members["contiguous", 0] == members["contiguous", 1]
    assert len({tuple(value) for value in members.values()}) == 3


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"model\.cleaning\.reference.*warm_up_stages.*RefreshReference", {"cleaning": Cleaning()}),
        ("RefreshReference: nothing to refresh", {"trainer": {"first": (RefreshReference(),)}}),
        (
            "RefreshReference: nothing to refresh",
            {"trainer": {"first": (RefreshReference(),)}, "cleaning": Cleaning(scorer=Random())},
        ),
        (r"max_epochs 1; data\.slices\.passes", {"trainer": {"max_epochs": 2}, "data": {"slices": Slices(2)}}),
        (
            r"no token '<\|nowhere\|>'",
            {"cleaning": Cleaning(scorer=Random(), selection=Selection(always_keep=["<|im_end|>", "<|nowhere|>"]))},
        ),
    ],
)
def test_a_run_that_could_not_mean_anything_is_refused(
    message: str, options: dict[str, Any], tiny_model: str, source: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        fit(tiny_model, source, tmp_path / "run", make=build_sft, **options)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("scope batch", {"scorer": Loss(), "selection": Selection(0.6)}),
        (
            "scope batch",
            {"scorer": ExcessLoss("policy", "cleaning_reference"), "selection": Selection(0.6, scope="global")},
        ),
        (r"cleaning\.masks", {"scorer": Loss(), "selection": Selection(0.6, scope="batch"), "masks": "somewhere"}),
        (r"cleaning\.masks", {"scorer": Probability(), "selection": None, "masks": "somewhere"}),
        ("warm_up_stages", {"warm_up_stages": -1}),
    ],
)
def test_options_that_contradict_each_other_are_refused(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        Cleaning(**options)
