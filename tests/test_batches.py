"""Steps cut into micro-batches, pairs as packed rows, masks, and a loader that continues where it stopped."""

from itertools import pairwise

import pytest
import torch
from conftest import collate, segments_of, sources
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdpo.batches.batch import PairCollator
from mixdpo.batches.loader import ResumableLoader
from mixdpo.batches.rows import TokenRows
from mixdpo.batches.steps import cut_step

fast = settings(max_examples=40)
ANY = st.sampled_from([True, False])


@st.composite
def step_cuts(draw, enough_pairs=False):
    accumulate, world = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    tokens = draw(st.lists(st.integers(1, 30), min_size=40, max_size=40))
    smallest = accumulate * world if enough_pairs else 1
    step = draw(st.lists(st.integers(0, 39), unique=True, min_size=smallest, max_size=40))
    return step, tokens, accumulate, world


def cut(step, tokens, accumulate, world):
    return [cut_step(step, tokens, accumulate=accumulate, world=world, rank=rank) for rank in range(world)]


@given(step_cuts())
@fast
def test_a_step_is_cut_into_the_asked_number_balanced_and_holds_every_pair_once(case):
    step, tokens, accumulate, world = case
    ranks = cut(*case)
    assert [len(rank) for rank in ranks] == [accumulate] * world
    batches = [batch for rank in ranks for batch in rank]
    assert all(step_total == len(step) for _, _, step_total in batches)
    assert {weight for _, weight, _ in batches} <= {0.0, 1.0}
    kept = [index for indices, weight, _ in batches for index in indices if weight == 1]
    assert sorted(kept) == sorted(step)
    fillers = [indices for indices, weight, _ in batches if weight == 0]
    assert len(fillers) == max(0, accumulate * world - len(step))
    for indices in fillers:
        assert len(indices) == 1 and indices[0] in step
        assert tokens[indices[0]] == min(tokens[index] for index in step)
    loads = [sum(tokens[index] for index in indices) * weight for indices, weight, _ in batches]
    assert max(loads) - min(loads) <= max(tokens[index] for index in step)  # balanced within the longest pair


@given(step_cuts(enough_pairs=True))
@fast
def test_ranks_work_on_micro_batches_of_like_size_at_the_same_time(case):
    """With all loads sorted, those computed at one time are neighbours: no other time's load falls between them."""
    _, tokens, accumulate, _ = case
    loads = [[sum(tokens[index] for index in indices) for indices, _, _ in rank] for rank in cut(*case)]
    times = sorted((min(time), max(time)) for time in zip(*loads, strict=True))
    assert len(times) == accumulate
    assert all(before[1] <= after[0] for before, after in pairwise(times))


def test_a_cut_by_hand():
    """9 | 5 + 3 | 4 + 4, longest first to the lightest of three."""
    tokens = {10: 3, 11: 9, 12: 4, 13: 5, 14: 4}
    batches = cut_step([10, 11, 12, 13, 14], tokens, accumulate=3, world=1, rank=0)
    assert sorted(sorted(indices) for indices, _, _ in batches) == [[10, 13], [11], [12, 14]]


def test_filler_by_hand():
    batches = cut_step([0, 2], [7, 1, 5], accumulate=3, world=1, rank=0)
    assert sorted(batches, key=lambda batch: (batch[1], batch[0])) == [((2,), 0.0, 2), ((0,), 1.0, 2), ((2,), 1.0, 2)]


def make_pair(index, prompt, chosen, rejected):
    """No token occurs twice in all of the data, so that a token says where it is from."""
    tokens = iter(range(1000 * (index + 1), 1000 * (index + 2)))
    lengths = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    ids = {name: [next(tokens) for _ in range(length)] for name, length in lengths.items()}
    return {**ids, "margin": 0.5 * index - 1, "pair_id": 7 * index + 2**40}


PAIRS = [make_pair(0, 3, 2, 4), make_pair(1, 1, 5, 1), make_pair(2, 2, 1, 3), make_pair(3, 4, 3, 3)]
IS_HARD = [False, True, False, True]
EASY = [PAIRS[0], PAIRS[2]]


@st.composite
def batches(draw):
    size = draw(st.integers(1, 4))
    length = st.integers(1, 5)
    pairs = [make_pair(index, draw(length), draw(length), draw(length)) for index in range(size)]
    return pairs, draw(st.lists(ANY, min_size=size, max_size=size))


def predictions(rows: TokenRows):
    """completion -> {position predicted from: (target, token at that position, its segment)}."""
    width = rows.input_ids.shape[1]
    found = {}
    for source, target, completion in zip(sources(rows), rows.target.tolist(), rows.completion.tolist(), strict=True):
        row, column = divmod(source, width)
        of_token = (rows.position_ids, rows.input_ids, segments_of(rows))
        position, token, segment = (each[row, column].item() for each in of_token)
        found.setdefault(completion, {})[position] = (target, token, segment)
    return found


def check_rows(rows, pairs, has_chosen, has_rejected):
    """Every token of the wanted completions is a target once, with the right source, and nothing else is."""
    count = len(pairs)
    wanted = {b: (pairs[b], "chosen_ids", 1) for b in range(count) if has_chosen[b]}
    wanted |= {count + b: (pairs[b], "rejected_ids", 2) for b in range(count) if has_rejected[b]}
    found = predictions(rows)
    assert set(found) == set(wanted)
    assert len(rows.target) == sum(len(pair[side]) for pair, side, _ in wanted.values())
    for completion, (pair, side, segment) in wanted.items():
        prompt, ids = pair["prompt_ids"], pair[side]
        first = len(prompt) - 1
        expected = {first: (ids[0], prompt[-1], 0)}
        expected |= {first + k: (ids[k], ids[k - 1], segment) for k in range(1, len(ids))}
        assert found[completion] == expected
    lengths = [len(wanted[c][0][wanted[c][1]]) if c in wanted else 0 for c in range(2 * count)]
    assert rows.lengths.tolist() == lengths


@given(batches(), ANY, ANY)
@fast
def test_targets_and_sources(batch, evaluation, share_prompt):
    pairs, is_hard = batch
    result = collate(pairs, is_hard, evaluation=evaluation, share_prompt=share_prompt)
    easy = [evaluation or not hard for hard in is_hard]
    check_rows(result.rows, pairs, [True] * len(pairs), easy)
    if any(easy):
        check_rows(result.reference_rows, pairs, easy, easy)
    else:
        assert result.reference_rows is None


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_hard_pairs_rejected_response_is_nowhere(share_prompt):
    batch = collate(PAIRS, IS_HARD, share_prompt=share_prompt)
    rejected = {token for b in (1, 3) for token in PAIRS[b]["rejected_ids"]}
    chosen = {token for b in (1, 3) for token in PAIRS[b]["chosen_ids"]}
    for rows in (batch.rows, batch.reference_rows):
        assert not rejected & set(rows.input_ids.flatten().tolist())
        assert not rejected & set(rows.target.tolist())
    assert not {4 + 1, 4 + 3} & set(batch.rows.completion.tolist())
    assert batch.rows.lengths.tolist() == [2, 5, 1, 3, 4, 0, 3, 0]
    assert chosen <= set(batch.rows.target.tolist())
    hard_prompts = {PAIRS[1]["prompt_ids"][0], PAIRS[3]["prompt_ids"][0]}
    for row, ids in enumerate(batch.rows.input_ids.tolist()):
        if hard_prompts & set(ids):
            assert 2 not in segments_of(batch.rows)[row].tolist()


def test_the_flags_of_a_batch():
    batch = collate(PAIRS, IS_HARD)
    assert len(batch) == batch.step_total == 4
    assert (batch.is_hard.dtype, batch.is_hard.tolist()) == (torch.bool, IS_HARD)
    assert (batch.preference.dtype, batch.preference.tolist()) == (torch.int64, [0, 2])
    assert (batch.sft.dtype, batch.sft.tolist()) == (torch.int64, [1, 3])
    assert (batch.margin.dtype, batch.margin.tolist()) == (torch.float64, [-1.0, -0.5, 0.0, 0.5])
    assert (batch.weight.dtype, batch.weight.tolist()) == (torch.float32, [1.0] * 4)
    assert (batch.ids.dtype, batch.ids.tolist()) == (torch.int64, [2**40 + 7 * b for b in range(4)])
    for rows in (batch.rows, batch.reference_rows):
        for name in ("input_ids", "position_ids", "target", "completion", "lengths"):
            assert getattr(rows, name).dtype == torch.int64, name
    filler = collate(PAIRS[:1], [False], weight=0.0, step_total=8)
    assert (filler.weight.tolist(), filler.step_total, filler.count) == ([0.0], 8, 0)


def test_moving_a_batch_moves_its_rows():
    batch = collate(PAIRS, IS_HARD)
    moved = batch.to(torch.device("meta"))
    tensors = [moved.weight, moved.preference, moved.ids, moved.rows.target, moved.rows.lengths]
    tensors += [moved.reference_rows.input_ids, moved.reference_rows.target]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.step_total, moved.rows.tokens) == (4, batch.rows.tokens)
    assert batch.rows.target.device.type == "cpu"


def test_a_mask_by_hand():
    """Prompt of 2, chosen of 2, rejected of 1, one of padding: the rejected token skips the chosen ones."""
    short, long = make_pair(0, 2, 2, 1), make_pair(1, 2, 2, 2)
    rows = collate([short, long], [False, False]).rows
    row = next(r for r in range(2) if rows.input_ids[r, 0] == short["prompt_ids"][0])
    assert segments_of(rows)[row].tolist() == [0, 0, 1, 1, 2, -1]
    expected = ["100000", "110000", "111000", "111100", "110010"]
    assert rows.attention_mask()[row, 0, :5].int().tolist() == [[int(c) for c in line] for line in expected]


PLAN = [((0,), 1.0, 3), ((1, 2), 1.0, 3), ((3,), 1.0, 1), ((3,), 0.0, 1), ((2, 0), 1.0, 2), ((1,), 1.0, 2)]


def make_loader(workers=0):
    return ResumableLoader(PLAN, PairCollator(PAIRS, IS_HARD), workers=workers)


def seen(batch):
    return tuple((i - 2**40) // 7 for i in batch.ids.tolist()), batch.weight[0].item(), batch.step_total


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_loader_continues_and_then_starts_over(workers):
    first = make_loader(workers)
    batches = iter(first)
    assert [seen(next(batches)) for _ in range(3)] == PLAN[:3]
    state = first.state_dict()
    assert state and {type(value) for value in state.values()} == {int}
    assert [seen(batch) for batch in batches] == PLAN[3:], "asking for the state must not disturb the epoch"
    second = make_loader(workers)
    second.load_state_dict(state)
    assert len(second) == len(PLAN), "Lightning wants the length of the full epoch"
    assert [seen(batch) for batch in second] == PLAN[3:]
    assert [seen(batch) for batch in second] == PLAN


def test_an_iterator_left_early_starts_anew():
    """The sanity check and limit_val_batches leave a validation loader's iterator; the next one sees every batch."""
    loader = make_loader()
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert [seen(batch) for batch in loader] == PLAN


def test_workers_change_nothing_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for alone, by_worker in zip(make_loader(0), make_loader(2), strict=True):
        assert seen(alone) == seen(by_worker)
        for name in ("input_ids", "position_ids", "target", "completion", "lengths"):
            assert torch.equal(getattr(alone.rows, name), getattr(by_worker.rows, name)), name
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("sides", "segments"), [((0,), {0, 1}), ((1,), {0, 2}), ((0, 1), {0, 1, 2})])
def test_sft_computes_the_sides_it_learns_and_no_other(sides, segments):
    """Reported hard: pairs 1 and 3. Trained by SFT: pair 1 only, so that 3 has a reference and both responses."""
    batch = collate(PAIRS, IS_HARD, preference_share=[1.0, 0.0, 1.0, 1.0], sft_sides=sides)
    assert batch.is_hard.tolist() == IS_HARD
    assert (batch.preference.tolist(), batch.sft.tolist(), batch.sft_sides) == ([0, 2, 3], [1], sides)
    lengths = [[len(pair["chosen_ids"]) for pair in PAIRS], [len(pair["rejected_ids"]) for pair in PAIRS]]
    for side in {0, 1} - set(sides):
        lengths[side][1] = 0
    assert batch.rows.lengths.tolist() == lengths[0] + lengths[1]
    assert len(batch.rows.target) == sum(map(sum, lengths))
    mine = next(row for row in range(4) if PAIRS[1]["prompt_ids"][0] in batch.rows.input_ids[row])
    assert set(segments_of(batch.rows)[mine].tolist()) - {-1} == segments
    assert batch.reference_rows.lengths.tolist()[1] == batch.reference_rows.lengths.tolist()[5] == 0
    assert batch.reference_rows.lengths.tolist()[3] == len(PAIRS[3]["chosen_ids"])


def test_epochs_that_differ_are_continued_in_the_right_one():
    plans = [PLAN, PLAN[::-1], PLAN[3:] + PLAN[:3]]

    def loader():
        made = make_loader()
        made.replan = plans.__getitem__
        return made

    first = loader()
    for epoch in (0, 1):
        first.sampler.set_epoch(epoch)
        assert [seen(batch) for batch in first] == plans[epoch]
    first.sampler.set_epoch(2)
    batches = iter(first)
    assert [seen(next(batches)) for _ in range(2)] == plans[2][:2]
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(2)
    assert [seen(batch) for batch in second] == plans[2][2:]
