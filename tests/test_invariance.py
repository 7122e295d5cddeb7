"""Loss and gradient of a step are the same however it is computed: 176 ways, in double precision, against one."""

from itertools import product
from typing import Any

import pytest
import torch
from conftest import build, make_pairs, write_pairs
from test_preference_module import first_batch, perturb_policy

from mixdpo.batches.batch import PairCollator
from mixdpo.batches.steps import cut_step
from mixdpo.model.memory import recompute
from mixdpo.routing.route import Routing

LAYOUTS = [{"share_prompt": bool(share), "pack": pack} for share, pack in ((0, 0), (0, 40), (1, 0), (1, 1000))]


def loss_and_gradient(module: Any, data: Any, layout: dict[str, Any], accumulate: int) -> tuple[float, torch.Tensor]:
    """Of a step of six pairs, two of them hard, cut into so many micro-batches."""
    easy = [i for i, hard in enumerate(data.route.is_hard) if not hard]
    step = [*easy[:4], *(i for i, hard in enumerate(data.route.is_hard) if hard)][:6]
    collator = PairCollator(data.train_pairs, data.route.is_hard.tolist(), **layout)
    tokens, total = data._tokens(data.train_pairs, data.route.is_hard), 0.0
    module.model.zero_grad()
    for micro_batch in cut_step(step, tokens, accumulate=accumulate, world=1, rank=0):
        batch = collator(micro_batch)
        policy, reference = module.policy_and_reference(batch)
        losses, _, _ = module.route_losses(batch, policy, reference)
        loss = (losses * batch.weight).sum() / batch.step_total
        loss.backward()
        total += loss.item()
    module._write_log_probs()
    return total, torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])


@pytest.mark.long
@pytest.mark.usefixtures("full_precision_norms")
def test_a_step_is_the_same_however_it_is_computed(tiny_model, tmp_path, monkeypatch) -> None:
    # transformers' eager attention rounds its softmax to fp32 even in a double precision model
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    expected, seen = None, 0
    for attention in ("eager", "sdpa", "by_segment", "lower_right", "varlen"):
        options = {"trainer": {"precision": "64-true"}, "data": {"routing": Routing(hard_fraction=0.25)}}
        options |= {"dtype": "float64", "attention": attention, "activation_checkpointing": True}  # switched below
        trainer, module, data = build(tiny_model, source, tmp_path / attention, **options)
        first_batch(trainer, module, data)
        perturb_policy(module)
        assert module.model.config._attn_implementation == attention
        cuts = (2,) if attention in ("lower_right", "varlen") else (1, 2, 6)
        ways = product(LAYOUTS, cuts, (False, True), ("online", "cached"))
        for layout, accumulate, again, reference in ways:
            recompute(module.model, again)
            if reference == "online":  # and kept in a file that is empty as yet, which the next way reads
                module.reference_changed()
                module._reference_identity = lambda seen=seen: {"nothing": seen}
            loss, gradient = loss_and_gradient(module, data, layout, accumulate)
            expected = (loss, gradient) if expected is None else expected
            assert loss == pytest.approx(expected[0], rel=1e-10, abs=0)
            assert (gradient - expected[1]).norm() <= 1e-10 * expected[1].norm()
            seen += 1
    assert seen == (3 * 3 + 2) * 4 * 2 * 2 and expected is not None and expected[1].norm() > 0
