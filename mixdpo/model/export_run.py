"""A run's policy as a folder that other tools load: the adapter, or a plain model that it is merged into."""

import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mixdpo.batches.rows import Piece, TokenRows, token_rows
from mixdpo.data.chat_template import PLAIN, encode_responses, shared_length
from mixdpo.data.sources import open_source
from mixdpo.errors import InputError
from mixdpo.model.adapters import role
from mixdpo.model.export import merged_copy
from mixdpo.model.forward import output_head, predicting_states
from mixdpo.model.fused_head import exact_token_log_probs
from mixdpo.model.loading import Quantization
from mixdpo.model.trained import ADAPTER_FILES, Device, Trained, read_trained
from mixdpo.storage.files import written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ExportDtype = Literal["float32", "bfloat16", "float16"]


RESPONSES = 8  # built-in ones, that a merged model is compared on: about 180 tokens


LIMITS = {"float32": (1e-4, 1e-3), "float16": (0.02, 0.2), "bfloat16": (0.15, 2.0)}
"""Of each dtype: the mean and the largest difference in nats per token that its rounding may explain. Some four times
what SmolLM2-135M showed or more, on a CPU in nf4 trained in fp32: 4e-6 and 2e-5, 0.005 and 0.04, 0.04 and 0.43."""


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

    Without --merge: the PEFT adapter. With it: a plain model in safetensors that needs neither PEFT nor bitsandbytes.
    The base is loaded as it was trained on and dequantised, the adapter is added in fp32, the sum rounded to `dtype`.
    The folder is then loaded by transformers, and its log-probabilities of built-in responses are compared with those
    of the policy as it was trained; a folder that differs by more than rounding is not kept.

    Memory for --merge, in bytes per parameter: that of the base as trained (nf4: about 0.6), and 4 for float32 or 2
    for the others; on disk 4 or 2. For 8B in bfloat16 about 22 GB.

    Args:
        run: folder of a run, or a PEFT folder; that names its base in adapter_config.json.
        out: folder to write: a new one, or an empty one.
        merge: write a plain model instead of the adapter.
        dtype: of the plain model's weights.
        device: where to merge and to compare; 8B in nf4 to bfloat16 takes about 22 GB there.
        quantization: how the base under a PEFT folder was held while that was trained, with bfloat16 for what is not
            quantised. A run's folder says it.
        chat_template: what a PEFT folder was trained with, if not with the tokenizer's own: a file with a Jinja
            template, or `plain`. A run's folder says it.

    Raises:
        InputError: `run` holds no adapter, `out` holds something, an option is missing, or the merged model differs.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: give another one")
    trained = read_trained(run, quantization, chat_template=chat_template)
    with written_whole(target) as unfinished:
        unfinished.mkdir()
        if merge:
            said = _write_merged(trained, unfinished, dtype, device)
        else:
            said = f"the adapter, for the base {trained.base}"
            for name in ADAPTER_FILES:
                shutil.copyfile(trained.adapter / name, unfinished / name)
        tokenizer, template = trained.tokenizer()
        tokenizer.save_pretrained(unfinished)
    print(f"wrote {out}: {said}")
    if template == PLAIN:
        print("no chat template is written: it was trained on plain text (chat_template plain)")


def _write_merged(trained: Trained, folder: Path, dtype: ExportDtype, device: Device) -> str:
    """Write the plain model and compare it; returns what is to be said of it."""
    rows = _responses(*trained.tokenizer())
    policy = trained.load(device)
    expected = _log_probs(policy, rows)
    with role(policy, "base"):
        base = _log_probs(policy, rows)
    merged_copy(policy, dtype=getattr(torch, dtype)).save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors keeps them from everyone else
    del policy  # the comparison takes no more memory than the merge
    found = _log_probs(_loaded(folder, dtype, device), rows)
    said = compared(expected, base, found, trained.loading["dtype"], dtype)
    return f"{trained.base} with the adapter, as a plain model in {dtype}\n{said}"


def compared(expected: Tensor, base: Tensor, found: Tensor, trained_in: str, dtype: str) -> str:
    """What the log-probabilities (M,) of a merged model say of it, beside those of the policy and of the bare base.

    Rounding has no direction and a wrong merge has that of the adapter, so that the share of the adapter's effect that
    is kept (the slope of one on the other) shows a wrong scale that a limit as wide as bfloat16's would not.

    Raises:
        InputError: they differ by more than rounding to the coarser dtype, or the share is not 1 within its noise.
    """
    difference, effect = (found - expected).double(), (expected - base).double()
    mean, largest, moved = (
        float(value) for value in (difference.abs().mean(), difference.abs().max(), effect.abs().mean())
    )
    limits = max(LIMITS.get(name, LIMITS["float32"]) for name in (trained_in, dtype))
    said = (
        f"difference to the policy as trained, in nats per token over {len(found)} tokens: {mean:.2g} in the mean "
        f"(limit {limits[0]:g}), {largest:.2g} at most (limit {limits[1]:g}); the adapter itself moves them by "
        f"{moved:.2g}"
    )
    wrong = not (mean <= limits[0] and largest <= limits[1])  # NaN is wrong too
    if moved and not wrong:
        kept = 1 + float(difference @ effect / effect.square().sum())
        noise = float(difference.norm() / effect.norm()) / len(found) ** 0.5
        said += f", {kept:.3f} of which is kept"
        wrong = abs(kept - 1) > 0.1 + 4 * noise  # 0.99 to 1.04 were seen in bfloat16
    if wrong:
        raise InputError(f"the merged model is not the policy: {said}. Try --dtype float32; nothing is kept")
    if mean > moved / 2:
        said += "\nwarning: rounding is about as large as what the adapter changes; --dtype float32 has less of it"
    return said


def _responses(tokenizer: "PreTrainedTokenizerBase", template: str) -> TokenRows:
    """Built-in prompts with their chosen responses, whose tokens are the targets."""
    documents: list[list[Piece]] = []
    for _, row in islice(open_source("constraints", "train").rows, RESPONSES):
        prompt = [{"role": "user", "content": row["prompt"]}]
        prompt_ids, whole = encode_responses(tokenizer, template, prompt, row["chosen"])
        documents.append([Piece(whole, len(documents), (shared_length(prompt_ids, whole), len(whole)))])
    return token_rows(documents, len(documents))


@torch.no_grad()
def _log_probs(model: Any, rows: TokenRows) -> Tensor:
    """(M,) of the targets, on the CPU; the head in fp32, whose rounding is none of the weights' (0.06 nats in bf16)."""
    causal_lm = getattr(model, "get_base_model", lambda: model)()
    rows = rows.to(next(causal_lm.parameters()).device)
    return exact_token_log_probs(predicting_states(model, rows), output_head(causal_lm), rows.target).cpu()


def _loaded(folder: Path, dtype: ExportDtype, device: Device) -> Any:
    """As anyone would load it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False).to(
        device
    )
    return model.requires_grad_(False).eval()
