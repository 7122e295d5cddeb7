"""Orders and actions in real runs: which batches come, where stages start, what is trained, what a resume repeats."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter_weights, build, fit, make_pairs, same
from lightning.pytorch.callbacks import Callback
from test_adapters import saved_adapter
from test_preference_module import first_batch

import mixdpo.storage.store
from datamodules.preference import PreferenceDataModule
from lightning_modules.callbacks.clean_tokens import RefreshReference
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import Random
from mixdpo.token_cleaning.selection import Selection

SOURCE_ROWS = make_pairs(20)
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


def run(model: str, source: str, folder: Path, routing: Routing, *first: Callback, **options: Any) -> tuple[Any, Seen]:
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
        return run(tiny_model, source, tmp_path / name, routing, trainer={"max_epochs": 3, **cut}, **options)

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
    data.route = data.routing.plan(margins, np.arange(20), seed=0)
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


@pytest.mark.parametrize("order", [{"order": "shuffled", "reshuffle": True}, {"order": "paced"}], ids=str)
def test_cleaning_wants_steps_that_stay(order, tiny_model: str, source: str, tmp_path: Path) -> None:
    cleaning = Cleaning(scorer=Random(), selection=Selection(0.5, scope="batch"))
    routing = Routing(hard_fraction=0.25, **order)
    with pytest.raises(InputError, match=r"scope is batch, data\.routing\.reshuffle false and no order paced"):
        run(tiny_model, source, tmp_path / "run", routing, cleaning=cleaning)


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_the_reference_moves_at_each_bucket_and_resumes_exactly(start, tiny_model, source, tmp_path) -> None:
    """Buckets start at steps 0, 2 and 3: there the policy becomes the reference, and the reference then stays."""
    routing, options = Routing(hard_fraction=0, order="bucketed", buckets=3), {}
    if start == "adapter":
        options = {"adapter": saved_adapter(tiny_model, tmp_path / "adapter", rank=4, alpha=8)}
    whole, seen = run(tiny_model, source, tmp_path / "whole", routing, RefreshReference(role="reference"), **options)
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
        run(tiny_model, source, folder, *moves, trainer={"max_steps": stop}, **options)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert any(".reference." in key for key in saved) == (start == "adapter" or stop == 3)
        rest, _ = run(tiny_model, source, tmp_path / f"rest{stop}", *moves, ckpt_path=path, **options)
        assert same(whole, rest) and same(whole, rest, "reference"), stop


@pytest.mark.parametrize(("precision", "rtol", "stop"), [("32-true", 1e-5, 1), ("bf16-true", 0.02, 3)])
def test_the_base_moves_as_an_average_and_resumes_exactly(precision, rtol, stop, tiny_model, source, tmp_path) -> None:
    """Refreshed at steps 2 and 4 of 5. Until then the reference is the base, though it is an adapter from the start."""

    def train(name: str, *first: Callback, ckpt_path: str | None = None, **cut: int) -> tuple[Any, Seen]:
        options = {
            "trainer": {"precision": precision, **cut},
            "dtype": "bfloat16" if "bf16" in precision else "float32",
        }
        return run(tiny_model, source, tmp_path / name, EASY, *first, lr=1.0, ckpt_path=ckpt_path, **options)

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
