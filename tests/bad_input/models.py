"""Base models, their tokenizers, and adapters."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import write_tiny
from safetensors.torch import load_file, save_file

from bad_input.case import Case, Place, cases
from mixdpo.model.adapters import Lora, add_adapters, add_reference, check_alike
from mixdpo.model.loading import load_tokenizer
from mixdpo.model.packaged import model_folder

# Models: a copy of the tiny one with a fault.


def copied(fault: Callable[[Path], Any], load: Callable[[Place, Path], Any] | None = None) -> Any:
    def do(place: Place) -> Any:
        copy = place.folder / "model"
        shutil.copytree(place.model, copy)
        fault(copy)
        return load(place, copy) if load else place.shared.base(copy)

    return do


def edit_json(name: str, **values: Any) -> Callable[[Path], Any]:
    def fault(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return fault


def rewrite(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Change the tensors of a file in place."""

    def fault(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name, metadata={"format": "pt"})

    return fault


def cut(name: str, keep: int = 200) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def rename_layer(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.7.mlp.up_proj.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")


def tokenizer(place: Place, folder: Path) -> Any:
    return load_tokenizer(str(folder))


def trained(place: Place, folder: Path) -> Any:
    return place.fit(model=str(folder))


def unusual(name: str) -> Any:
    return lambda place: place.shared.base(write_tiny(name, place.folder / name))


WEIGHTS, REMEDY = "model.safetensors", "Give a hub id you can reach"
UNLOADED = ("could not be loaded", REMEDY)


def shrink(folder: Path) -> None:
    edit_json("config.json", vocab_size=20)(folder)
    rewrite(
        WEIGHTS, lambda weights: weights.update({k: w[:20].clone() for k, w in weights.items() if w.shape[0] == 26})
    )(folder)


MODELS = [
    *cases(
        "model.base",
        ("no such folder", lambda place: place.shared.base("/no/model"), ("/no/model", REMEDY)),
        ("another package", lambda place: model_folder("package:gpt2"), "package:gpt2 … write that, a hub id"),
        ("a hub id that cannot be reached", lambda place: place.shared.base("org/none"), ("org/none", REMEDY)),
        ("a config cut off", copied(cut("config.json", 40)), ("model'", REMEDY)),
        (
            "a config without a type",
            copied(edit_json("config.json", model_type=..., architectures=...)),
            ("model_type", REMEDY),
        ),
        ("an unknown type", copied(edit_json("config.json", model_type="nothing")), ("nothing", REMEDY)),
        ("no causal model", copied(edit_json("config.json", model_type="t5")), UNLOADED),
        ("no weights", copied(remove(WEIGHTS)), (WEIGHTS, REMEDY)),
        ("weights cut off", copied(cut(WEIGHTS)), UNLOADED),
        ("weights of another format", copied(text(WEIGHTS, "version https://git-lfs")), UNLOADED),
        ("weights of another size", copied(edit_json("config.json", intermediate_size=80)), UNLOADED),
        (
            "more layers than weights",
            copied(edit_json("config.json", num_hidden_layers=3)),
            "lack 9 weights … of another model",
        ),
        (
            "a layer under another name",
            copied(rewrite(WEIGHTS, rename_layer)),
            "lack 1 weights, such as model.layers.1 … damaged",
        ),
        ("attention that packs nothing", unusual("bloom"), "does not know model.attention … model.attention eager"),
    ),
    *cases(
        "tokenizer",
        ("no such folder", lambda place: load_tokenizer("/no/model"), ("tokenizer '/no/model'", REMEDY)),
        ("none in the folder", copied(remove("tokenizer.json"), tokenizer), UNLOADED),
        ("no json", copied(text("tokenizer.json", "{"), tokenizer), UNLOADED),
        ("json of something else", copied(text("tokenizer.json", "{}"), tokenizer), UNLOADED),
        (
            "tokens that the model does not know",
            copied(shrink, trained),
            "token id 2 … knows ids below 20 … give it its own tokenizer",
        ),
    ),
]


# Adapters: a copy of one for the tiny model with a fault.


def adapted(fault: Callable[[Path], Any], base: Any = None) -> Any:
    def do(place: Place) -> Any:
        copy = place.folder / "adapter"
        shutil.copytree(place.shared.adapter, copy)
        fault(copy)
        return add_adapters(place.shared.base(base(place) if base else None), Lora(), str(copy))

    return do


def as_is(folder: Path) -> None:
    """The fault is the base's."""


def resized(**values: Any) -> Callable[[Place], Path]:
    def base(place: Place) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(place.model)
        for name, value in values.items():
            setattr(config, name, value)
        AutoModelForCausalLM.from_config(config).save_pretrained(place.folder / "base")
        return place.folder / "base"

    return base


def lost(weights: dict[str, torch.Tensor]) -> None:
    weights.pop(sorted(weights)[0])


def poisoned(weights: dict[str, torch.Tensor]) -> None:
    weights[sorted(weights)[0]].fill_(float("nan"))


def differing(place: Place) -> Any:
    model = add_adapters(place.shared.base(), Lora(rank=4))
    add_reference(model, "cleaning_reference", str(place.shared.adapter))
    return check_alike(model, "policy", "cleaning_reference")


def targeted(targets: Any) -> Any:
    return lambda place: place.fit(lora=Lora(targets=targets))


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS = [
    *cases(
        "model.adapter",
        (
            "no such folder",
            lambda place: add_adapters(place.shared.base(), Lora(), "/no/adapter"),
            ("adapter '/no/adapter'", REMEDY),
        ),
        (
            "an empty folder",
            adapted(lambda folder: (shutil.rmtree(folder), folder.mkdir())),
            "has no adapter_model.safetensors … PEFT folder or hub id",
        ),
        ("a config cut off", adapted(cut(CONFIG, 30)), UNLOADED),
        ("no weights", adapted(remove(TENSORS)), (f"has no {TENSORS}", "save it anew with PEFT's")),
        ("weights cut off", adapted(cut(TENSORS)), UNLOADED),
        (
            "a matrix missing",
            adapted(rewrite(TENSORS, lost)),
            "1 weights are missing and 0 are not … Give the base it was trained on",
        ),
        ("weights of NaN", adapted(rewrite(TENSORS, poisoned)), "holds weights that are no numbers … give another one"),
        ("another rank than its config", adapted(edit_json(CONFIG, r=3)), UNLOADED),
        (
            "other modules than its config",
            adapted(edit_json(CONFIG, target_modules=["q_proj"])),
            "are not expected … another adapter",
        ),
        ("modules that are not there", adapted(edit_json(CONFIG, target_modules=["query"])), UNLOADED),
        ("of a wider base", adapted(as_is, resized(hidden_size=32)), UNLOADED),
        (
            "of a base with more layers",
            adapted(as_is, resized(num_hidden_layers=1)),
            "14 are not expected … Give the base",
        ),
        ("a bias", adapted(edit_json(CONFIG, bias="all")), "no plain LoRA … only plain LoRA can be used"),
        ("another method", adapted(edit_json(CONFIG, peft_type="IA3")), "adapter'"),
    ),
    Case(
        "model.cleaning.reference",
        "of another rank",
        differing,
        ("differ in 14 layers", "needs the shape of the policy"),
    ),
    *cases(
        "model.lora",
        ("targets that are not there", targeted(["query"]), "lora.targets ['query'] … do not fit this model"),
        ("no targets", targeted([]), "lora.targets [] … do not fit this model"),
        ("the head", targeted(["lm_head"]), "the output head is a … lora.targets all-linear does"),
    ),
]

CASES = [*MODELS, *ADAPTERS]
