"""The YAML file of a study, and the record of its runs."""

from typing import Any

import yaml

from bad_input.case import Case, Place
from mixdpo.evaluation.study_design import read_study
from mixdpo.evaluation.study_run import is_done


def study(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "config": "configs/demo.yaml", "folder": "studies/x",
        "runs": {"dpo": {}, "mixdpo": {"overlay": "configs/controls/mixdpo.yaml"}}, "prompts": "prompts.jsonl",
        "outcomes": {"gold": ["main"]}, "control": "dpo", "assumed_sd": {"prompts": 0.3, "seeds": 0.0},
        "options": {"data.validation": 0},
    }  # fmt: skip
    return {key: value for key, value in (base | changes).items() if value is not ...}


STUDIES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("a misspelt key", study(seed=[0]), ("Option 'seed' is not accepted", "did you mean 'seeds'?")),
    ("a key missing", study(control=...), ("arguments are required: control",)),
    ("a seed twice", study(seeds=[1, 1]), ("would be called dpo-seed1", "choose other values")),
    ("no runs", study(runs={}), ("need at least one entry",)),
    ("a misspelt key of a run", study(runs={"dpo": {"overlays": "x"}}), ('"runs"', "Option 'overlays'", "did you")),
    ("an unknown control", study(control="sft"), ("runs.dpo: no run is called 'sft', its control",)),
    ("a family with a misspelt run", study(holm=["mixdpo", "sft"]), ("holm: 'sft' is no run that is compared",)),
    ("a family with its control", study(holm=["dpo"]), ("'dpo' is no run that is compared", "name runs that are")),
    ("a grid and nothing to choose by", study(grid={"lr": [1, 2]}), ("choose_by: name the part",)),
    ("an outcome that chooses", study(choose_by="main"), ("main chooses the grid point and cannot be an outcome",)),
    ("two runs of one name", study(grid={"a": [1, 1]}, choose_by="part"), ("would be called", "choose other values")),
    ("no YAML", "a: [1\nb: ]", ("no valid YAML", "line 2", "correct it")),
]


def study_case(fault: str, content: Any, says: tuple[str, ...]) -> Case:
    text = content if isinstance(content, str | bytes) else yaml.safe_dump(content)
    return Case("study", fault, lambda place: read_study(place.write("study.yaml", text)), ("study.yaml", *says))


def record_of_a_run(place: Place) -> Any:
    plan = read_study(place.write("study.yaml", yaml.safe_dump(study() | {"folder": str(place.folder)})))
    place.write("dpo-seed0.json", "{")
    return is_done(plan, "dpo-seed0", [])


CASES = [
    Case("study", "no such file", lambda place: read_study("/no.yaml"), ("no config /no.yaml", "mixdpo configs")),
    Case("study", "a record cut off", record_of_a_run, ("dpo-seed0.json is damaged", "to repeat the run")),
    *(study_case(*row) for row in STUDIES),
]
