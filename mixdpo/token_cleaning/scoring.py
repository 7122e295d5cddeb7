"""Losses of every response token under one role, kept for later runs; and the fit of an adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from mixdpo.batches.rows import sample_rows
from mixdpo.batches.token_pool import TokenPool, data_weights
from mixdpo.model.adapters import Role, role
from mixdpo.model.forward import evaluating, row_log_probs, without_cast_cache
from mixdpo.storage.store import Store, open_cache

MOST_PADDING = 0.15
"""Share of a row: a batch ends where the next sample would be padded by more."""

Losses = tuple[np.ndarray, Store | None]
"""(M,) float32, NaN where a loss is not known yet, and the cache that keeps them, if any."""


def open_losses(pool: TokenPool, identity: Mapping[str, str] | None = None) -> Losses:
    """The losses known so far, and with an identity the cache that keeps them.

    The identity names all that the losses depend on: data, tokenizer, template, lengths, model, adapter, dtype. The
    cache is in `$MIXDPO_CACHE/token_losses` (default ~/.cache/mixdpo), by the sample's place in the pool.
    """
    losses = np.full(len(pool), np.nan, dtype=np.float32)
    store = None if identity is None else open_cache("token_losses", identity, "token losses")
    for i, values in (store.get() if store else {}).items():
        losses[pool.of_sample(i)] = np.frombuffer(values, dtype=np.float32)
    return losses, store


def add_losses(
    known: Losses, model: PeftModel, name: Role, pool: TokenPool, samples: np.ndarray, batch_tokens: int = 4096
) -> None:
    """Compute the losses that are still NaN for these samples: −log p of each response token under the role, in nats.

    Samples are batched by length, so that nearly nothing is padding. The head computes in fp32, for response positions.
    A run that dies leaves in the store what it has computed, except samples with an infinite loss.

    Args:
        batch_tokens: most positions in a batch, padding included (a longer sample is a batch of its own).
    """
    (losses, store), device = known, next(model.parameters()).device
    samples = [int(i) for i in samples]
    missing = {i for i in samples if np.isnan(losses[pool.of_sample(i)]).any()}
    # batches of all samples, of which complete ones are skipped: an interrupted pass goes on with the same batches, so
    # with the same rounding
    lengths = {i: len(pool.samples[i]["input_ids"]) for i in samples} if missing else {}
    batches = [batch for batch in _by_length(lengths, batch_tokens) if missing.intersection(batch)]
    with evaluating(model), torch.no_grad(), role(model, name), without_cast_cache(device):
        for batch in tqdm(batches, desc=f"scoring with {name}", unit="batch", disable=not batches):
            rows = sample_rows([pool.samples[i] for i in batch]).to(device)
            computed = -row_log_probs(model, rows, exact=True).float().cpu().numpy()
            computed[~np.isfinite(computed)] = np.nan
            is_new = np.repeat([i in missing for i in batch], np.diff(pool.offsets)[batch])
            losses[pool.tokens(batch)[is_new]] = computed[is_new]
            if store is not None:
                new = {i: losses[pool.of_sample(i)] for i in missing.intersection(batch)}
                store.add({i: values.tobytes() for i, values in new.items() if np.isfinite(values).all()})


def _by_length(lengths: Mapping[int, int], batch_tokens: int) -> list[list[int]]:
    """Samples sorted by length, cut where the padded batch would exceed the tokens.

    The longest come first: a run without enough memory fails at once.
    """
    batches: list[list[int]] = []
    for i in sorted(lengths, key=lambda i: (-lengths[i], i)):
        width = lengths[batches[-1][0]] if batches else 0
        if not width or (len(batches[-1]) + 1) * width > batch_tokens or lengths[i] < (1 - MOST_PADDING) * width:
            batches.append([])
        batches[-1].append(i)
    return batches


def fit_adapter(
    model: PeftModel, name: Role, samples: Sequence[Mapping[str, Any]], *, learning_rate: float, batch_size: int
) -> None:
    """Fit a frozen adapter: one pass of SFT over the samples in their order, by AdamW (no weight decay, constant rate).

    The loss of a step is the mean over its response tokens, weighted as the data says. One sample is computed at a
    time. Only the adapter `name` changes, and it requires no gradient afterwards.
    """
    parameters = nn.ParameterList(parameter for key, parameter in model.named_parameters() if f".{name}." in key)
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    parameters.requires_grad_(True)
    with role(model, name), without_cast_cache(device):  # at backward as well
        for start in tqdm(range(0, len(samples), batch_size), desc=f"fitting {name}", unit="step"):
            step = samples[start : start + batch_size]
            for sample in step:
                # a sum: in half precision the parts of a mean over thousands of tokens would be too small to hold
                log_probs = row_log_probs(model, sample_rows([sample]).to(device))
                (-(log_probs * torch.from_numpy(data_weights([sample])).to(device)).sum()).backward()
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], float(data_weights(step).sum()))
            optimizer.step()
            optimizer.zero_grad()
    parameters.requires_grad_(False)
