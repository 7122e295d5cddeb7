"""Full SFT, fixed and self-evolving token cleaning, and staged random tokens, on the same real data with two seeds.

    python benchmarks/compare_cleaning.py [FOLDER] [--seeds 0 1] [--anyway] [--gold]

The warm-up is two passes over slice 0 of 3: after one, planted noise was found with an AUC of 0.58 only (then 0.65).
Runs are kept in FOLDER (default runs/compare_cleaning): a stopped comparison goes on where it was. One warm-up per
seed is shared as reference and as start; base losses are computed once for all. Before anything is compared, planted
noise must be found: with an AUC below 0.6 the references are too weak, and the script stops (unless --anyway).
Outcome: held-out response loss by source, teacher-forced; with --gold also the gold score of the task `constraints`
(results are then compare_cleaning_gold).
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from cleaning_runs import gold_scores, held_out, run, run_all, stages, write
from measuring import about, table
from noise import stages_with_noise

NOISE = "{rate: 0.2, seed: 0}"
METHODS = ("full", "fixed", "self_evolving", "staged_random")


def seeded(seed: int, only: str = "null", count: int = 3, passes: int = 1) -> list[str]:
    slices = f"{{count: {count}, only: {only}, passes: {passes}, seed: {seed}}}"
    return ["--seed_everything", str(seed), "--data.slices", slices]


def jobs(folder: Path, seed: int) -> list[Any]:
    """The four methods; fixed is scored and trained on all slices, the staged start from the warm-up on slice 0."""
    adapter = str(folder / f"warm_up-{seed}/adapter")
    staged = [*seeded(seed, "[1, 2]"), "--model.adapter", adapter, "--model.cleaning.warm_up_stages", "0"]
    reference = ["--model.cleaning.reference", adapter]
    options = {
        "full": seeded(seed, count=1),
        "fixed": [*seeded(seed, count=1), *reference],
        "self_evolving": [*staged, *reference],
        "staged_random": [*staged, "--model.cleaning.scorer.seed", str(seed)],
    }
    return [(f"{method}-{seed}", method, options[method]) for method in METHODS]


def noise_found(folder: Path, seed: int) -> dict[str, Any]:
    """AUC of the warm-up reference on noise planted into slice 1; one step is trained, nothing is validated."""
    options = ["--model.cleaning.reference", str(folder / f"warm_up-{seed}/adapter")]
    options += ["--data", "noise.NoisySFTDataModule", "--data.noise", NOISE]
    options += ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", *seeded(seed, "[1]")]
    (stage,) = stages_with_noise(run(folder, (f"planted-{seed}", "fixed", options)))
    return {"auc": stage["planted"]["auc"], "mean |score|": stage["mean_abs_score"], "tokens": stage["tokens"]}


def by_method(losses: dict[str, dict[str, float]], kept: dict[str, Any], gold: dict[str, float]) -> str:
    """One row a method: the mean over its seeds, of the first column each seed as well."""
    rows = []
    for method in dict.fromkeys(name.rpartition("-")[0] or name for name in losses):
        runs = [name for name in losses if name == method or name.startswith(f"{method}-")]
        shares = [stage["kept_share"] for name in runs for stage in kept[name]]
        each = " / ".join(f"{losses[name]['loss']:.3f}" for name in runs)
        means = [mean(losses[name][key] for name in runs) for key in losses["start"]]
        means += [mean(shares) if shares else None, mean(gold[name] for name in runs) if runs[0] in gold else None]
        rows.append([method, each, *means])
    return table(["method", "each seed", *losses["start"], "kept", "gold"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/compare_cleaning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--anyway", action="store_true", help="go on with references that are too weak")
    parser.add_argument("--gold", action="store_true", help="answer the held-out prompts of `constraints` as well")
    options = parser.parse_args()
    folder, seeds = options.folder, options.seeds
    start = run(folder, ("start", "full", ["--model.optimizer.lr", "0", "--trainer.max_steps", "1"]))
    run_all(folder, [(f"warm_up-{seed}", "full", seeded(seed, "[0]", passes=2)) for seed in seeds])
    with ThreadPoolExecutor(2) as pool:
        checks = dict(zip(seeds, pool.map(lambda seed: noise_found(folder, seed), seeds), strict=True))
    print("planted noise:", checks, flush=True)
    if min(check["auc"] for check in checks.values()) < 0.6 and not options.anyway:
        sys.exit("AUC below 0.6: the references are too weak to compare methods; enlarge the warm-up (data.limit)")
    paths = {"start": start, **{f"warm_up-{seed}": folder / f"warm_up-{seed}" for seed in seeds}}
    paths |= run_all(folder, [job for seed in seeds for job in jobs(folder, seed)])
    losses = {name: held_out(path) for name, path in paths.items()}
    gold = gold_scores({name: path for name, path in paths.items() if "warm_up" not in name}) if options.gold else {}
    keys = list(losses["start"])
    rows = [[name, *(loss[key] for key in keys), gold.get(name)] for name, loss in losses.items()]
    kept = {name: stages(path) for name, path in paths.items()}
    done = {name: json.loads((path / "done.json").read_text()) for name, path in paths.items()}
    content = {"about": about() | {"threads": 1}, "planted_noise": checks, "held_out_loss": losses, "gold": gold}
    tables = by_method(losses, kept, gold) + "\n" + table(["run", *keys, "gold"], rows)
    write("compare_cleaning_gold" if gold else "compare_cleaning", content | {"stages": kept, "runs": done}, tables)


if __name__ == "__main__":
    main()
