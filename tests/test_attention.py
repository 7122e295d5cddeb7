"""Packed rows give each sequence what the model gives it alone, whatever computes the attention, or are refused."""

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_upper_left
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from mixdpo.batches.rows import Piece, build_rows, token_rows
from mixdpo.errors import InputError
from mixdpo.model import attention
from mixdpo.model.forward import _check_window, check_data, check_documents, output_head, predicting_states
from mixdpo.model.fused_head import token_log_probs
from mixdpo.model.loading import load_base

DRAW = torch.Generator().manual_seed(3)
CUDA = torch.device("cuda")
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


@pytest.mark.parametrize("attention", ["varlen", "lower_right", "by_segment", "sdpa", "eager"])
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(folder: Path, attention: str) -> None:
    if folder.name.startswith("gemma2") and attention != "eager":
        with pytest.raises(InputError, match="eager"):
            load(folder, attention)
        return
    model = load(folder, attention)
    assert check_documents(model) == ""  # a named one that fails is replaced, and said to be
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


SIZES = [[7, 5, 20], [1, 1, 1], [33], [9, 18], [2, 3, 4, 5]]  # of the pieces of documents
DOCUMENTS = [[Piece([7] * size) for size in pieces] for pieces in SIZES]


def heads_of(rows: Any) -> list[torch.Tensor]:
    """Query of four heads, key and value of two."""
    count, width = rows.input_ids.shape
    shapes = [(count, width, heads, 8) for heads in (4, 2, 2)]
    drawn = (torch.randn(shape, generator=DRAW, dtype=torch.float64) for shape in shapes)
    return [states.transpose(1, 2).requires_grad_() for states in drawn]


@pytest.mark.parametrize("pack", [0, 40, 1000])
@pytest.mark.parametrize("kernel", ["varlen", "lower_right", "by_segment"])
def test_kernels_against_a_mask_of_the_whole_row(kernel: str, pack: int) -> None:
    """Values and gradients, with grouped heads; nothing comes out of padding, and nothing goes into it."""
    rows = token_rows(DOCUMENTS, 0, pack)
    states = heads_of(rows)
    repeated = [states[0], *(part.repeat_interleave(2, 1) for part in states[1:])]
    expected = F.scaled_dot_product_attention(*repeated, rows.attention_mask(), scale=0.3).transpose(1, 2)
    used = dict((row, ends[-1]) for row, *ends in rows.documents)  # columns of each row, without its padding
    expected = expected * torch.stack([torch.arange(expected.shape[1]) < end for end in used.values()])[..., None, None]
    found, _ = attention.attention(kernel, None, *states, None, segments=rows.segments, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(expected.shape, generator=DRAW, dtype=torch.float64)
    gradients = [torch.autograd.grad((each * weights).sum(), states) for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_the_index_by_hand() -> None:
    """Rows of 6 columns: [aaab bb], padding 0; [c c | d . .]."""
    rows = token_rows([[Piece([1] * 3), Piece([2]), Piece([3] * 2)], [Piece([4] * 2)], [Piece([5])]], 0, 6)
    assert not rows.plain and token_rows([[Piece([1] * 3), Piece([2])], [Piece([4] * 2)]], 0).plain
    index = rows.segments
    assert index.queries == ((0, 6), (6, 9)) and index.sizes == ((4, 4), (2, 5), (2, 2), (1, 1))
    assert index.keys == ((0, 4), (0, 3), (4, 6), (6, 8), (8, 9))
    assert index.cu_seqlens.tolist() == [[0, 4, 6, 8, 9], [0, 4, 9, 11, 12]]
    assert index.cu_seqlens.dtype == torch.int32 and index.cu_seqlens[1].is_contiguous()


def plain_varlen(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, scale: Any) -> torch.Tensor:
    """By a loop over tokens and heads."""
    found, groups = torch.zeros_like(q), q.shape[1] // k.shape[1]
    assert (max_q, max_k) == tuple(int(cuts.diff().max()) for cuts in (cu_q, cu_k))
    for (begin, end), (first, last) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        for token, head in product(range(begin, end), range(q.shape[1])):
            seen = slice(first, last - (end - token) + 1)
            found[token, head] = (k[seen, head // groups] @ q[token, head] * scale).softmax(0) @ v[seen, head // groups]
    return found


def of_this_torch(q, k, v, *cuts, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0) and enable_gqa
    return plain_varlen(q, k, v, *cuts, scale=scale)


def of_an_older_torch(q, k, v, *cuts, is_causal=False, scale=None):
    assert is_causal
    return plain_varlen(q, k, v, *cuts, scale=scale)


@pytest.mark.parametrize("function", [of_this_torch, of_an_older_torch])
def test_what_the_kernel_of_cuda_is_asked_for(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions of `varlen_attn`, in place of the loop that stands in for it on a CPU."""
    assert attention._causal(varlen_attn) in ({"window_size": (-1, 0), "enable_gqa": True}, {"is_causal": True})
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    monkeypatch.setitem(attention.KERNELS, "varlen", attention.in_one_kernel)
    rows = token_rows(DOCUMENTS, 0, 40)
    states = heads_of(rows)
    compute = partial(attention.attention, segments=rows.segments, scaling=0.3)
    expected, found = (compute(kernel, None, *states, None)[0] for kernel in ("by_segment", "varlen"))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def top_left(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Any, scale: Any) -> torch.Tensor:
    """A response's first token sees the prompt's first token only."""
    kernel = lambda *states, scale: F.scaled_dot_product_attention(  # noqa: E731
        *states, causal_upper_left(states[0].shape[2], states[1].shape[2]), scale=scale, enable_gqa=True
    )
    return attention._one_by_one(kernel, q, k, v, segments, scale)


def other_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Any, scale: Any) -> torch.Tensor:
    """Each query sees the keys that stand one before its own."""
    return attention._one_by_one(attention._lower_right, q, k.roll(1, 0), v.roll(1, 0), segments, scale)


def wrong_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Any, scale: Any) -> torch.Tensor:
    """Right values; keys get no gradient, as though they were constants."""
    return attention._one_by_one(attention._lower_right, q, k.detach(), v, segments, scale)


def nothing(*_: Any) -> torch.Tensor:
    raise RuntimeError("FlashAttention only supports\nAmpere GPUs")


def not_a_number(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return q * torch.nan


WRONG = {top_left: r"llama models differ by \d+\.\d% from transformers' own on a", not_a_number: "differ by nan%"}
WRONG |= {nothing: r"cannot be computed in these rows \(FlashAttention only supports Ampere GPUs\)"}
WRONG |= {other_keys: "differ", wrong_backward: "differ"}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_kernel_is_named_and_the_next_one_taken(wrong, dtype, tiny_model, monkeypatch) -> None:
    model = load_base(tiny_model, quantization="none", dtype=dtype)
    for parameter in model.parameters():
        parameter.data *= 2  # of a fresh model all tokens are nearly alike
    monkeypatch.setitem(attention.KERNELS, "lower_right", wrong)
    told = check_documents(model)
    assert re.fullmatch(rf"warning: lower_right .*{WRONG[wrong]}.*\nattention is computed by by_segment\n", told)
    assert model.config._attn_implementation == "by_segment"
    monkeypatch.setitem(attention.KERNELS, "by_segment", wrong)  # asked for by name now
    told = check_documents(model)
    assert re.fullmatch(rf"warning: by_segment .*{WRONG[wrong]}.*\nattention is computed by sdpa\n", told)


def test_what_auto_takes_on_a_cpu(tiny_model: str) -> None:
    """And nothing is said of an attention that was asked for by name, or chosen before."""
    model = load_base(tiny_model, quantization="none", dtype="float32")
    assert check_documents(model) == "attention is computed by lower_right\n" and check_documents(model) == ""


def test_layers_that_drop_the_segments_are_not_trusted(tmp_path: Path) -> None:
    """StableLM's do. The mask that stands for them is not a number: nothing is silently wrong in plain rows either."""
    model = load(write_tiny("stablelm", tmp_path), "auto")
    for packed in (True, False):
        model.config._attn_implementation = "auto"
        told = check_data(model, "m", [table(PAIRS)], packed=packed)
        assert "lower_right attention is not used" in told and told.endswith("attention is computed by sdpa\n")
    found = in_rows(model, rows_of(PAIRS, share=False))
    torch.testing.assert_close(found, one_by_one(model, PAIRS), rtol=1e-5, atol=1e-6)


class Waits(TorchDispatchMode):
    """Counts what waits for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")
        self.count += func.overloadpacket.__name__ in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [(False, 0), (True, 0), (True, 100)])
@pytest.mark.parametrize("kernel", ["lower_right", "by_segment", "sdpa"])
def test_no_forward_or_backward_waits(kernel: str, layout: Any, tiny_model: str) -> None:
    """A single sequence as well, where transformers looks for packed ones; its own attention shows that this counts."""
    model = load_base(tiny_model, quantization="none", dtype="float32", attention=kernel)
    pairs = [{"prompt_ids": [5] * 5, "chosen_ids": [7] * 4, "rejected_ids": [9] * 3}]
    rows = build_rows(pairs, [True], [layout[0]], *layout)
    assert rows.plain == (not layout[0])
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    with Waits() as mode:
        predicting_states(model, rows).sum().backward()
    assert embeddings.grad is not None and mode.count == int(kernel == "sdpa" and rows.plain)


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    """`varlen` and `lower_right` against `by_segment` in bf16, values and gradients; what is padding stays 0."""
    rows, found = token_rows([[Piece([7] * 9 * size) for size in pieces] for pieces in SIZES], 0, 700).to(CUDA), {}
    drawn = [states.detach().to(CUDA, torch.bfloat16) for states in heads_of(rows)]
    for kernel in ("by_segment", "lower_right", "varlen"):
        states = [part.clone().requires_grad_() for part in drawn]
        values, _ = attention.attention(kernel, None, *states, None, segments=rows.segments, scaling=0.3)
        weights = torch.linspace(-1, 1, values.numel(), device=CUDA).view_as(values)
        found[kernel] = [values.detach(), *torch.autograd.grad((values.float() * weights).sum(), states)]
    for kernel in ("lower_right", "varlen"):
        for part, expected in zip(found[kernel], found["by_segment"], strict=True):
            assert (part.float() - expected.float()).norm() < 0.02 * expected.float().norm()


@pytest.mark.gpu
def test_auto_takes_the_one_kernel_on_a_gpu(tiny_model: str) -> None:
    model = load_base(tiny_model, quantization="none", dtype="bfloat16", device="cuda")
    assert check_documents(model) == "attention is computed by varlen\n"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_packed_rows_on_a_gpu(tiny_model: str, dtype: Any, tolerance: float) -> None:
    model = load_base(tiny_model, quantization="none", dtype=dtype, device="cuda")
    check_documents(model)
    layouts = ((False, 0), (True, 1000))
    apart, packed = (predicting_states(model, rows_of(PAIRS, *how).to(torch.device("cuda"))) for how in layouts)
    assert (apart - packed).norm() < tolerance * apart.norm()
