"""Does it help to train by difficulty on these pairs? Trains CONFIG and controls, each from several seeds.

A control is CONFIG under an overlay of configs/controls. Each run is a process of run.py, as in `mixdpo study`. All
runs have the same margins, the same held-out rows, which no seed changes, and as many optimizer steps as CONFIG. All
report held-out pairs as hard by CONFIG's data.validation_threshold, or else by its τ. The outcomes are the gold score,
where CONFIG's GoldEvaluation has a scorer, and the accuracy over held-out pairs. Runs, table.md and table.csv lie in
RUNS/compare/NAME. The same command continues, and runs what is missing.

For a judge's outcome, use these commands for each RUN in that folder:
  python run.py predict --config configs/evaluation/alpaca_eval.yaml --model.run RUN --name NAME --data.source PROMPTS
  python -m mixdpo judge runs/NAME.json --baseline BASELINE.json --model JUDGE --order both
  python -m mixdpo score runs/NAME.verdicts.sqlite --against runs/CONTROL.verdicts.sqlite
"""

import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from shlex import join
from subprocess import run
from sys import executable

from jsonargparse.typing import PositiveInt

from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError, check_one_of
from mixdpo.evaluation.fit_results import PAIRS
from mixdpo.evaluation.report import report
from mixdpo.evaluation.study_design import Plan, Spread, Study
from mixdpo.evaluation.study_run import RUN, run_study
from mixdpo.storage.read import parse_yaml
from mixdpo.storage.shipped import find_config, shipped_names

MATCHED = {"trainer.max_steps": ("results.json", "steps"), "data.validation_threshold": ("route.json", "threshold")}
"""Option of the controls -> file and key that has its value, in the folder of CONFIG's first seed."""

PARSER = ArgumentParser("mixdpo compare", None, __doc__, None, [], RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("config", help="config of run.py, without --config; options of run.py for all runs may follow")
PARSER.add_argument("--with", default="dpo,dpo_easy_only,random_to_sft", help="controls: %(default)s")
PARSER.add_argument("--seeds", default=3, type=PositiveInt, help="number of seeds, from 0 on, of everything random")
PARSER.add_argument("--at_once", default=1, type=int, choices=range(1, 9), help="runs at a time, which share the cores")
PARSER.add_argument("--dry_run", default="false", choices=("true", "false"), help="print the commands, run nothing")


def compare(arguments: list[str]) -> int:
    """Returns the exit status: 0, 1 if a run failed, 130 if interrupted.

    Raises:
        InputError: an option is wrong, or leaves nothing to compare.
    """
    given, words = PARSER.parse_known_args(["--config" if word == "-c" else word for word in arguments])
    overlays = {name[9:]: f"configs/{name}.yaml" for name in shipped_names() if name.startswith("controls/")}
    for control in (controls := vars(given)["with"].split(",")):  # selective_dpo has margins of its own
        check_one_of("each name of --with", control, sorted(overlays.keys() - {"selective_dpo"}))
    options = dict(pairs := re.findall(r"(?:^|\0)--([^=\0]+)[=\0]([^\0]*)", "\0".join(words)))
    if len(options) < len(pairs):
        raise InputError(f"{join(words)}: give each option of run.py once")
    command = [executable, *RUN, "--config", find_config(given.config), *words, "--print_config"]
    parsed = run(command, capture_output=True, text=True)
    if parsed.returncode:
        raise InputError(parsed.stderr.strip().rpartition("\n")[2].removeprefix("error: "))
    found = parse_yaml(parsed.stdout, given.config, finite=False)
    data, used, name = found["data"]["init_args"], found["trainer"]["callbacks"], str(found["name"])
    used = [used] if isinstance(used, dict) else used or []
    prompts = next((each["init_args"]["prompts"] for each in used if each.get("init_args", {}).get("scorer")), "")
    outcomes = {"gold score": sorted({row.get("part", "all") for row in read_prompts(prompts)})} if prompts else {}
    outcomes |= {"held-out pairs": [*PAIRS], **{part: [part] for part in PAIRS}} if data["validation"] else {}
    route = data.get("routing", {}) if outcomes else {}
    if route.get("assignment") != "margin" or route["hard_fraction"] in (0, 1):
        raise InputError("nothing to compare: set data.routing.hard_fraction (assignment margin) and data.validation")
    if name in controls or any((each.get("init_args") or {}).get("monitor") for each in used):
        raise InputError(f"compare takes no control called {name}, and no callback with a monitor: runs end alike")
    place = given.config, f"{found['runs']}/compare/{name}", {name: Plan()}, prompts, outcomes, name, Spread(0, 0)
    main = Study(*place, seeds=[*range(given.seeds)], options=options, at_once=given.at_once)
    if not (dry := given.dry_run == "true") and (status := run_study(main)):
        return status
    first, shared = Path(main.folder, main.name(name, {}, 0)), {"trainer.max_epochs": "-1"}
    for option, (file, key) in [*MATCHED.items()][: 1 + (data["validation_threshold"] is None)]:
        shared[option] = f"[{key} of {first / file}]" if dry else parse_yaml((first / file).read_text(), file)[key]
    plan = Study(**vars(main) | {"runs": main.runs | {each: Plan(overlays[each], shared) for each in controls}})
    for job in [(each, {}, seed) for each in plan.runs for seed in plan.seeds] * dry:
        print("mixdpo fit", join(word for pair in plan.arguments(*job) for word in pair))
    status = 0 if dry else run_study(plan)
    if not (dry or status):
        report([f"{plan.folder}/{plan.name(each, {}, 0)}" for each in plan.runs], out=f"{plan.folder}/report.html")
    print("" if prompts else __doc__.rpartition("\n\n")[2])
    return status
