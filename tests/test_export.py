"""A run as a plain model or an adapter that other tools load, and what keeps a wrong one from being kept."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import TEMPLATE, make_pairs, write_pairs
from safetensors import safe_open
from test_cli import in_process, options
from test_scoring import plain_model

import mixdpo.model.export
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, adapter_layers, add_adapters
from mixdpo.model.export import compared, export, merged_copy, read_trained, save_adapter
from mixdpo.model.loading import load_base
from mixdpo.pages.model_card import describe

IDS = torch.tensor([[2, 4, 7, 9, 12, 3, 2, 5, 20, 15, 3]])


def write_run(folder: Path, base: str, scale: float = 0.1, chat_template: str | None = None, **loading: Any) -> Path:
    """A run's folder as training leaves it, but for what export does not read; the adapter is random."""
    loading = {"quantization": "none", "dtype": "float32", "attention": "sdpa", **loading}
    torch.manual_seed(0)
    model = add_adapters(load_base(base, **loading), Lora(rank=4, alpha=8))
    for layer in adapter_layers(model):
        torch.nn.init.normal_(layer.lora_B["policy"].weight, std=scale)
    save_adapter(model, folder / "adapter")
    parts = {"model": {"base": base, **loading}, "data": {"chat_template": chat_template}}
    config = {name: {"init_args": options} for name, options in parts.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def handmade(tiny_model: str, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tiny_model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def through_peft(base: str, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(plain_model(base), str(adapter)))


def through_transformers(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def dtypes_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118, it is no dict


def test_a_run_from_the_command_line_to_a_plain_model(tiny_model, tmp_path, capsys):
    source = write_pairs(tmp_path / "rows.jsonl", make_pairs(16))
    arguments = ["--config", "configs/demo.yaml", *options(tiny_model, source, tmp_path / "runs")]
    assert in_process(*arguments, "--model.optimizer.lr", "0.02") == 0
    run, out = tmp_path / "runs" / "tiny", tmp_path / "out"
    export(str(run), str(out), merge=True, dtype="float32")
    found, wanted = through_transformers(out), through_peft(tiny_model, run / "adapter")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (wanted - logits(load_base(tiny_model, quantization="none"))).abs().max() > 0.1
    said = capsys.readouterr().out
    assert "nats per token" in said and "1.000 of which is kept" in said and f"upload USER/NAME {out}\n" in said
    data = json.loads((run / "route.json").read_text())["data"]
    shown = ["# base_model: fill in", "license: unknown", "4 of 14 pairs (28.6 %) are hard: their margin is below "]
    shown += [f"`rows.jsonl`, split `train`; hash of the rows read for training: `{data}`", "(beta=0.1", "lr 0.02"]
    for folder, library in ((run / "adapter", "peft"), (out, "transformers")):
        card = (folder / "README.md").read_text("utf-8")
        assert str(tmp_path) not in card and all(text in card for text in (*shown, f"library_name: {library}"))
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_dtype_of_a_quantised_run(dtype: Any, tiny_model: str, tmp_path: Path) -> None:
    """Merged into what the 4-bit weights stand for, not into what they were rounded from."""
    run, out = write_run(tmp_path / "run", tiny_model, quantization="nf4"), tmp_path / "out"
    out.mkdir()  # an empty folder is taken
    export(str(run), str(out), merge=True, dtype=dtype)
    assert "quantization_config" not in (out / "config.json").read_text()
    assert dtypes_in(out) == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    assert (out / "generation_config.json").is_file()
    policy = read_trained(str(run)).load()
    tolerance = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 0.02}[dtype]
    torch.testing.assert_close(through_transformers(out), logits(policy), rtol=0, atol=tolerance)
    assert (through_peft(tiny_model, run / "adapter") - logits(policy)).abs().max() > 2 * tolerance


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_merge_with_a_wrong_scale_is_not_kept(factor, handmade, tmp_path, monkeypatch):
    def scaled_wrongly(model: Any, **options: Any) -> Any:
        for layer in adapter_layers(model):
            layer.scaling["policy"] *= factor
        return merged_copy(model, **options)

    monkeypatch.setattr(mixdpo.model.export, "merged_copy", scaled_wrongly)
    with pytest.raises(InputError, match=r"is not the policy.*nats per token"):
        export(str(handmade), str(tmp_path / "new" / "out"), merge=True)
    assert not list((tmp_path / "new").iterdir())


def test_the_comparison_by_hand() -> None:
    base = torch.zeros(400)
    policy = base + torch.tensor([1.0, -1.0] * 200)
    noise = 0.04 * torch.tensor([1.0, 1.0, -1.0, -1.0] * 100)  # at a right angle to the adapter's effect
    said = compared(policy, base, policy + noise, "float32", "bfloat16")
    assert "mean 0.04" in said and "moves 400 tokens by 1, 1.000 of which is kept" in said
    for wrong in (policy + 10 * noise, policy + 0.003 * policy, policy * float("nan")):
        with pytest.raises(InputError, match="is not the policy"):
            compared(policy, base, wrong, "float32", "float32")
    small = 0.02 * policy  # a wrong scale hides below the limits of bfloat16, but has a direction
    with pytest.raises(InputError, match=r"0\.500 of which is kept"):
        compared(small, base, small / 2, "float32", "bfloat16")
    never_trained = compared(base, base, base, "float32", "float32")
    assert "moves 400 tokens by 0" in never_trained


@pytest.mark.parametrize("kind", ["own", "given", "plain"])
def test_the_adapter_with_the_template_of_the_training(kind, tiny_model, tmp_path, capsys):
    from transformers import AutoTokenizer

    given = TEMPLATE.replace("assistant ", "assistant tea ")
    template = {"own": None, "given": given, "plain": "plain"}[kind]
    run, out = write_run(tmp_path / "run", tiny_model, chat_template=template), tmp_path / "out"
    export(str(run), str(out))
    assert torch.equal(through_peft(tiny_model, out), through_peft(tiny_model, run / "adapter"))
    wanted = {"own": TEMPLATE, "given": given, "plain": None}[kind]
    assert AutoTokenizer.from_pretrained(out).chat_template == wanted
    assert ("no chat template" in capsys.readouterr().out) == (kind == "plain")


def test_a_card_takes_what_there_is(tmp_path: Path) -> None:
    model = {"base": "owner/model", "adapter": "/home/me/x/start", "cleaning": {"class_path": "a.B"}}
    config = {"name": "a`|\n# b", "model": {"init_args": model}, "data": {"init_args": {"source": "owner/rows"}}}
    row = {"n": 3, "before": 0.5, "after": None, "difference": 0.5, "low": 0.25, "high": 0.75}
    results = {"heldout_prompts": {"all 😀": row}, "summary": {"peak memory, GB": "1.5", "val/all/c": "2"}}
    for name, content in (("config.yaml", config), ("results.json", results)):  # JSON is YAML
        (tmp_path / name).write_text(json.dumps(content))
    describe(tmp_path, SimpleNamespace(save_pretrained=lambda _: None), tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["owner/rows"] and 'base_model: "owner/model"' in card
    assert "| `all 😀` | 3 | 0.500 | not recorded | 0.500 [0.250, 0.750] |" in card and "| `val/all/c` | `2` |" in card
    assert "\n# `a'/ # b`\n" in card and "memory" not in card and "| adapter | `start` |\n| cleaning | `B()` |" in card


def test_a_bare_adapter_needs_to_be_told_the_quantization(handmade: Path, tiny_model: str) -> None:
    (handmade / "config.yaml").unlink()
    with pytest.raises(InputError, match="--quantization nf4, int8 or none"):
        read_trained(str(handmade / "adapter"))
    assert read_trained(str(handmade / "adapter"), "none").loading["quantization"] == "none"


def test_what_is_refused(handmade: Path, tiny_model: str, tmp_path: Path) -> None:
    def refused(match: str, run: Path = handmade, out: str = "out") -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=match):
            export(str(run), str(tmp_path / out), merge=True)
        assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("exists and is not an empty folder: give another", out="full")
    refused("exists and is not an empty folder: give another", out="full/file")
    refused("config.yaml", run=tmp_path / "nowhere")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(handmade, unfinished)
    (unfinished / "adapter" / "adapter_model.safetensors").unlink()
    refused("has not ended: continue it with --ckpt_path", unfinished)
    for content in ("model: 3\n", "model: [", "model: {init_args: {base: x}}\n"):
        (unfinished / "config.yaml").write_text(content)
        refused("is no config of a run", unfinished)
