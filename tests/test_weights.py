"""The weights that the data gives to responses: read from three dialects, normalised over the step, in every cut."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEMPLATE, adapter_weights, build, build_sft, fit, make_pairs, make_samples, write_pairs
from test_pairs import own_cache  # noqa: F401  (a fixture)
from test_preference_module import first_batch
from test_processes import FORK, assert_close
from tiny import response, user
from torch import Tensor

from mixdpo.data.conversations import read_samples
from mixdpo.data.encoding import encode_sample
from mixdpo.data.messages import prompt_texts, prompts_of
from mixdpo.errors import InputError
from mixdpo.model.loading import load_tokenizer
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss
from mixdpo.token_cleaning.selection import Selection

FIRST, LAST = [user("sun?"), response("red")], [user("moon?"), response("blue tea")]
EXACT: dict[str, Any] = {"dtype": "float64", "schedule": Constant(warmup=0.0), "make": build_sft}
REWRITES = TEMPLATE.replace("{{ m['content']", "{{ 'sea ' * (loop.last and m.role == 'assistant') + m.content")
"""Shows a thought in the last turn only, as Qwen3's template does."""


def weights_of(path: Path, *conversations: Any, **options: Any) -> list[list[float]]:
    rows = [{"messages": messages} for messages in conversations]
    return read_samples(write_pairs(path, rows), **options).dataset["response_weights"][:]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0, "loss": 0}, {"train": False}, {"loss": False}])
def test_a_masked_response_weighs_nothing_in_all_three_dialects(tmp_path, mark):
    masked = [FIRST[0] | mark, FIRST[1] | mark, *LAST]  # a question may say that it is not trained on
    assert weights_of(tmp_path / "a.jsonl", masked) == [[0, 1]]
    completion = {"prompt": "sun?", "completion": [FIRST[1] | mark, *LAST]}
    assert read_samples(write_pairs(tmp_path / "b.jsonl", [completion])).dataset["response_weights"][:] == [[0, 1]]


def test_other_weights_and_the_last_response_only(tmp_path):
    half = [FIRST[0], FIRST[1] | {"weight": 0.5, "train": True}, *LAST, user("Bye")]
    assert weights_of(tmp_path / "a.jsonl", half, LAST) == [[0.5, 1], [1]]
    assert weights_of(tmp_path / "a.jsonl", half, LAST, train_on="last") == [[0, 1], [1]]


def test_a_row_with_nothing_to_train_and_blank_responses_are_counted(tmp_path):
    masked = [LAST[0], LAST[1] | {"train": False}]
    rows = [{"messages": messages} for messages in ([*FIRST, *masked], [user("?"), response(" "), *LAST], masked)]
    samples = read_samples(write_pairs(tmp_path / "a.jsonl", rows))
    assert samples.dataset["response_weights"][:] == [[1, 0], [0, 1]]
    assert samples.dropped == {"no_trained_response": 1} and samples.noted == {"blank_responses": 1}
    samples = read_samples(write_pairs(tmp_path / "b.jsonl", rows), train_on="last")
    assert samples.dropped == {"no_trained_response": 2} and samples.dataset["row"][:] == [2]


def test_one_response_a_sample(tmp_path):
    third = [user("sea?"), response("")]
    rows = [{"messages": [*FIRST, *third, LAST[0], LAST[1] | {"weight": 2}]}, {"messages": LAST}, {"messages": FIRST}]
    path = write_pairs(tmp_path / "a.jsonl", rows)
    whole, pieces = read_samples(path), read_samples(path, one_each=True)
    assert pieces.dataset["messages"][:] == [FIRST, [*FIRST, *third, *LAST], LAST, FIRST]
    assert pieces.dataset["response_weights"][:] == [[1], [0, 0, 2], [1], [1]]
    assert pieces.dataset["row"][:] == [1, 1, 2, 3] and pieces.noted == whole.noted == {"blank_responses": 1}
    ids = pieces.dataset["sample_id"][:]
    assert [ids[0], *ids[2:]] == whole.dataset["sample_id"][:] and len(set(ids)) == 4
    assert read_samples(path, one_each=True, limit=1).dataset["row"][:] == [1, 1]
    prompts = [prompt_texts(prompt) for prompt in prompts_of(pieces.dataset)]  # what decides the side of the split
    assert prompts == [["sun?"], ["sun?"], ["moon?"], ["sun?"]]
    twice = [row | {"id": "a"} for row in rows]
    with pytest.raises(InputError, match="row 2: id 'a' is in row 1 too"):
        read_samples(write_pairs(tmp_path / "b.jsonl", twice), one_each=True)


def test_a_pair_has_the_weight_of_its_chosen_response(tiny_model, tmp_path):
    rows = [row | {"chosen": [response(row["chosen"]) | {"weight": 0.5 + n}]} for n, row in enumerate(make_pairs(3))]
    data = build(tiny_model, write_pairs(tmp_path / "a.jsonl", rows), tmp_path, data={"batch_size": 3})
    assert sorted(first_batch(*data).chosen_weight.tolist()) == [0.5, 1.5, 2.5]
    assert data[2].counts["train"]["weights_not_read"] == (~data[2].route.is_hard).sum() >= 2


def test_a_response_of_weight_0_is_context(tiny_model):
    tokenizer, messages = load_tokenizer(tiny_model), [*FIRST, *LAST, *FIRST]
    whole = encode_sample(tokenizer, messages, TEMPLATE)
    sample = encode_sample(tokenizer, messages, TEMPLATE, [0.0, 0.5, 0.0])
    assert sample.spans == whole.spans[2:4] and sample.response_weights == [0.5]
    assert sample.input_ids == whole.input_ids[: sample.spans[1]]
    both = encode_sample(tokenizer, messages, TEMPLATE, [0.25, 0.5, 1.0])
    assert both.within(max_length=whole.spans[2]).response_weights == [0.25]
    assert both.within(max_length=whole.spans[3]).response_weights == [0.25, 0.5]


def weighed(count: int, weights: Any) -> list[dict[str, Any]]:
    """`make_samples`, its responses marked in turn; None is no mark."""
    rows, marks = make_samples(count), [weights[i % len(weights)] for i in range(3 * count)]
    for row in rows:
        for message in row["messages"][1::2]:
            message |= {} if (mark := marks.pop()) is None else {"weight": mark}
    return rows


def targets_by_hand(tokenizer: Any, row: Any) -> list[tuple[list[int], int, float]]:
    """(ids, where the response begins, its weight) of each response behind all that is before it."""
    found = []
    for place, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            texts = [{key: m[key] for key in ("role", "content")} for m in row["messages"][: place + 1]]
            prompt, ids = (
                tokenizer.apply_chat_template(chat, add_generation_prompt=chat is not texts)["input_ids"]
                for chat in (texts[:-1], texts)
            )
            found.append((ids, len(prompt), message.get("weight", 1.0)))
    return found


def step_by_hand(module: Any, rows: list[Any], lr: float) -> None:
    """One SGD step on −Σ w log p / Σ w, one response at a time."""
    tokenizer, policy = load_tokenizer(module.base), [p for p in module.model.parameters() if p.requires_grad]
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for ids, start, weight in (target for row in rows for target in targets_by_hand(tokenizer, row)):
        log_probs = module.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total = total - weight * sum(log_probs[at - 1, ids[at]] for at in range(start, len(ids)))
        weights += weight * (len(ids) - start)
    gradients = torch.autograd.grad(total / weights, policy)
    with torch.no_grad():
        for parameter, gradient in zip(policy, gradients, strict=True):
            parameter -= lr * gradient


def trained(model: str, rows: Any, folder: Path, **options: Any) -> dict[str, Tensor]:
    folder.mkdir()
    trainer = {"precision": "64-true", **options.pop("trainer", {})}
    module = fit(model, write_pairs(folder / "rows.jsonl", rows), folder, trainer=trainer, **EXACT | options)
    return adapter_weights(module)


def test_weights_of_1_change_nothing(tiny_model: str, tmp_path: Path) -> None:
    none, ones = (trained(tiny_model, weighed(6, [mark]), tmp_path / str(mark)) for mark in (None, 1))
    assert all(torch.equal(value, ones[key]) for key, value in none.items())
    plans = [(tmp_path / name / "plan.json").read_bytes() for name in ("None", "1")]
    assert plans[0] == plans[1].replace(b"/1/", b"/None/")


def test_the_pool_s_identity_has_the_weights_that_are_not_1(tiny_model: str, tmp_path: Path) -> None:
    pools = {}
    for mark in (None, 1, 0.5, 0.25):
        source = write_pairs(tmp_path / f"{mark}.jsonl", weighed(6, [mark, 1]))
        built = build_sft(tiny_model, source, tmp_path / str(mark))
        first_batch(*built)
        pools[mark] = built[2].pool
    assert pools[None].identity == pools[1].identity
    assert len({pool.identity["ids"] for pool in pools.values()}) == 3
    assert len({pool.identity["data"] for pool in pools.values()}) == 1
    assert pools[1].totals().tolist() == np.diff(pools[1].offsets).tolist()
    assert pools[0.5].totals().sum() < pools[1].totals().sum()


WEIGHTS = [0.5, None, 2, 0]  # from the last response on: 0 is the first of every conversation of two


@pytest.mark.usefixtures("full_precision_norms")
def test_steps_are_weighted_means_however_they_are_cut(tiny_model: str, tmp_path: Path) -> None:
    """Against a loop in this file that knows no spans: 12 samples in 3 steps, packed or not, in 1 to 4 pieces."""
    rows = weighed(12, WEIGHTS)
    assert [m["weight"] for row in rows[::3] for m in row["messages"][1::2]] == [0, 2] * 4
    source = write_pairs(tmp_path / "rows.jsonl", rows)
    built = build_sft(tiny_model, source, tmp_path / "hand", trainer={"precision": "64-true"}, dtype="float64")
    first_batch(*built)
    for step in built[2]._steps():
        step_by_hand(built[1], [rows[i] for i in step], lr=0.1)
    expected = adapter_weights(built[1])
    assert max(value.abs().max() for key, value in expected.items() if "lora_B" in key) > 1e-3
    for pack, cut in product((0, 64, 8192), (1, 2, 4)):
        folder = tmp_path / f"{pack} {cut}"
        weights = trained(tiny_model, rows, folder, data={"pack": pack}, trainer={"accumulate_grad_batches": cut})
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-10)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("full_precision_norms")
def test_two_processes_weigh_as_one(tiny_model: str, tmp_path: Path) -> None:
    train = partial(trained, tiny_model, weighed(11, [0.5, 2, None]))
    train(tmp_path / "one", trainer={"accumulate_grad_batches": 2})
    train(tmp_path / "two", trainer=FORK)
    assert_close(tmp_path / "one", tmp_path / "two")


def test_a_weight_of_0_is_a_row_without_that_turns_loss(tiny_model: str, tmp_path: Path) -> None:
    """The turn's text is context, as a user's would be: the same tokens under a role that is not trained."""
    masked = [FIRST[0], FIRST[1] | {"loss": False}, *LAST]
    context = [FIRST[0], {"role": "user", "content": "red"}, *LAST]
    template = TEMPLATE.replace("m['role']", "('assistant' if m.content == 'red' else m.role)")
    train = partial(trained, tiny_model, data={"chat_template": template})
    one, other = (train([{"messages": chat}] * 4, tmp_path / str(i)) for i, chat in enumerate((masked, context)))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_template_that_rewrites_earlier_turns_trains_response_by_response(tiny_model: str, tmp_path: Path) -> None:
    rows, data = [{"messages": [*FIRST, *LAST]}] * 4, {"chat_template": REWRITES}
    with pytest.raises(InputError, match=r"message 4 follows: set data\.one_response_per_sample true"):
        trained(tiny_model, rows, tmp_path / "refused", data=data)
    apart = [{"messages": FIRST}, {"messages": [FIRST[0], FIRST[1] | {"weight": 0}, *LAST]}] * 4
    one = trained(tiny_model, rows, tmp_path / "one", data=data | {"one_response_per_sample": True})
    two = trained(tiny_model, apart, tmp_path / "two", data=data)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


ONCE = Cleaning(scorer=Loss("base"), selection=Selection(0.6))
ONLINE = Cleaning(scorer=ExcessLoss("policy", "base"), selection=Selection(0.6, scope="sample"))


@pytest.mark.parametrize("how", [ONCE, ONLINE], ids=["once", "online"])
@pytest.mark.usefixtures("full_precision_norms")
def test_cleaning_multiplies(how: Cleaning, tiny_model: str, tmp_path: Path) -> None:
    """weights.npy has cleaning's own decisions; a step is normalised by what both weights leave."""
    adapters, masks, kept = [], [], []
    for marks in ([0.25], [2], [0.25, 2]):
        source, folder = write_pairs(tmp_path / "rows.jsonl", weighed(8, marks)), tmp_path / str(marks)
        module = fit(tiny_model, source, folder, trainer={"precision": "64-true"}, cleaning=how, **EXACT)
        adapters.append(adapter_weights(module))
        masks.append(np.load(folder / "cleaning" / "weights.npy"))
        kept.append(float(module.trainer.callback_metrics["cleaning/kept_fraction"]))
    for key, value in adapters[0].items():  # a weight that all share cancels
        torch.testing.assert_close(adapters[1][key], value, rtol=0, atol=1e-12)
    assert any(not torch.allclose(adapters[2][key], value, atol=1e-6) for key, value in adapters[0].items())
    assert np.array_equal(*masks[:2]) and [set(mask) for mask in masks] == [{0, 1}] * 3
    assert kept[0] == pytest.approx(kept[1], abs=1e-6) and 0.4 < min(kept) < max(kept) < 0.9


@pytest.mark.usefixtures("full_precision_norms")
def test_a_hard_pair_has_its_weight_times_the_mean(tiny_model: str, tmp_path: Path) -> None:
    marks = dict(zip([row["pair_id"] for row in make_pairs(4)], (0.5, 1, 2, 0.25), strict=True))
    losses = {}
    for name in ("plain", "weighed"):
        rows = make_pairs(4)
        for row in rows:
            row["chosen"] = [response(row["chosen"]) | ({"weight": marks[row["pair_id"]]} if name == "weighed" else {})]
        source = write_pairs(tmp_path / f"{name}.jsonl", rows)
        built = build(tiny_model, source, tmp_path / name, data={"routing": Routing(hard_fraction=0.5)})
        batch, module = first_batch(*built), built[1]
        module.easy_sft_weight = 0.0
        total, *_ = module.route_losses(batch, *module.policy_and_reference(batch))
        losses[name], order = total, [built[2].rows_of(batch.ids.tolist())[i]["row"] - 1 for i in range(4)]
    weight = torch.tensor([(0.5, 1, 2, 0.25)[row] for row in order], dtype=torch.float64)
    expected = losses["plain"] * torch.where(batch.is_hard, weight, 1.0)
    torch.testing.assert_close(losses["weighed"], expected, rtol=1e-12, atol=0)
    assert batch.is_hard.sum() == 2
