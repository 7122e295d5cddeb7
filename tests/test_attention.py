"""Packed rows give each sequence what the model gives it alone, whatever computes the attention, or are refused."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdpo.batches.rows import Piece, build_rows, token_rows
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, add_adapters
from mixdpo.model.forward import _check_window, check_documents, output_head, predicting_states
from mixdpo.model.fused_head import token_log_probs
from mixdpo.model.loading import load_base

DRAW = torch.Generator().manual_seed(3)
ARCHITECTURES = ["llama", "qwen2", "gemma2", "cohere", "granite", "mistral"]


def ids(count: int) -> list[int]:
    return torch.randint(4, 60, (count,), generator=DRAW).tolist()


PAIRS = [
    {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)}
    for p, c, r in [(5, 4, 7), (1, 1, 1), (3, 9, 2), (8, 1, 6)]
]


def alone(causal_lm: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probabilities from the model's own forward of one sequence."""
    logits = causal_lm(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return logits[range(len(prompt) - 1, len(prompt) + len(completion) - 1), completion]


def one_by_one(causal_lm: Any, pairs: list[dict[str, list[int]]]) -> torch.Tensor:
    sides = [(pair, side) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    return torch.cat([alone(causal_lm, pair["prompt_ids"], pair[side]) for pair, side in sides])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp(request.param))


def load(folder: Path, attention: str) -> Any:
    return load_base(str(folder), quantization="none", dtype="float64", attention=attention).eval()


@pytest.mark.parametrize("attention", ["by_segment", "sdpa", "eager"])
@pytest.mark.parametrize("layout", [(True, 0), (True, 24), (True, 100), (False, 0), (False, 30)], ids=str)
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(folder: Path, attention: str, layout: Any) -> None:
    share, pack = layout
    if folder.name.startswith("gemma2") and attention != "eager":
        with pytest.raises(InputError, match="eager"):
            load(folder, attention)
        return
    model = load(folder, attention)
    check_documents(model)
    rows = build_rows(PAIRS, [True] * 4, [True] * 4, share, pack)
    assert len(rows.input_ids) == {(True, 0): 4, (True, 24): 3, (True, 100): 1, (False, 0): 8, (False, 30): 3}[layout]
    weights = torch.linspace(-1, 1, len(rows.target), dtype=torch.float64)
    parameter = model.get_input_embeddings().weight.requires_grad_()
    expected = one_by_one(model, PAIRS)
    (wanted,) = torch.autograd.grad(expected @ weights, [parameter])
    head = output_head(model)
    head.weight.requires_grad_(False)  # tied in some: its own part of the gradient is not asked for
    found = token_log_probs(predicting_states(model, rows), head, rows.target)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-6)  # norms compute in fp32
    if not model.config.tie_word_embeddings:
        (gradient,) = torch.autograd.grad(found @ weights, [parameter.requires_grad_()])
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
    for row in range(len(rows.input_ids)):
        for query in range(rows.input_ids.shape[1]):
            for key in range(rows.input_ids.shape[1]):
                asking, seen = where.get((row, query)), where.get((row, key))
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
    folder = write_tiny(name, tmp_path)
    with pytest.raises(InputError, match=r"model.attention eager"):
        load(folder, "by_segment")
    model = load(folder, "eager")
    with pytest.raises(InputError, match=r"data.share_prompt false"):
        check_documents(model)
    rows = build_rows(PAIRS, [True] * 4, [True] * 4, share_prompt=False)
    found = token_log_probs(predicting_states(model, rows), output_head(model), rows.target)
    torch.testing.assert_close(found.double(), one_by_one(model, PAIRS).double(), rtol=1e-5, atol=1e-5)


def test_a_table_of_attentions_of_its_own_is_no_broken_download(tmp_path: Path) -> None:
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"does not know model.attention by_segment: use model.attention eager"):
        load(tmp_path, "by_segment")
    check_documents(load(tmp_path, "eager"))


@pytest.mark.parametrize("attention", ["by_segment", "eager"])
@pytest.mark.parametrize("name", ["opt", "gpt_bigcode", "starcoder2"])
def test_dropout_of_the_base_is_off_under_any_name(name: str, attention: str, tmp_path: Path) -> None:
    more = {"dropout": 0.5, "layerdrop": 0.5, "residual_dropout": 0.5, "word_embed_proj_dim": 32, "ffn_dim": 48}
    model = load(write_tiny(name, tmp_path, attention_dropout=0.5, attn_pdrop=0.5, **more), attention).train()
    first, second = (model(torch.arange(9)[None], use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_a_sequence_beyond_the_sliding_window_is_refused_only_where_it_is_packed(tmp_path: Path) -> None:
    model = load(write_tiny("mistral", tmp_path, sliding_window=12), "by_segment")
    with pytest.raises(InputError, match="sliding window of 12"):
        predicting_states(model, build_rows(PAIRS, [True] * 4, [True] * 4))
    fitting = PAIRS[:2]
    predicting_states(model, build_rows(fitting, [True] * 2, [True] * 2))
    long = [{"prompt_ids": ids(20), "chosen_ids": ids(9), "rejected_ids": ids(3)}]
    rows = build_rows(long, [True], [True], share_prompt=False)
    found = token_log_probs(predicting_states(model, rows), output_head(model), rows.target)
    torch.testing.assert_close(found, one_by_one(model, long), rtol=1e-5, atol=1e-6)


def test_windows_that_go_by_other_names() -> None:
    """The one within a composite configuration; GPT-Neo's, over the columns of a row: 5 + 4 + 7 of the first pair."""
    rows = build_rows(PAIRS, [True] * 4, [True] * 4)
    _check_window(transformers.Gemma3Config(text_config={"sliding_window": 14}), rows)
    with pytest.raises(InputError, match=r"14 tokens .* window of 13"):
        _check_window(transformers.Gemma3Config(text_config={"sliding_window": 13}), rows)
    _check_window(transformers.GPTNeoConfig(window_size=16), rows)
    with pytest.raises(InputError, match=r"16 tokens .* window of 15"):
        _check_window(transformers.GPTNeoConfig(window_size=15), rows)


def test_a_head_that_says_other_logits_than_the_model_is_refused(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixdpo.model.forward.output_head", lambda model: replace(output_head(model), scale=2.0))
    with pytest.raises(InputError, match="llama models change their logits"):
        load_base(tiny_model, quantization="none", dtype="float32")


def test_an_adapter_on_the_head_is_refused(tiny_model: str) -> None:
    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(targets=["lm_head"]))
    with pytest.raises(InputError, match="keep adapters and quantisation off it"):
        output_head(model.get_base_model())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_rows_on_a_gpu(tiny_model: str, dtype: str) -> None:
    model = load_base(tiny_model, quantization="none", dtype=dtype, device="cuda")
    check_documents(model)
    states = [
        predicting_states(model, build_rows(PAIRS, [True] * 4, [True] * 4, *layout).to(torch.device("cuda")))
        for layout in [(False, 0), (True, 1000)]
    ]
    tolerance = 1e-4 if dtype == "float32" else 0.05
    assert (states[0] - states[1]).norm() < tolerance * states[0].norm()
