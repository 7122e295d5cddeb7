"""Parts of benchmarks/device.py: whether the ways of attention agree, what they take, and how fast generation is."""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from inputs import LLAMA_8B, TINY, random_pair, random_policy, small_base, wide_llama

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Found = Iterator[tuple[str, Any]]


def sync() -> None:
    if GPU:
        torch.cuda.synchronize()


def attempt(action: Callable[[], Any]) -> Any:
    """The result, or the error's text: one way that fails says nothing about the next one."""
    try:
        return action()
    except Exception as error:  # whatever a kernel or a card refuses
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def attentions() -> list[str]:
    """The names of our ways of attention, whichever this commit has."""
    from mixdpo.model.loading import Attention

    return [name for name in get_args(Attention) if name not in ("auto", "sdpa", "eager")]


def rows_of(lengths: list[int], prompt: int, **layout: Any) -> Any:
    from mixdpo.batches.rows import build_rows

    pairs, all_of = [random_pair(prompt, length, seed) for seed, length in enumerate(lengths)], [True] * len(lengths)
    return build_rows(pairs, all_of, all_of, **layout).to(DEVICE)


def parity(tiny: bool, out: Path) -> Found:
    """log p of the same tokens, and their gradient, by every way of attention; against fp32, eager, nothing packed."""
    from mixdpo.model.forward import row_log_probs

    billion = LLAMA_8B | {"vocab_size": 32_768, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    shape, lengths, prompt = (TINY, [60, 50], 8) if tiny else (billion, [500, 391], 100)
    layouts = {"alone": {"share_prompt": False}, "packed": {"pack": 10**6}}
    rows = {name: rows_of(lengths, prompt, **layout) for name, layout in layouts.items()}
    wide, truth = wide_llama(shape, torch.float32, DEVICE), None
    for dtype in (torch.float32, torch.bfloat16):
        model = wide if dtype == torch.float32 else copy.deepcopy(wide).to(dtype)
        for attention, layout in ((a, b) for a in ("eager", *attentions()) for b in rows):

            def values(model: Any = model, attention: str = attention, layout: str = layout) -> tuple[Any, Any]:
                model.config._attn_implementation, model.get_input_embeddings().weight.grad = attention, None
                row_log_probs(model, rows[layout]).sum().backward()
                with torch.no_grad():
                    found = row_log_probs(model, rows[layout], exact=True).float()
                order = rows[layout].completion.sort(stable=True).indices
                return found[order], model.get_input_embeddings().weight.grad.float()

            got = attempt(values)
            if isinstance(got, tuple):
                truth = truth or got
                off, gradient = (got[0] - truth[0]).abs(), (got[1] - truth[1]).norm() / truth[1].norm()
                got = {"mean, nats": float(off.mean()), "largest": float(off.max()), "gradient": float(gradient)}
            yield f"{str(dtype)[6:]}, {attention}, {layout}", got
    with torch.no_grad():
        sums = [row_log_probs(model, rows["packed"]) for _ in range(5)]
    yield f"{attentions()[-1]} in bf16 five times, the same bits", all(torch.equal(sums[0], each) for each in sums)


def speed(tiny: bool, out: Path) -> Found:
    """Forward and backward of two layers of an 8B model, almost without MLP: attention and its projections."""
    from mixdpo.model.forward import predicting_states

    layers = {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 2048}
    model = wide_llama((TINY if tiny else LLAMA_8B) | layers, torch.bfloat16, DEVICE)
    shapes = {"2 × 1,024": [1024], "2 × 2,048": [2048], "8 pairs of 2 × 400": [400] * 8}
    for (name, lengths), attention in ((shape, way) for shape in shapes.items() for way in (*attentions(), "sdpa")):
        lengths = [length // 16 for length in lengths] if tiny else lengths
        rows, repeats = rows_of(lengths, 8 if tiny else 121, pack=10**6), 2 if tiny else 20

        def once(rows: Any = rows) -> None:
            predicting_states(model, rows).float().square().sum().backward()

        def measured(attention: str = attention, once: Any = once, repeats: int = repeats) -> dict[str, Any]:
            model.config._attn_implementation, found = attention, {}
            once()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                    once()
                    sync()
                found["kernels"] = sum(event.count for event in profiler.key_averages())
            sync()
            started = time.perf_counter()
            for _ in range(repeats):
                once()
            sync()
            found["ms a layer"] = 1e3 * (time.perf_counter() - started) / repeats / 2
            return found | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if GPU else {})

        yield f"{name}, {attention}", attempt(measured)


def generation(tiny: bool, out: Path) -> Found:
    """Tokens a second of `generate` with eight layers of an 8B model: NF4 with its adapter, and a merged bf16 copy."""
    from mixdpo.evaluation.generation import generate
    from mixdpo.model.export import merged_copy
    from mixdpo.model.loading import load_tokenizer

    shape, count, tokens = (TINY, 4, 4) if tiny else (LLAMA_8B | {"num_hidden_layers": 8}, 32, 64)
    tokenizer, model = load_tokenizer(small_base()), random_policy(shape, DEVICE, attention="sdpa").eval()
    prompts = [f"Write {number} lines about the sea and the wind." for number in range(count)]
    ways = {"NF4 with adapter": lambda: model, "merged, bf16": lambda: merged_copy(model, dtype=torch.bfloat16)}

    def measured(make: Callable[[], Any]) -> dict[str, float]:
        given, options = make(), {"batch_size": count, "progress": False}
        with torch.autocast(DEVICE.type, torch.bfloat16):
            generate(given, tokenizer, prompts, max_new_tokens=2, **options)
            sync()
            started = time.perf_counter()
            found = generate(given, tokenizer, prompts, max_new_tokens=tokens, **options)
            sync()
        made = sum(response.tokens for responses in found for response in responses)
        return {"tokens": made, "tokens_per_second": made / (time.perf_counter() - started)}

    for name, make in ways.items():
        yield name, attempt(lambda make=make: measured(make))
