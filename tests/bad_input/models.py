"""Base models, their tokenizers, and adapters."""

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from conftest import write_tiny
from safetensors.torch import load_file, save_file
from test_margins_file import predict

from bad_input.case import Case, Place, cases
from mixdpo.model.adapters import Lora, add_adapters, add_reference, check_alike
from mixdpo.model.loading import load_tokenizer

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


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def tokenizer(place: Place, folder: Path) -> Any:
    return load_tokenizer(str(folder))


def trained(place: Place, folder: Path) -> Any:
    return place.fit(model=str(folder))


def windowed(do: Callable[[Place, Path], Any]) -> Any:
    """Where documents are packed; nothing may be computed before the refusal."""
    return copied(edit_json("config.json", sliding_window=9), do)


def signalled(place: Place, folder: Path) -> Any:
    return predict(str(folder), place.shared.pairs, place.folder)


def warned(place: Place) -> str:
    with redirect_stdout(StringIO()) as out:
        copied(edit_json("config.json", max_position_embeddings=12), trained)(place)
    return out.getvalue()


def unusual(name: str) -> Any:
    return lambda place: place.shared.base(write_tiny(name, place.folder / name))


WEIGHTS, REMEDY = "model.safetensors", "Give a hub id you can reach"
UNLOADED = ("cannot load", REMEDY)


def shrink(folder: Path) -> None:
    edit_json("config.json", vocab_size=20)(folder)
    known = lambda weights: {name: w[:20].clone() for name, w in weights.items() if w.shape[0] == 26}  # noqa: E731
    rewrite(WEIGHTS, lambda weights: weights.update(known(weights)))(folder)


MODELS = [
    *cases(
        "model.base",
        ("no such folder", lambda place: place.shared.base("/no/model"), ("/no/model", REMEDY)),
        ("a hub id that cannot be reached", lambda place: place.shared.base("org/none"), ("org/none", REMEDY)),
        ("a config cut off", copied(cut("config.json", 40)), ("model'", REMEDY)),
        ("no weights", copied(remove(WEIGHTS)), (WEIGHTS, REMEDY)),
        ("weights cut off", copied(cut(WEIGHTS)), UNLOADED),
        ("more layers than weights", copied(edit_json("config.json", num_hidden_layers=3)), "lacks 9 … give a whole"),
        ("attention that packs nothing", unusual("bloom"), "does not know model.attention … model.attention eager"),
    ),
    *cases(
        "data.max_length",
        ("above the sliding window", windowed(trained), "tokens, and … sliding window of 9: set data.max_length 9"),
        ("above it in a signal", windowed(signalled), "tokens, and … sliding window of 9: set data.max_length 9"),
    ),
    Case("data.max_length", "above the rotary positions", warned, ("warning: ", "the 12 positions that"), True),
    *cases(
        "tokenizer",
        ("no such folder", lambda place: load_tokenizer("/no/model"), ("tokenizer '/no/model'", REMEDY)),
        ("none in the folder", copied(remove("tokenizer.json"), tokenizer), UNLOADED),
        ("tokens that the model does not know", copied(shrink, trained), "knows token ids below … give its own"),
    ),
]


# Adapters: a copy of one for the tiny model with a fault.
def adapted(fault: Callable[[Path], Any]) -> Any:
    def do(place: Place) -> Any:
        copy = place.folder / "adapter"
        shutil.copytree(place.shared.adapter, copy)
        fault(copy)
        return add_adapters(place.shared.base(), Lora(), str(copy))

    return do


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
        ("no such folder", lambda place: place.fit(adapter="/no/adapter"), f"adapter '/no/adapter' … {REMEDY}"),
        ("a config cut off", adapted(cut(CONFIG, 30)), UNLOADED),
        ("weights cut off", adapted(cut(TENSORS)), UNLOADED),
        ("a matrix missing", adapted(rewrite(TENSORS, lost)), "does not fit model.base … Give the base"),
        ("weights of NaN", adapted(rewrite(TENSORS, poisoned)), "holds NaN or infinite weights … give another adapter"),
        ("a bias", adapted(edit_json(CONFIG, bias="all")), "no plain LoRA … give a plain one"),
    ),
    Case("model.cleaning.reference", "of another rank", differing, ("differ in rank", "make model.lora agree")),
    *cases(
        "model.lora",
        ("targets that are not there", targeted(["query"]), "lora.targets ['query'] … do not fit this model"),
        ("the head", targeted(["lm_head"]), "the output head is a … leave it out of lora.targets"),
    ),
]

CASES = [*MODELS, *ADAPTERS]
