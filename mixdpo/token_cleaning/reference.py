"""Fit a frozen adapter to samples: the reference that token cleaning needs where none is given."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from mixdpo.batches.rows import sample_rows
from mixdpo.model.adapters import Role, role
from mixdpo.model.forward import row_log_probs, without_cast_cache

if TYPE_CHECKING:
    from peft import PeftModel


def fit_adapter(
    model: "PeftModel",
    name: Role,
    samples: Sequence[Mapping[str, Any]],
    *,
    learning_rate: float,
    batch_size: int,
) -> None:
    """One pass of SFT on every response token of the samples, in their order, with AdamW (no weight decay) at a
    constant rate.

    The loss of a step is the mean over its response tokens; one sample is computed at a time. Only the adapter `name`
    changes, and it requires no gradient afterwards.
    """
    parameters = [parameter for key, parameter in model.named_parameters() if f".{name}." in key]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with role(model, name), without_cast_cache(device):  # at backward as well
            for start in tqdm(range(0, len(samples), batch_size), desc=f"fitting {name}", unit="step"):
                step = [sample_rows([sample]).to(device) for sample in samples[start : start + batch_size]]
                tokens = sum(len(rows.target) for rows in step)
                for rows in step:
                    # a sum: in half precision the parts of a mean over thousands of tokens would be too small to hold
                    (-row_log_probs(model, rows).sum()).backward()
                torch._foreach_div_([p.grad for p in parameters if p.grad is not None], tokens)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
