"""Packed rows give each sequence what the model gives it alone, whatever computes the attention, or are refused."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from conftest import write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdpo.batches.rows import Piece, build_rows, token_rows
from mixdpo.errors import InputError
from mixdpo.model.forward import _check_window, check_data, check_documents, output_head, predicting_states
from mixdpo.model.fused_head import token_log_probs
from mixdpo.model.loading import load_base

DRAW = torch.Generator().manual_seed(3)
ARCHITECTURES = ["llama", "qwen2", "gemma2"]


def pair(*sizes: int) -> dict[str, list[int]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {name: torch.randint(4, 60, (n,), generator=DRAW).tolist() for name, n in zip(names, sizes, strict=True)}


PAIRS = [pair(5, 4, 7), pair(1, 1, 1), pair(3, 9, 2), pair(8, 1, 6)]


def rows_of(pairs: Any, share: bool = True, pack: int = 0) -> Any:
    return build_rows(pairs, [True] * len(pairs), [True] * len(pairs), share, pack)


def one_by_one(causal_lm: Any, pairs: Any) -> torch.Tensor:
    """Log-probabilities from the model's own forward of one sequence."""
    found = []
    for ids, side in [(ids, side) for ids in pairs for side in ("chosen_ids", "rejected_ids")]:
        prompt, completion = ids["prompt_ids"], ids[side]
        logits = causal_lm(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        found.append(logits[range(len(prompt) - 1, len(prompt) + len(completion) - 1), completion])
    return torch.cat(found)


def in_rows(model: Any, rows: Any) -> torch.Tensor:
    head = output_head(model)
    head.weight.requires_grad_(False)  # tied in some: its own part of the gradient is not asked for
    return token_log_probs(predicting_states(model, rows), head, rows.target)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp(request.param))


def load(folder: Path, attention: str) -> Any:
    return load_base(str(folder), quantization="none", dtype="float64", attention=attention).eval()


@pytest.mark.parametrize("attention", ["by_segment", "sdpa", "eager"])
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(folder: Path, attention: str) -> None:
    if folder.name.startswith("gemma2") and attention != "eager":
        with pytest.raises(InputError, match="eager"):
            load(folder, attention)
        return
    model = load(folder, attention)
    check_documents(model)
    parameter, expected = model.get_input_embeddings().weight.requires_grad_(), one_by_one(model, PAIRS)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected @ weights, [parameter])
    for (share, pack), count in {(True, 0): 4, (True, 24): 3, (True, 100): 1, (False, 0): 8, (False, 30): 3}.items():
        rows = rows_of(PAIRS, share, pack)
        assert len(rows.input_ids) == count
        found = in_rows(model, rows)
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-6)  # norms compute in fp32
        if not model.config.tie_word_embeddings:
            (gradient,) = torch.autograd.grad(found @ weights, [parameter])
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


pieces = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(st.lists(pieces, min_size=1, max_size=5), st.sampled_from([0, 6, 100]))
@settings(max_examples=60)
def test_the_mask_against_loops_over_tokens(shapes: list[list[int]], pack: int) -> None:
    """A token sees what stands before it in its own piece, and all of the first piece of its document."""
    rows = token_rows([[Piece([7] * size) for size in shape] for shape in shapes], 0, pack)
    where: dict[tuple[int, int], tuple[int, int]] = {}  # row and column -> document and piece
    for number, (row, *bounds) in enumerate(rows.documents):
        for piece, (begin, end) in enumerate(pairwise(bounds)):
            where |= {(row, column): (number, piece) for column in range(begin, end)}
    assert len(where) == rows.tokens == sum(map(sum, shapes))
    mask = rows.attention_mask()
    for row, query, key in torch.cartesian_prod(*map(torch.arange, (*rows.input_ids.shape, rows.input_ids.shape[1]))):
        asking, seen = where.get((int(row), int(query))), where.get((int(row), int(key)))
        expected = query == key
        if asking is not None and seen is not None and key <= query:
            expected = asking[0] == seen[0] and (asking[1] == seen[1] or seen[1] == 0)
        assert mask[row, 0, query, key] == expected


def test_positions_begin_again_after_the_first_piece_of_each_document() -> None:
    rows = token_rows([[Piece([1] * 3), Piece([2] * 2), Piece([3])], [Piece([4] * 2)]], 0, 100)
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert rows.documents == ((0, 0, 3, 5, 6), (0, 6, 8)) and not rows.plain
    assert token_rows([[Piece([1] * 3), Piece([2])], [Piece([4] * 2)]], 0).plain


@pytest.mark.parametrize("name", ["bloom", "falcon_mamba"])
def test_architectures_where_it_is_not_exact_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.attention eager"):
        load(write_tiny(name, tmp_path), "by_segment")
    model = load(tmp_path, "eager")
    with pytest.raises(InputError, match=r"data.share_prompt false"):
        check_documents(model)
    found = in_rows(model, rows_of(PAIRS, share=False))
    torch.testing.assert_close(found.double(), one_by_one(model, PAIRS).double(), rtol=1e-5, atol=1e-5)


OTHERS = [("opt", "by_segment"), ("gpt_bigcode", "eager"), ("starcoder2", "eager")]


@pytest.mark.parametrize(("name", "attention"), OTHERS)
def test_dropout_of_the_base_is_off_under_any_name(name: str, attention: str, tmp_path: Path) -> None:
    more = {"dropout": 0.5, "layerdrop": 0.5, "residual_dropout": 0.5, "word_embed_proj_dim": 32, "ffn_dim": 48}
    model = load(write_tiny(name, tmp_path, attention_dropout=0.5, attn_pdrop=0.5, **more), attention).train()
    first, second = (model(torch.arange(9)[None], use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_a_sequence_beyond_the_sliding_window_is_refused_only_where_it_is_packed(tmp_path: Path) -> None:
    """A response behind a shared prompt sees no other response, so each alone must fit: 5 + 7, 2, 3 + 9, 8 + 6."""
    model = load(write_tiny("mistral", tmp_path, sliding_window=12), "by_segment")
    with pytest.raises(InputError, match=r"14 tokens .* sliding window of 12"):
        predicting_states(model, rows_of(PAIRS, pack=100))
    found = in_rows(model, rows_of(PAIRS[:3], pack=100))
    torch.testing.assert_close(found, one_by_one(model, PAIRS[:3]), rtol=1e-5, atol=1e-5)
    long = [pair(20, 9, 3)]
    found = in_rows(model, rows_of(long, share=False))
    torch.testing.assert_close(found, one_by_one(model, long), rtol=1e-5, atol=1e-6)


COMPOSITE = lambda window: transformers.Gemma3Config(text_config={"sliding_window": window})  # noqa: E731


@pytest.mark.parametrize("config", [COMPOSITE, lambda window: transformers.GPTNeoConfig(window_size=window)])
def test_windows_that_go_by_other_names(config: Any) -> None:
    """The one within a composite configuration, and GPT-Neo's; the last pair has 8 + 6 tokens."""
    _check_window(config(14), rows_of(PAIRS))
    with pytest.raises(InputError, match=r"14 tokens .* window of 13"):
        _check_window(config(13), rows_of(PAIRS))
    sample = token_rows([[Piece([1] * 14)], [Piece([1])]], 0, 100)
    with pytest.raises(InputError, match=r"14 tokens .* window of 13"):
        _check_window(config(13), sample)


def table(pairs: Any, **more: Any) -> Any:
    rows = [{"pair_id": 70 + i, "row": i + 1, "place": f"row {i + 1}"} | pair for i, pair in enumerate(pairs)]
    return datasets.Dataset.from_list([row | {name: of[i] for name, of in more.items()} for i, row in enumerate(rows)])


@pytest.mark.parametrize(("name", "more"), [("gpt2", {}), ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48})])
def test_more_tokens_than_absolute_positions_are_refused(name: str, more: Any, tmp_path: Path) -> None:
    model = load(write_tiny(name, tmp_path, **more), "eager")
    assert check_data(model, "m", [table([pair(60, 68, 1), pair(100, 1, 28)])], packed=False) == ""
    long = table([pair(1, 1, 1), pair(60, 9, 69), pair(127, 1, 1)])
    with pytest.raises(InputError, match=r"^row 2 \(id 71\) has 129 tokens, and m has 128 .*: set data.max_length 128"):
        check_data(model, "m", [table(PAIRS), long], packed=False)
    assert check_data(model, "m", [long.select([0, 2])], packed=False) == ""  # a row that is left out does not count
    with pytest.raises(InputError, match=r"^b.csv, row 1 \(id 71\) has 129 tokens"):
        ids = long.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        check_data(model, "m", [table(ids, place=["", "b.csv, row 1", ""])], packed=True)
    sample = datasets.Dataset.from_list([{"sample_id": 7, "place": "row 4", "input_ids": [5] * 129}])
    with pytest.raises(InputError, match=r"row 4 \(id 7\) has 129 tokens"):
        check_data(model, "m", [sample], packed=True)


def test_more_tokens_than_the_window_are_refused_where_sequences_share_rows(tmp_path: Path) -> None:
    model, pairs = load(write_tiny("mistral", tmp_path, sliding_window=17), "by_segment"), [*PAIRS, pair(10, 1, 8)]
    with pytest.raises(InputError, match=r"row 5 \(id 74\) has 18 tokens, and m has a sliding window of 17: set data"):
        check_data(model, "m", [table(pairs)], packed=True)
    assert check_data(model, "m", [table(pairs)], packed=False) == ""
    assert check_data(model, "m", [table(PAIRS)], packed=True) == ""


def test_more_tokens_than_rotary_positions_are_warned_about_once(folder: Path) -> None:
    model = load(folder, "eager")
    tables = [table([pair(1, 127, 1), pair(1, 1, 128), pair(99, 1, 50)]), table([pair(1, 128, 1)])]
    told = "warning: 3 rows have more tokens than the 128 positions that m was made with: set data.max_length 128\n"
    assert check_data(model, "m", tables, packed=False) == told
    assert check_data(model, "m", [tables[0].select([0])], packed=False) == ""


def test_a_head_that_says_other_logits_than_the_model_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr("mixdpo.model.forward.output_head", lambda model: replace(output_head(model), cap=0.1))
    with pytest.raises(InputError, match="llama models rescale the head's logits"):
        load_base(tiny_model, quantization="none", dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_packed_rows_on_a_gpu(tiny_model: str, dtype: Any, tolerance: float) -> None:
    model = load_base(tiny_model, quantization="none", dtype=dtype, device="cuda")
    check_documents(model)
    layouts = ((False, 0), (True, 1000))
    apart, packed = (predicting_states(model, rows_of(PAIRS, *how).to(torch.device("cuda"))) for how in layouts)
    assert (apart - packed).norm() < tolerance * apart.norm()
