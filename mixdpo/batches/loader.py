"""Micro-batches in their planned order, continued exactly where they were interrupted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mixdpo.batches.steps import MicroBatch


class ResumableLoader:
    """Epochs of micro-batches in their planned order, which continue where an interrupted epoch stopped.

    This class is no DataLoader, because Lightning replays the data of a DataLoader after a mid-epoch resume.
    `consumed` counts the batches handed out, not the batches that workers have prefetched. `replan` makes the plan of a
    later epoch, as long as the first plan. Without `replan` all epochs are the same.
    """

    def __init__(self, plan: Sequence[MicroBatch], collator: Callable[[MicroBatch], Any], *, workers: int = 0) -> None:
        self.plan, self.collator, self.workers = list(plan), collator, workers
        self.replan: Callable[[int], Sequence[MicroBatch]] | None = None
        self.consumed = self._start = 0

    batch_sampler = None  # Lightning asks for one where there is a sampler

    @property
    def sampler(self) -> "ResumableLoader":
        """Where Lightning looks for `set_epoch`, which it calls before each epoch, the first one after a resume too."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if self.replan is not None:
            self.plan = list(self.replan(epoch))

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Any]:
        self.consumed, self._start = self._start % max(len(self.plan), 1), 0  # an iterator left early starts anew
        inner = torch.utils.data.DataLoader(
            self.plan[self.consumed :],  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=None,
            collate_fn=self.collator,
            num_workers=self.workers,
            generator=torch.Generator(),  # a loader without one draws its seed from the global generator
        )
        for batch in inner:
            self.consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.consumed = self._start = state["consumed"]
