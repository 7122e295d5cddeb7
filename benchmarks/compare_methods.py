"""MixDPO, DPO and SFT on the same pairs: same start, steps, batch and seed. Writes a JSON and a Markdown table.

    python benchmarks/compare_methods.py configs/alpaca_eval.yaml [options of run.py …]

The held-out pairs are easy or hard by MixDPO's threshold for all three. Lengths and end-token rates are of greedy
answers to prompts of the same file that come after the last row that was read (`data.limit` counts usable ones).
"""

import csv
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from measuring import about, table

from mixdpo.data.pairs import read_pairs

METHODS = {
    "MixDPO": None,
    "DPO": "{threshold: null, hard_fraction: 0, order: shuffled}",
    "SFT": "{threshold: null, hard_fraction: 1, order: shuffled}",
}
PROMPTS, NEW_TOKENS = 24, 128
COLUMNS = {
    "reward accuracy, easy": "val/easy/rewards/accuracy",
    "longer wins, easy": "val/easy/length_accuracy",
    "reward accuracy, hard": "val/hard/rewards/accuracy",
    "longer wins, hard": "val/hard/length_accuracy",
    "displacement of chosen, nats": "val/all/displacement/chosen",
    "SFT loss on chosen": "val/all/sft_loss",
}


def write_prompts(config: dict[str, Any], path: Path) -> None:
    """The first prompts of at most 400 characters behind the rows that are trained and validated on."""
    data = config["data"]["init_args"]
    last = read_pairs(data["source"], margin=(), limit=data["limit"]).dataset["row"][-1]
    with gzip.open(data["source"], "rt") as lines:
        rows = [json.loads(line) for line in lines]
    seen = {row["prompt"] for row in rows[:last]}
    fresh = dict.fromkeys(row["prompt"] for row in rows[last:] if len(row["prompt"]) <= 400)
    prompts = [prompt for prompt in fresh if prompt not in seen][:PROMPTS]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def train(config: str, method: str, prompts: Path, threshold: float | None, options: list[str]) -> dict[str, Any]:
    """One run of run.py in a process of its own; its held-out metrics, lengths, and route."""
    name = f"{Path(config).stem}-{method.lower()}"
    existing = set(Path("runs").glob(f"{name}*"))
    evaluation = {"prompts": str(prompts), "scorer": None, "max_new_tokens": NEW_TOKENS, "batch_size": PROMPTS}
    callback = [{"class_path": "lightning_modules.callbacks.GoldEvaluation", "init_args": evaluation}]
    command = [sys.executable, "run.py", "--config", config, "--name", name, *options]
    command += ["--trainer.callbacks", json.dumps(callback)]
    if METHODS[method]:
        command += ["--data.routing", METHODS[method], "--data.validation_threshold", str(threshold)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    (folder,) = set(Path("runs").glob(f"{name}*")) - existing
    with (folder / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    values = {title: float(rows[-1][key]) if rows[-1].get(key) else None for title, key in COLUMNS.items()}
    responses = json.loads((folder / "results.json").read_text())["heldout_prompts"]
    for title in ("response length, tokens", "ended by itself"):
        values[title] = responses[title]["after"]
        values[f"{title}, before training"] = responses[title]["before"]
    route = json.loads((folder / "route.json").read_text())
    return {"values": values, "route": route, "seconds": round(time.perf_counter() - started), "command": command[1:]}


def markdown(results: dict[str, dict[str, Any]]) -> str:
    titles = next(iter(results.values()))["values"]
    rows = [[title, *(result["values"][title] for result in results.values())] for title in titles]
    return table(["", *results], [*rows, ["seconds in all", *(result["seconds"] for result in results.values())]])


def main() -> None:
    config, options = sys.argv[1], sys.argv[2:]
    fixed = ("--data.source", "--data.limit", "--data.init_args", "--runs", "--name")
    if any(option.startswith(fixed) for option in options):
        sys.exit(
            "change source and limit in the config: the prompts for generation are chosen by them; names are given here"
        )
    out = Path("benchmarks/results") / f"compare_{Path(config).stem}"
    out.parent.mkdir(exist_ok=True)
    prompts = out.with_suffix(".prompts.jsonl")
    write_prompts(yaml.safe_load(Path(config).read_text()), prompts)
    results: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        threshold = results["MixDPO"]["route"]["threshold"] if results else None
        results[method] = train(config, method, prompts, threshold, options)
    out.with_suffix(".json").write_text(json.dumps({"about": about(), "results": results}, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown(results))
    prompts.unlink()
    print(markdown(results))


if __name__ == "__main__":
    main()
