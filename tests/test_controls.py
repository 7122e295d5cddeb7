"""The presets: each changes exactly what its header lists, whatever it is laid over, and trains."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import adapter_weights, make_pairs, make_trainer, write_pairs
from test_configs import ROOT, cli  # noqa: F401  (a fixture)

from lightning_modules.callbacks.clean_tokens import RefreshReference

CONTRARY = """
name: contrary
model: {init_args: {schedule: mixdpo.routing.Constant, easy_sft_weight: 0.25}}
data:
  init_args:
    margin: score
    routing:
      threshold: 0.4
      hard_fraction: null
      order: hard_to_easy
      buckets: 9
      assignment: ASSIGNMENT
      hard_action: preference
      blend_width: 9
"""
"""Another value of every key that a preset sets."""

EXPECTED = {
    "dpo": (24, 0, 1), "dpo_sorted": (24, 0, 1), "dpo_easy_only": (21, 0, 1), "mixdpo": (24, 3, 2),
    "mixdpo_paper_cosine": (24, 3, 2), "mixdpo_shuffled": (24, 3, 1), "mixdpo_interleaved": (24, 3, 1),
    "sft_all": (24, 24, 1), "sft_hard_only": (3, 3, 1), "sft_rejected": (24, 3, 2), "sft_both": (24, 3, 2),
    "dpo_plus_nll": (24, 0, 1), "random_to_sft": (24, 3, 2), "inverted": (24, 3, 2), "sft_then_dpo": (24, 3, 2),
    "selective_dpo": (21, 0, 1), "refresh_at_buckets": (24, 0, 3), "blend": (24, 4, 2),
    "staged_competence": (24, 0, 3), "tr_dpo": (24, 0, 1),
}  # fmt: skip
"""Of 24 pairs, 12 % of them hard: those trained, those of them by SFT, and the stages in steps of four."""


@pytest.fixture(scope="module")
def parse(tmp_path_factory: pytest.TempPathFactory, cli: Any) -> Any:  # noqa: F811
    """Names of configs, one over the other -> what they say; each parsed once."""
    folder = tmp_path_factory.mktemp("contrary")
    for assignment in ("margin", "random"):
        (folder / f"contrary_{assignment}.yaml").write_text(CONTRARY.replace("ASSIGNMENT", assignment))

    @cache
    def parsed(*names: str) -> Any:
        places = [(folder if name.startswith("contrary") else ROOT / "configs") / f"{name}.yaml" for name in names]
        return cli.parser.parse_args(["fit", *(part for place in places for part in ("--config", str(place)))])

    return parsed


def control_file(name: str) -> Path:
    return ROOT / f"configs/controls/{name}.yaml"


def listed(control: Path) -> list[str]:
    """The keys of the header's `# Changes: …`."""
    found = re.search(r"^# Changes: (.+(?:\n#   .+)*)$", control.read_text("utf-8"), flags=re.MULTILINE)
    assert found, control
    return re.split(r",\s+(?:#\s+)?", found[1])


def keys_set(tree: Any, prefix: str = "") -> list[str]:
    """The keys that an overlay sets, as its header writes them: a class with its arguments is one key."""
    if not isinstance(tree, dict) or "class_path" in tree:
        return [prefix[1:].removesuffix("+")]
    parts = ((value, prefix if name == "init_args" else f"{prefix}.{name}") for name, value in tree.items())
    return [key for value, path in parts for key in keys_set(value, path)]


def resolved(config: Any) -> dict[str, Any]:
    """All values by key, without the `init_args` in between."""
    values = vars(config.fit.as_flat())
    return {key.replace(".init_args", ""): value for key, value in values.items() if key != "config"}


def belongs(key: str, to: str) -> bool:
    return key == to or key.startswith(f"{to}.")


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {key for key in before.keys() | after.keys() if before.get(key, "absent") != after.get(key, "absent")}


def test_every_control_is_known() -> None:
    assert {path.stem for path in (ROOT / "configs/controls").glob("*")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_header_lists_the_keys_that_are_set(name: str) -> None:
    text = control_file(name).read_text("utf-8")
    assert sorted(listed(control_file(name))) == sorted(keys_set(yaml.safe_load(text)))
    assert f"#   python run.py --config configs/demo.yaml --config configs/controls/{name}.yaml\n" in text


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_control_changes_what_its_header_lists_and_nothing_else(name: str, parse: Any) -> None:
    """Over a base with a threshold where every listed key has another value, and over one with a hard fraction."""
    control, keys = control_file(name), listed(control_file(name))
    overlay = yaml.safe_load(control.read_text("utf-8"))["data"]["init_args"]["routing"]
    contrary = "contrary_random" if overlay.get("assignment") != "random" else "contrary_margin"
    results = []
    for bases in (("demo", contrary), ("alpaca_eval",)):
        before, after = resolved(parse(*bases)), resolved(parse(*bases, f"controls/{name}"))
        found = changed(before, after)
        assert all(any(belongs(key, to) for to in keys) for key in found), found
        if contrary in bases:
            assert all(any(belongs(key, to) for key in found) for to in keys), found
        callbacks = after.pop("trainer.callbacks") or []  # added to those of the base
        assert callbacks[: len(before["trainer.callbacks"] or [])] == (before["trainer.callbacks"] or [])
        after["added"] = callbacks[len(before["trainer.callbacks"] or []) :]
        results.append({key: after[key] for key in after if any(belongs(key, to) for to in [*keys, "added"])})
    assert results[0] == results[1], "a control means the same over any base"


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_control_trains(name: str, parse: Any, cli: Any, tiny_model: str, tmp_path: Path) -> None:  # noqa: F811
    config = parse("alpaca_eval", f"controls/{name}").clone()
    model, data = config.fit.model.init_args, config.fit.data.init_args
    model.base, model.quantization, model.lora.rank = tiny_model, "none", 4
    data.source, data.tokenizer = write_pairs(tmp_path / "pairs.jsonl", make_pairs(24)), tiny_model
    data.validation, data.batch_size, data.max_length, data.max_prompt_length = 0.0, 4, 64, 32
    if name == "selective_dpo":
        data.margins_file = None  # a margins file belongs to its model and data: the column of the rows stands in
    torch.manual_seed(0)
    built = cli.parser.instantiate_classes(config).fit
    seen: list[tuple[int, int]] = []
    route_losses = built.model.route_losses

    def watched(batch: Any, *log_probs: Any) -> Any:
        found = route_losses(batch, *log_probs)
        assert torch.isfinite(found[0]).all()
        assert (found[0] > 0).all() or not batch.count  # each pair that is trained has a loss
        seen.append((batch.count, len(batch.sft) * (batch.count > 0)))  # 21 pairs leave a step of one, and filler
        return found

    built.model.route_losses = watched
    text = control_file(name).read_text("utf-8")
    refresh = tuple(built.trainer.callbacks or ())
    assert [type(callback) for callback in refresh] == [RefreshReference] * ("callbacks" in text)
    trainer = make_trainer(tmp_path / "run", first=refresh, accumulate_grad_batches=2)
    trainer.fit(built.model, built.data)
    trained, by_sft = (sum(counts) for counts in zip(*seen, strict=True))
    assert (trained, by_sft, len(built.data.epoch.stage_starts)) == EXPECTED[name]
    assert max(v.abs().max() for key, v in adapter_weights(built.model).items() if "lora_B" in key) > 0
