"""Steps cut by tokens: the fewest micro-batches within the limit, the same updates, exact resume; and the micro-batch
that runs before the first step and leaves nothing behind."""

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter_weights, build, build_sft, fit, make_pairs, make_samples, same, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from test_faults import SOURCE_ROWS, At, checkpoint, full, run, terminate, whole
from test_preference_module import first_batch
from test_scoring import saved_adapter

import mixdpo.storage.store
from datamodules.preference import PreferenceDataModule
from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.callbacks.faults import OutOfMemory
from lightning_modules.preference import PreferenceModule
from lightning_modules.qlora import AdapterModule
from lightning_modules.sft import SFTModule
from mixdpo.batches.steps import cut_step, micro_batches_needed
from mixdpo.errors import Stopped
from mixdpo.losses import DPO
from mixdpo.model.adapters import Lora
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant
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
    original, steps, zeros, held = kind.training_step, [], torch.zeros_like, []
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: held.append(1) or zeros(*a, **k))

    def watched(self: Any, batch: Any, number: int) -> Any:
        has_gradient = any(p.grad is not None for p in self.learning())
        steps.append((self, batch.rows.tokens, has_gradient or getattr(self, "reference_cache", False), len(held)))
        return original(self, batch, number)

    monkeypatch.setattr(kind, "training_step", watched)
    modules, means = [], []
    for on_gpu in (False, True):
        monkeypatch.setattr(kind, "on_gpu", on_gpu)
        trainer = {"first": (OutOfMemory(),), "accumulate_grad_batches": 2, **options.get("trainer", {})}
        steps.clear(), held.clear()
        how = deepcopy({**options, **DROPOUT}) | {"trainer": trainer}
        modules.append(fit(tiny_model, rows, tmp_path / str(on_gpu), **how))
        means.append(torch.load(checkpoint(tmp_path / str(on_gpu)), weights_only=True)["row"]["means"])
    assert same(*modules) and torch.equal(*means)
    (twin, tokens, kept, made), *others = steps
    assert made >= 3 * len(modules[1].learning())  # memory of gradients and of both of AdamW's moments
    assert twin is not modules[1] and not kept and {each for each, *_ in others} == {modules[1]}
    assert not others[0][2] or "make" not in options  # no gradient is left
    assert tokens == max(number for _, number, *_ in steps)
    assert len(others) == trainer.get("max_epochs", 1) * len(modules[1].trainer.datamodule.micro_batches())


def test_memory_that_does_not_suffice_is_said_before_the_first_step(run, tmp_path, monkeypatch) -> None:
    """Half of the 100 tokens of a micro-batch; then half of its 50 would be fewer than the 30 of the longest row."""
    monkeypatch.setattr(PreferenceModule, "on_gpu", True)
    monkeypatch.setattr(PreferenceModule, "training_step", full)
    for most, next_one in ((1000, 50), (70, 30)):
        with pytest.raises(torch.OutOfMemoryError) as error:
            run(tmp_path / str(most), data={"micro_batch_tokens": most})
        assert f"data.micro_batch_tokens {next_one} (now {most})" in str(error.value.__notes__)


# Orders and actions in real runs: which batches come, where stages start, what is trained, what a resume repeats.
EASY = Routing(hard_fraction=0)
STEADY = {"schedule": Constant(warmup=0.0)}


class Seen(Callback):
    """The pairs of each optimizer step, and the policy and the reference that it starts from."""

    def __init__(self) -> None:
        self.steps: dict[int, list[int]] = {}
        self.policies: dict[int, dict[str, torch.Tensor]] = {}
        self.references: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.setdefault(trainer.global_step, []).extend(batch.ids[batch.weight > 0].tolist())
        self.policies.setdefault(trainer.global_step, adapter_weights(pl_module))
        self.references[trainer.global_step] = adapter_weights(pl_module, "reference")


def run_order(model: str, source: str, folder: Path, routing: Routing, *first: Any, **options: Any) -> tuple[Any, Seen]:
    """20 pairs in steps of 4, each cut in two; `ckpt_path` continues."""
    seen = Seen()
    trainer = {"first": (*first, seen), "accumulate_grad_batches": 2, **options.pop("trainer", {})}
    data = {"routing": routing, **options.pop("data", {})}
    module = fit(model, source, folder, trainer=trainer, data=data, **STEADY, **options)
    return module, seen


@pytest.mark.parametrize(("order", "stop", "workers"), [("bucketed", 7, 2), ("shuffled", 5, 0), ("paced", 7, 0)])
def test_reshuffled_epochs_resume_exactly(order, stop, workers, tiny_model, source, tmp_path) -> None:
    """15 steps in three epochs, each in its own order; stopped in the second and at the end of the first."""
    routing = Routing(hard_fraction=0.25, order=order, reshuffle=True, buckets=2)

    def train(name: str, ckpt_path: str | None = None, **cut: int) -> Any:
        options = {"data": {"workers": workers}, "lora": Lora(rank=4, alpha=8, dropout=0.3), "ckpt_path": ckpt_path}
        return run_order(tiny_model, source, tmp_path / name, routing, trainer={"max_epochs": 3, **cut}, **options)

    whole, seen = train("whole")
    train("cut", max_steps=stop)
    rest, after = train("rest", str(tmp_path / "cut" / "checkpoints" / "last.ckpt"))
    assert after.steps == {step: pairs for step, pairs in seen.steps.items() if step >= stop}
    assert same(whole, rest)

    data = whole.trainer.datamodule
    ids, route = data.train_pairs["pair_id"], data.route
    planned = [ids[i] for epoch in range(3) for i in route.epoch_order(epoch).tolist()]
    found = [seen.steps[step] for step in range(15)]
    assert [set(step) for step in found] == [set(planned[i : i + 4]) for i in range(0, 60, 4)]
    assert len({tuple(route.epoch_order(epoch)) for epoch in range(3)}) == 3
    # what the schedule and lr_mass read is what is trained
    hard = {ids[i] for i in np.flatnonzero(route.is_hard).tolist()}
    assert whole._plan.sft_share.tolist() == [sum(pair in hard for pair in step) / 4 for step in found]


@pytest.mark.parametrize(("routing", "starts"), [
    ({"order": "easy_to_hard"}, (0, 3)),
    ({"order": "hard_to_easy"}, (0, 2)),
    ({"order": "preference_first", "assignment": "random"}, (0, 3)),
    ({"order": "sft_first"}, (0, 2)),
    ({"order": "interleaved"}, (0,)),
    ({"order": "easy_to_hard", "assignment": "random"}, (0,)),
    ({"order": "easy_to_hard", "hard_action": "preference"}, (0,)),
    ({"order": "easy_to_hard", "hard_action": "drop"}, (0,)),
    ({"order": "sft_first", "easy_action": "drop"}, (0,)),
    ({"order": "bucketed", "buckets": 2}, (0, 2)),  # half of the third step is enough
    ({"order": "bucketed", "buckets": 5}, (0, 1, 2, 3, 4)),
    ({"order": "bucketed", "buckets": 20}, (0, 1, 2, 3, 4)),  # several in one step are one stage
])  # fmt: skip
def test_stages_start_where_most_pairs_of_a_step_are_of_the_next(routing, starts, tmp_path) -> None:
    """20 pairs in steps of 4, 7 of them hard: of the sorted order's fourth step 3 of 4, and all of its last one."""
    margins = np.random.default_rng(0).permutation(20).astype(float)
    data = PreferenceDataModule("unread", Routing(hard_fraction=0.35, **routing), tokenizer="unread", batch_size=4)
    data.route, data._weights = data.routing.plan(margins, np.arange(20), seed=0), [1.0] * 20
    plan = data.epoch_plan()
    assert plan.stage_starts == starts
    assert len(plan) == -(-len(data.route.order) // 4)
    assert data._steps(0) == data._steps(1)  # nothing is reshuffled


def test_ranks_share_the_steps_of_a_paced_order() -> None:
    """In the parts of both ranks are the pairs of a step, and a pair that is drawn twice is there twice."""
    routing = Routing(hard_fraction=0.35, order="paced", buckets=3)
    data, parts = PreferenceDataModule("unread", routing, tokenizer="unread", batch_size=8), []
    data.route = routing.plan(np.random.default_rng(0).permutation(40).astype(float), np.arange(40), seed=1)
    data.row_sizes = [7] * 40, [1] * 40
    for rank in (0, 1):
        data.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=2, global_rank=rank)
        parts.append([rows for rows, weight, _ in data.micro_batches() if weight])
    steps = data._steps()
    assert [sorted(one + two) for one, two in zip(*parts, strict=True)] == [sorted(step) for step in steps]
    assert any(len({*step}) < len(step) for step in steps)
    drawn = len({i for step in steps for i in step})
    assert drawn < 40 and f"order paced (draws {drawn} of 40 pairs an epoch), 5 steps" in data._describe_route()


COUNTED = ("by_preference", "by_sft", "hard_by_preference")
ACTIONS = [
    ({"hard_action": "sft"}, 15, 5, 0), ({"hard_action": "sft_rejected"}, 15, 5, 0),
    ({"hard_action": "sft_both"}, 15, 5, 0), ({"hard_action": "preference"}, 20, 0, 5),
    ({"hard_action": "drop"}, 15, 0, 0), ({"easy_action": "drop"}, 0, 5, 0),
]  # fmt: skip


@pytest.mark.parametrize(("action", *COUNTED), ACTIONS, ids=str)
def test_actions_train_what_they_say(action, by_preference, by_sft, hard_by_preference, tiny_model, source, tmp_path):
    routing = Routing(hard_fraction=0.25, **action)
    trainer, module, data = build(tiny_model, source, tmp_path / "run", data={"routing": routing})
    first_batch(trainer, module, data)
    batches = list(data.train_dataloader())
    assert sum(len(batch.preference) for batch in batches) == by_preference
    assert sum(len(batch.sft) for batch in batches) == by_sft
    assert sum(int(batch.is_hard[batch.preference].sum()) for batch in batches) == hard_by_preference
    # the plan counts what a batch computes: prompts once, and of SFT pairs the sides that it learns
    counts = data._tokens(data.train_pairs, data.route.is_sft, data.route.sft_sides)
    for batch, (indices, _, _) in zip(batches, data.micro_batches(), strict=True):
        assert batch.rows.tokens == sum(counts[i] for i in indices)
        assert batch.sft_sides == data.route.sft_sides


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_the_reference_moves_at_each_bucket_and_resumes_exactly(start, tiny_model, source, tmp_path) -> None:
    """Buckets start at steps 0, 2 and 3: there the policy becomes the reference, and the reference then stays."""
    routing, options = Routing(hard_fraction=0, order="bucketed", buckets=3), {}
    if start == "adapter":
        options = {"adapter": saved_adapter(tiny_model, tmp_path / "adapter", rank=4, alpha=8)}
    refresh = RefreshReference(role="reference")
    whole, seen = run_order(tiny_model, source, tmp_path / "whole", routing, refresh, **options)
    assert whole.trainer.datamodule.epoch.stage_starts == (0, 2, 3)
    assert bool(seen.references[0]) == bool(seen.references[1]) == (start == "adapter")
    for step in (2, 3, 4):
        policy = seen.policies[min(step, 3)]
        found = {key.replace(".reference.", ".policy."): value for key, value in seen.references[step].items()}
        assert found.keys() == policy.keys() and all(torch.equal(found[key], policy[key]) for key in policy), step
    assert not any(p.requires_grad for name, p in whole.named_parameters() if ".reference." in name)
    assert whole.reference_version == 0  # of cleaning

    for stop in (1, 3):
        folder = tmp_path / f"cut{stop}"
        path, moves = str(folder / "checkpoints" / "last.ckpt"), (routing, RefreshReference(role="reference"))
        run_order(tiny_model, source, folder, *moves, trainer={"max_steps": stop}, **options)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert any(".reference." in key for key in saved) == (start == "adapter" or stop == 3)
        rest, _ = run_order(tiny_model, source, tmp_path / f"rest{stop}", *moves, ckpt_path=path, **options)
        assert same(whole, rest) and same(whole, rest, "reference"), stop


@pytest.mark.parametrize(("precision", "rtol", "stop"), [("32-true", 1e-5, 1), ("bf16-true", 0.02, 3)])
def test_the_base_moves_as_an_average_and_resumes_exactly(precision, rtol, stop, tiny_model, source, tmp_path) -> None:
    """Refreshed at steps 2 and 4 of 5. Until then the reference is the base, though it is an adapter from the start."""

    def train(name: str, *first: Callback, ckpt_path: str | None = None, **cut: int) -> tuple[Any, Seen]:
        dtype = "bfloat16" if "bf16" in precision else "float32"
        options = {"trainer": {"precision": precision, **cut}, "dtype": dtype}
        return run_order(tiny_model, source, tmp_path / name, EASY, *first, lr=1.0, ckpt_path=ckpt_path, **options)

    moves = RefreshReference(every=2, ema=0.4, role="reference")
    (_, fixed), (whole, seen) = train("fixed"), train("whole", moves)
    for step, policy in seen.policies.items():
        assert all(torch.equal(value, fixed.policies[step][key]) for key, value in policy.items()) == (step <= 2)
    of_step = [{key: value.double() for key, value in seen.policies[step].items()} for step in range(5)]
    old, average = {}, {key: value * ("lora_A" in key) for key, value in of_step[0].items()}
    for step, new in enumerate(of_step):
        if step in (2, 4):
            old, average = average, {key: 0.4 * average[key] + 0.6 * new[key] for key in new}
        for key, value in average.items():
            found = seen.references[step][key.replace(".policy.", ".reference.")].double()
            torch.testing.assert_close(found, value, rtol=rtol, atol=rtol / 10)
    pairs = [(key, key.replace("lora_A", "lora_B")) for key in average if "lora_A" in key]
    made = torch.cat([(average[b] @ average[a]).flatten() for a, b in pairs])
    wanted = torch.cat([(0.4 * old[b] @ old[a] + 0.6 * new[b] @ new[a]).flatten() for a, b in pairs])
    distance = float((made - wanted).norm() / wanted.norm())
    assert 0.001 < whole.logged["reference/distance"] == pytest.approx(distance, rel=rtol)
    # the base is read from the file that the other run has written
    assert len(list(mixdpo.storage.store.cache_root().glob("reference/*.sqlite"))) == 3

    train("cut", moves, max_steps=stop)
    rest, _ = train("rest", moves, ckpt_path=str(tmp_path / "cut/checkpoints/last.ckpt"))
    assert same(whole, rest) and same(whole, rest, "reference")
