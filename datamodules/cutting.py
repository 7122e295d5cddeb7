"""Steps cut by tokens: as few micro-batches as keep each of them within a limit."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from mixdpo.batches.steps import heaviest, micro_batches_needed
from mixdpo.errors import InputError


def cut_by_tokens(data: Any) -> None:
    """Decide how many micro-batches all steps of a planned data module have, if it has a limit.

    Raises:
        InputError: the trainer cuts the steps too, or a row alone has too many tokens.
    """
    trainer, option, (tokens, _) = data.trainer, data.micro_batch_tokens, data.row_sizes
    if option is None:
        return
    longest = max((row for step in data.all_steps() for row in step), key=tokens.__getitem__)
    needed = tokens[longest]
    if (most := trainer.lightning_module.micro_batch_limit(needed) if option == "auto" else option) is None:
        return  # on a CPU the trainer's number counts
    if (now := trainer.accumulate_grad_batches) not in (1, data.cut.get("a_step")):
        raise InputError(f"set trainer.accumulate_grad_batches (now {now}) to 1, or data.micro_batch_tokens to null")
    if needed > most:
        fault = f"{data.tables['train'][longest]['place']} of {data.source} has {needed} tokens, a micro-batch {most}"
        remedy = f"set data.micro_batch_tokens to {needed} or more"
        if option == "auto":
            remedy = "take bitsandbytes.optim.PagedAdamW8bit, a lower model.lora.rank or a smaller base"
        raise InputError(f"{fault} at most: {remedy}, or lower data.max_length")
    cut_into(data, micro_batches_needed(data.all_steps(), tokens, most=most, world=trainer.world_size), int(most))


def cut_into(data: Any, number: int, limit: int | None) -> None:
    """Cut every step into this number of micro-batches a device, and say so. Sets `data.cut`: the number, the limit in
    tokens, the tokens of the heaviest micro-batch, and which share of the micro-batches is filler."""
    steps, together, data.trainer.accumulate_grad_batches = data.all_steps(), number * data.trainer.world_size, number
    most, filler = heaviest(steps, data.row_sizes[0], together)[0], sum(max(0, together - len(step)) for step in steps)
    data.cut = {"a_step": number, "limit": limit, "heaviest": most, "filler": filler / (together * len(steps))}
    said = f"each step is cut into {number} micro-batches of at most {limit or most} tokens (the heaviest has {most})"
    rank_zero_info(f"{said}; {data.cut['filler']:.1%} of them are empty and filled up")
