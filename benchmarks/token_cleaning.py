"""Token cleaning against its published procedure: scoring, selection, storage. Writes a JSON and prints Markdown.

    python benchmarks/token_cleaning.py [--samples 96] [--parts a,b,c] [--sweep | --profile]

a, scoring: losses of base and reference (LoRA r 16 with random B) on SmolLM2-135M-Instruct, fp32, each run in a process
of its own. Published: batches of 6 in file order, full logits, loss computed twice, nested lists; spared here are its
second model load (the adapter is switched off and on instead) and its padding of every loss row to 2,048.
b, selection: 2.01M of 3.35M scores, half of them between -1 and 1 rounded so that ties straddle the cut.
c, storage: 5M float32 scores on disk and back, with a warm page cache. The flat file needs no offsets: they are data.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mixdpo.adapters import Lora, add_adapters
from mixdpo.models import load_base, load_tokenizer
from mixdpo.packaged_model import PACKAGED
from mixdpo.samples import TokenPool
from mixdpo.sft_records import read_samples
from mixdpo.sft_tokenization import encode_samples
from mixdpo.token_cleaning.selection import Selection, select
from mixdpo.token_cleaning.token_losses import add_losses, open_losses

SEED = 0
ROWS, MAX_LENGTH, LONGEST_SHARE = 3000, 1024, 0.1
PUBLISHED_BATCH, RANK, B_STD, TOLERANCE = 6, 16, 0.01, 1e-3
ROUNDS = [("published", "ours"), ("ours", "published")]
SWEEP = [1024, 2048, 4096]
KEEP, SELECTED, STORED, MADE_SAMPLES, REPEATS = 0.6, 3_350_000, 5_000_000, 50_000, 3
SPEED_GOALS, MEMORY_GOAL, SELECTION_GOAL = {"as they lie": 2.3, "longer-tailed": 3.0}, 0.5, 50
Samples = list[dict[str, Any]]


# a: scoring


def length_regimes(source: str, count: int) -> dict[str, Samples]:
    """`count` samples in file order, and `count` of which a tenth are the longest of the first 3,000 rows."""
    rows = read_samples(source, limit=ROWS).dataset
    encoded = encode_samples(rows, load_tokenizer(PACKAGED), max_length=MAX_LENGTH, overlong="drop")[0]
    samples = encoded.select_columns(["input_ids", "spans"]).to_list()
    generator = np.random.default_rng(SEED)
    longest = np.argsort([-len(sample["input_ids"]) for sample in samples], kind="stable")
    tail = round(LONGEST_SHARE * count)
    chosen = np.concatenate([longest[:tail], generator.choice(longest[tail:], count - tail, replace=False)])
    return {"as they lie": samples[:count], "longer-tailed": [samples[i] for i in generator.permutation(chosen)]}


def published_losses(model: Any, samples: Samples) -> list[list[list[float]]]:
    """Base and reference -> sample -> position -> loss, 0 where the token is no response."""
    with torch.no_grad():
        with model.disable_adapter():
            base = published_pass(model, samples)
        return [base, published_pass(model, samples)]


def published_pass(model: Any, samples: Samples) -> list[list[float]]:
    losses = []
    for start in range(0, len(samples), PUBLISHED_BATCH):
        batch = padded(samples[start : start + PUBLISHED_BATCH])
        labels = batch["labels"]
        output = model(**batch, use_cache=False)
        logits = output.logits[:, :-1].reshape(-1, output.logits.shape[-1])
        found = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="none")
        rows = found.view(len(labels), -1).tolist()
        lengths = batch["attention_mask"].sum(1).tolist()
        losses += [[0.0, *row[: length - 1]] for row, length in zip(rows, lengths, strict=True)]
    return losses


def padded(samples: Samples) -> dict[str, torch.Tensor]:
    shape = len(samples), max(len(sample["input_ids"]) for sample in samples)
    input_ids, mask = torch.zeros(2, *shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, sample in enumerate(samples):
        ids, spans = torch.tensor(sample["input_ids"]), sample["spans"]
        input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            labels[row, start:end] = ids[start:end]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def our_losses(model: Any, samples: Samples, **options: int) -> list[np.ndarray]:
    pool = TokenPool(samples, np.cumsum([0, *map(response_tokens, samples)]))
    both = []
    for name in ("base", "policy"):
        both.append(open_losses(len(pool)))
        add_losses(both[-1], model, name, pool, range(len(samples)), **options)
    return both


def response_tokens(sample: dict[str, Any]) -> int:
    return sum(sample["spans"][1::2]) - sum(sample["spans"][::2])


def flat(losses: list[list[float]], samples: Samples) -> np.ndarray:
    """Nested losses -> (M,), response tokens only."""
    ranges = [
        (row, zip(s["spans"][::2], s["spans"][1::2], strict=True)) for row, s in zip(losses, samples, strict=True)
    ]
    return np.array([loss for row, spans in ranges for start, end in spans for loss in row[start:end]])


def two_roles() -> Any:
    """The model with its adapter `policy`, the same numbers in every process."""
    torch.manual_seed(SEED)
    model = add_adapters(load_base(PACKAGED, quantization="none", dtype="float32"), Lora(rank=RANK))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=B_STD)
    return model.eval()


def run_side(side: str, samples: Samples, options: dict[str, int], profile: bool = False) -> dict[str, Any]:
    """Seconds, MB and losses of one side; to be called in a fresh process."""
    model = two_roles()
    compute: Callable[..., Any] = {"published": published_losses, "ours": our_losses}[side]
    compute(model, samples[:2], **options)  # warm-up
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            compute(model, samples, **options)
        return {"profile": profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10)}
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was of loading
    resident = megabytes("VmRSS")
    losses, seconds = timed(lambda: compute(model, samples, **options))
    peak = megabytes("VmHWM")
    if side == "published":
        losses = [flat(nested, samples) for nested in losses]
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    return {
        "side": side,
        "seconds": seconds,
        "response_tokens_per_second": len(losses[0]) / seconds,
        "tokens_per_second": tokens / seconds,
        "resident_mb": resident,
        "peak_mb": peak,
        "peak_above_resident_mb": peak - resident,
        "losses": np.stack(losses),
    }


def megabytes(field: str) -> float:
    """Of this process. Not ru_maxrss, which a child inherits from its parent on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def in_fresh_process(*arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_side, *arguments).result()


def scoring(regimes: dict[str, Samples]) -> dict[str, Any]:
    return {name: compare_scoring(samples, SPEED_GOALS[name]) for name, samples in regimes.items()}


def compare_scoring(samples: Samples, speed_goal: float) -> dict[str, Any]:
    rounds = [{side: in_fresh_process(side, samples, {}) for side in order} for order in ROUNDS]
    losses = [run.pop("losses") for sides in rounds for run in sides.values()]
    difference = max(float(np.abs(each - losses[0]).max()) for each in losses)
    if not difference < TOLERANCE:
        raise SystemExit(f"the losses of the two sides differ by {difference}: there is nothing to compare")
    speedups = [sides["published"]["seconds"] / sides["ours"]["seconds"] for sides in rounds]
    key = "peak_above_resident_mb"
    shares = [sides["ours"][key] / sides["published"][key] for sides in rounds]
    lengths = [len(sample["input_ids"]) for sample in samples]
    batches = [lengths[i : i + PUBLISHED_BATCH] for i in range(0, len(lengths), PUBLISHED_BATCH)]
    return {
        "samples": len(samples),
        "tokens": sum(lengths),
        "response_tokens": losses[0].shape[1],
        "published_padding_share": 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches),
        "largest_loss_difference": difference,
        "mean_base_minus_reference": float(np.abs(losses[0][0] - losses[0][1]).mean()),
        "speedup": {"median": statistics.median(speedups), "all": speedups, "goal": speed_goal},
        "memory_share": {"median": statistics.median(shares), "all": shares, "goal": MEMORY_GOAL},
        "rounds": rounds,
    }


def sweep(regimes: dict[str, Samples]) -> None:
    for name, samples in regimes.items():
        for size in SWEEP:
            run = in_fresh_process("ours", samples, {"batch_tokens": size})
            print(
                f"{name}, batch_tokens {size}: {run['response_tokens_per_second']:.0f} response tokens/s, "
                f"{run['peak_above_resident_mb']:.0f} MB above {run['resident_mb']:.0f}"
            )


# b: selection


def made_scores(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count,) float32 scores and the (50,001,) offsets of samples whose lengths vary as a geometric variable's."""
    generator = np.random.default_rng(SEED)
    scores = generator.standard_normal(count, dtype=np.float32)
    scores = np.where(np.abs(scores) < 1, np.round(scores, 3), scores)
    cuts = np.sort(generator.choice(np.arange(1, count), MADE_SAMPLES - 1, replace=False))
    return scores, np.concatenate([[0], cuts, [count]])


def nested_lists(flat_scores: np.ndarray, offsets: np.ndarray) -> list[list[float]]:
    return [piece.tolist() for piece in np.split(flat_scores, offsets[1:-1])]


def published_selection(nested: list[list[float]]) -> list[list[bool]]:
    tokens = [(score, i, j) for i, scores in enumerate(nested) for j, score in enumerate(scores)]
    mask = [[False] * len(scores) for scores in nested]
    for _, i, j in sorted(tokens, key=lambda token: token[0], reverse=True)[: int(KEEP * len(tokens))]:
        mask[i][j] = True
    return mask


def selection() -> dict[str, Any]:
    scores, offsets = made_scores(SELECTED)
    assert int(KEEP * SELECTED) == round(KEEP * SELECTED)  # theirs rounds down, ours to the nearest
    nested = nested_lists(scores, offsets)
    ours = [timed(lambda: select(scores, offsets, Selection(KEEP))) for _ in range(REPEATS)]
    published = [timed(lambda: published_selection(nested)) for _ in range(REPEATS)]
    kept = ours[0][0]
    assert 0 < kept.ties_kept < kept.ties, "no tie straddles the cut"
    assert np.array_equal(np.concatenate(published[0][0]), kept.mask), "the masks differ"
    seconds = {"published": [run[1] for run in published], "ours": [run[1] for run in ours]}
    ratio = statistics.median(seconds["published"]) / statistics.median(seconds["ours"])
    counts = {"scores": SELECTED, "samples": MADE_SAMPLES, "ties_at_cut": kept.ties, "ties_kept": kept.ties_kept}
    return counts | {"seconds": seconds, "ratio": ratio, "goal": SELECTION_GOAL}


# c: storage


def storage() -> dict[str, Any]:
    scores, offsets = made_scores(STORED)
    nested = nested_lists(scores, offsets)
    ways: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
        "flat .npy": (lambda path: np.save(path, scores), np.load),
        "flat .npy, memory-mapped, summed": (
            lambda path: np.save(path, scores),
            lambda path: np.load(path, mmap_mode="r").sum(),
        ),
        "nested lists, torch.save": (lambda path: torch.save(nested, path), torch.load),
        "nested lists, torch.save, weights_only=False": (
            lambda path: torch.save(nested, path),
            lambda path: torch.load(path, weights_only=False),
        ),
        "nested lists, json": (
            lambda path: path.write_text(json.dumps(nested)),
            lambda path: json.loads(path.read_text()),
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        return {name: stored_and_loaded(Path(folder) / "scores.npy", *way) for name, way in ways.items()}


def stored_and_loaded(path: Path, store: Callable[[Path], Any], load: Callable[[Path], Any]) -> dict[str, float]:
    store_seconds = statistics.median(timed(lambda: store(path))[1] for _ in range(REPEATS))
    load_seconds = statistics.median(timed(lambda: load(path))[1] for _ in range(REPEATS))
    return {"store_seconds": store_seconds, "load_seconds": load_seconds, "megabytes": path.stat().st_size / 1e6}


# Report


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    value = action()
    return value, time.perf_counter() - started


def about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{platform.platform()}, {os.cpu_count()} x {cpu[0] if cpu else platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
    }


def scoring_table(result: dict[str, Any]) -> str:
    lines = ["| scoring | published | ours | ratio (each round) | goal |", "|---|---|---|---|---|"]
    rows = {
        "response tokens/s": ("response_tokens_per_second", "speedup"),
        "all tokens/s": ("tokens_per_second", "speedup"),
        "peak memory above the loaded model, MB": ("peak_above_resident_mb", "memory_share"),
        "peak memory, MB": ("peak_mb", None),
    }
    for regime, found in result.items():
        title = f"{regime}, {found['published_padding_share']:.0%} padding"
        for name, (key, ratio) in rows.items():
            sides = (statistics.median(sides[side][key] for sides in found["rounds"]) for side in ("published", "ours"))
            cells = [f"{title}: {name}", *(f"{value:,.0f}" for value in sides)]
            if ratio:
                values = found[ratio]
                cells += [
                    f"{values['median']:.2f} ({', '.join(f'{v:.2f}' for v in values['all'])})",
                    str(values["goal"]),
                ]
            lines.append("| " + " | ".join(cells + [""] * (5 - len(cells))) + " |")
        lines.append(
            f"| {title}: largest difference of losses | | {found['largest_loss_difference']:.1e} | | < {TOLERANCE} |"
        )
    return "\n".join(lines)


def selection_table(result: dict[str, Any]) -> str:
    published, ours = (statistics.median(result["seconds"][side]) for side in ("published", "ours"))
    head = "| selection of 3.35M scores | published | ours | ratio | goal |\n|---|---|---|---|---|\n"
    return head + f"| seconds | {published:.2f} | {ours:.3f} | {result['ratio']:.0f} | {result['goal']} |"


def storage_table(result: dict[str, Any]) -> str:
    head = "| storage of 5M scores | store, s | load, s | MB |\n|---|---|---|---|\n"
    return head + "\n".join(
        f"| {name} | " + " | ".join(f"{v:.3f}" for v in row.values()) + " |" for name, row in result.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--source", default="data/sft.jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/token_cleaning.json"))
    parser.add_argument("--parts", default="a,b,c")
    parser.add_argument("--sweep", action="store_true", help="only our scoring, at several batch_tokens")
    parser.add_argument("--profile", action="store_true", help="only our scoring, and where its time goes")
    options = parser.parse_args()
    parts = options.parts.split(",")
    regimes = length_regimes(options.source, options.samples) if "a" in parts else {}
    if options.sweep:
        return sweep(regimes)
    if options.profile:
        return print(in_fresh_process("ours", regimes["as they lie"], {}, True)["profile"])
    jobs = {
        "a": ("scoring", lambda: scoring(regimes), scoring_table),
        "b": ("selection", selection, selection_table),
        "c": ("storage", storage, storage_table),
    }
    report = {"about": about()}
    for name, run, table in (jobs[part] for part in parts):
        report[name] = run()
        print(table(report[name]), end="\n\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
