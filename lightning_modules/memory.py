"""What a module's training takes of its device, by the estimate, before the model is loaded."""

from typing import Any

from lightning_modules.callbacks.clean_tokens import RefreshReference
from mixdpo.errors import InputError, located
from mixdpo.model.adapters import Lora
from mixdpo.model.estimate import MemoryModel
from mixdpo.model.loading import load_config


def memory_model(module: Any, device: str) -> MemoryModel:
    """The memory of the training on `device` ("cuda" or "cpu"), from the options of module, data and trainer, and from
    the configurations of base and adapter."""
    data, cleaning = module.trainer.datamodule, module.cleaning
    roles = {"cleaning_reference", "previous"}.intersection(cleaning.roles if cleaning else ())
    stages = getattr(module, "stage_start", "") == "fresh_adapter" and (data.slices.only or range(data.slices.count))
    moves = any(isinstance(c, RefreshReference) and c.role == "reference" for c in module.trainer.callbacks)
    return MemoryModel(
        load_config(module.base),
        Lora.of(module.adapter) if module.adapter else module.lora,
        module.optimizer,
        module.loading | {"fused_layers": module.fused_layers},
        device,
        str(module.trainer.precision),
        with_reference=getattr(module, "needs_reference", False),
        frozen_adapters=len(roles) + len(stages or [0]) - 1 + (module.adapter is not None or moves),
        **({"length": data.encoding["max_length"]} if module.loading["attention"] in ("sdpa", "eager") else {}),
    )


def micro_batch_limit(module: Any, longest: int) -> int | None:
    """Most tokens of a micro-batch on the run's GPU, before the model is loaded; None on a CPU. 0: none fits.

    `longest`: tokens of the longest row."""
    if (device := module.trainer.strategy.root_device).type != "cuda":
        return None
    with located("data.micro_batch_tokens auto", ". Or give data.micro_batch_tokens a number of tokens"):
        memory = memory_model(module, "cuda")
        limit = memory.micro_batch_limit(memory.memory_of(device), module.activation_checkpointing, longest)
    return module.trainer.strategy.broadcast(limit)  # cards may differ by some MB, the number of micro-batches may not


def most_kept(module: Any) -> int:
    """Most tokens of a micro-batch that fits into the memory of the run's device without recomputation."""
    device = module.trainer.strategy.root_device
    try:
        memory = memory_model(module, device.type)
        return memory.most_tokens(memory.memory_of(device), False)
    except InputError as error:  # of an architecture or optimizer that trains all the same
        module.print(f"warning: {error}. The run goes on, and recomputes all activations")
        return 0
