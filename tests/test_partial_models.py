"""Models of which quantisation or text reaches a part only: mixtures of experts, and those with a vision tower."""

import pytest
import torch
from conftest import adapter_weights, fit, make_pairs, write_pairs, write_tiny

from mixdpo.model.adapters import Lora, add_adapters, towers
from mixdpo.model.loading import load_base

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT, of mixtures


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return str(write_tiny("qwen3_moe", tmp_path_factory.mktemp("mixture"), **shape))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Gemma 3 with a vision tower of one layer, and a language model of two."""
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    text = shape | {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    text |= {"layer_types": ["full_attention"] * 2, "eos_token_id": 3, "pad_token_id": 1, "bos_token_id": None}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    folder = tmp_path_factory.mktemp("seeing")
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_experts_that_stay_wide_are_warned_about(mixture, tiny_model, capsys, quantization):
    """By a warning; docs/troubleshooting.md has the name of this test."""
    load_base(mixture, quantization=quantization, dtype="float32")
    assert "warning: Qwen3MoeExperts of " in capsys.readouterr().out
    load_base(mixture, quantization="none", dtype="float32")
    load_base(tiny_model, quantization=quantization, dtype="float32")
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_every_adapter_of_a_model_with_a_tower_learns(seeing, tiny_model, tmp_path, capsys, targets):
    source, data = write_pairs(tmp_path / "pairs.jsonl", make_pairs(8)), {"tokenizer": tiny_model}
    module = fit(seeing, source, tmp_path / "run", data=data, lora=Lora(rank=2, targets=targets))
    learnt = {name: weight for name, weight in adapter_weights(module).items() if "lora_B" in name}
    assert learnt and all(weight.any() for weight in learnt.values())
    assert all(".language_model." in name for name in learnt)
    told = "9 linear layers get no adapter, as no text reaches them (first: model.vision_tower."
    assert told in capsys.readouterr().out


def test_an_adapter_of_such_a_model_is_continued(seeing, tiny_model, tmp_path):
    source, data = write_pairs(tmp_path / "pairs.jsonl", make_pairs(8)), {"tokenizer": tiny_model}
    fit(seeing, source, tmp_path / "run", data=data)
    (folder,) = tmp_path.rglob("adapter_config.json")
    again = fit(seeing, source, tmp_path / "again", data=data, adapter=str(folder.parent))
    assert all(".language_model." in name for name in adapter_weights(again))


def test_a_model_without_towers_has_the_adapters_of_before(tiny_model):
    base = load_base(tiny_model, quantization="none", dtype="float32")
    assert towers(base) == []
    assert add_adapters(base, Lora(rank=2)).peft_config["policy"].exclude_modules is None
