"""Losses with batch statistics: two processes with a part of the pairs each compute what one computes with all."""

from pathlib import Path
from typing import Any

import torch
from torch.testing import assert_close

from mixdpo.losses import BetaDPO, KTOPair
from mixdpo.model.fused_head import SequenceLogProbs

BATCHES = [(3, 4), (5, 0), (0, 0), (0, 2), (1, 1)]  # pairs of rank 0 and rank 1; every rank calls the loss every time


def losses_of(batches: list[torch.Tensor]) -> dict[str, Any]:
    """Both losses over batches of h (2, B), their gradients and the state at the end."""
    torch.manual_seed(0)
    beta_dpo, found = BetaDPO(), []
    for h in batches:
        h.requires_grad_()
        zero = SequenceLogProbs(torch.zeros_like(h[0]), torch.ones(h.shape[1]))
        sides = [*(SequenceLogProbs(side, zero.lengths) for side in h), zero, zero]
        both = torch.stack([KTOPair()(*sides), beta_dpo(*sides)])
        found.append((both.detach(), torch.autograd.grad(both.sum(), h)[0]))
    return {"batches": found, "state": beta_dpo.state_dict()}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(2, sum(parts), dtype=torch.float64, generator=generator) + 1 for parts in BATCHES]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mine = [h.split(parts, dim=1)[rank].clone() for h, parts in zip(batches(), BATCHES, strict=True)]
    torch.save(losses_of(mine), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    one = losses_of(batches())
    assert one["state"]["batches"] == 4  # the batch without a pair is none
    for rank in ranks:
        assert_close(rank["state"], one["state"], rtol=1e-6, atol=0)
    for number, (values, gradient) in enumerate(one["batches"]):
        joined = [torch.cat([rank["batches"][number][i] for rank in ranks], dim=1) for i in range(2)]
        assert_close(joined, [values, gradient], rtol=1e-6, atol=1e-12)
    apart = losses_of([h[:, :3].detach() for h in batches()[:1]])["batches"][0][0]
    assert not torch.allclose(apart[0], one["batches"][0][0][0, :3])  # the other rank's pairs do count
