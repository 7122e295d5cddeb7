"""Agreement with the loss code of TRL 1.16's own trainers, through a stub model with random per-token log-probs.

Batch 1 (TRL averages some terms over the tokens of a batch), fp64, relative 1e-6. The trainers are not initialised:
only what their loss code reads is set. TRL has no rdpo, dpop, kto_pair, beta_dpo, cal_dpo, hypo, odpo, madpo,
amapo, and its DPOTrainer no cdpo.
"""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixdpo import losses
from mixdpo.model.fused_head import SequenceLogProbs

PROMPT, VOCABULARY = 3, 11
pytestmark = pytest.mark.filterwarnings("ignore")
ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


class Stub(torch.nn.Module):
    """Returns what it was given, whatever it is shown."""

    is_gradient_checkpointing = False

    def __init__(self, **outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(**self.outputs)


def draw(lengths: tuple[int, int], seed: int) -> tuple[list[torch.Tensor], ...]:
    """Per-token log-probs of the policy's two responses and of the reference's, fp64."""
    generator = torch.Generator().manual_seed(seed)
    policy = [-3 * torch.rand(n, dtype=torch.float64, generator=generator) - 0.01 for n in lengths]
    reference = [p - torch.randn(len(p), dtype=torch.float64, generator=generator) for p in policy]
    return policy, reference


def ours(loss: Any, *responses: torch.Tensor) -> float:
    shared = min(len(r) for r in responses)
    of = [SequenceLogProbs(r.sum()[None], torch.tensor([len(r)]), r[:shared].sum()[None]) for r in responses]
    (value,) = loss(*of)
    return float(value)


def trl_dpo(policy: list[torch.Tensor], reference: list[torch.Tensor], **options: Any) -> float:
    """`DPOTrainer._compute_loss` on one pair."""
    from trl import DPOTrainer

    width = PROMPT + max(len(p) for p in policy)
    mask = torch.zeros(2, width, dtype=torch.long)
    of_model = []
    for responses in (policy, reference):
        log_probs = torch.zeros(2, width - 1, dtype=torch.float64)
        for row, values in enumerate(responses):
            mask[row, PROMPT : PROMPT + len(values)] = 1
            log_probs[row, PROMPT - 1 : PROMPT - 1 + len(values)] = values
        blank = torch.zeros_like(log_probs)
        of_model.append(Stub(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool()))
    trainer = DPOTrainer.__new__(DPOTrainer)
    defaults: dict[str, Any] = {"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None}
    defaults |= {"loss_types": ["sigmoid"], "loss_weights": [1.0]}
    defaults |= {"model": of_model[0], "ref_model": of_model[1], "accelerator": ACCELERATOR, "_tp_size": 1}
    defaults |= {"f_divergence_type": "reverse_kl", "use_weighting": False, "aux_loss_enabled": False}
    defaults |= {"precompute_ref_logps": False, "args": SimpleNamespace(gradient_checkpointing_kwargs=None)}
    defaults |= {"_total_train_tokens": 0, "_metrics": defaultdict(lambda: defaultdict(list))}
    vars(trainer).update(defaults | options)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return float(trainer._compute_loss(of_model[0], inputs, False))


DPO_TRAINER = {
    "dpo": (losses.DPO(beta=0.3), {"beta": 0.3}),
    "robust": (losses.Robust(label_smoothing=0.2), {"loss_types": ["robust"], "label_smoothing": 0.2}),
    "ipo": (losses.IPO(), {"loss_types": ["ipo"]}),
    "hinge": (losses.Hinge(), {"loss_types": ["hinge"], "beta": 0.05}),
    "irpo": (losses.IRPO(nll_weight=0.7), {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    "apo_zero": (losses.APOZero(), {"loss_types": ["apo_zero"]}),
    "apo_down": (losses.APODown(), {"loss_types": ["apo_down"]}),
    "sppo": (losses.SPPO(), {"loss_types": ["sppo_hard"], "beta": 0.001}),
    "dpo_norm": (losses.DPONorm(), {"loss_types": ["sigmoid_norm"], "beta": 5.0}),
    "ld_dpo": (losses.LDDPO(tail_weight=0.3), {"ld_alpha": 0.3}),
    "sum": (
        losses.Sum([losses.DPO(), losses.APOZero()], [1.0, 0.4]),
        {"loss_types": ["sigmoid", "apo_zero"], "loss_weights": [1.0, 0.4]},
    ),
}
LENGTHS = [(5, 9), (8, 2), (1, 1), (4, 4)]


@pytest.mark.parametrize("name", DPO_TRAINER)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_dpo_trainer(name: str, lengths: tuple[int, int]) -> None:
    loss, options = DPO_TRAINER[name]
    for seed in range(3):
        policy, reference = draw(lengths, seed)
        assert ours(loss, *policy, *reference) == pytest.approx(trl_dpo(policy, reference, **options), rel=1e-6)


def random_logits(lengths: tuple[int, int], prompt: int, seed: int) -> tuple[torch.Tensor, dict[str, Any], list[Any]]:
    """Logits (2, T, V), TRL's batch of one pair, and the log-probs of the responses' tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = prompt + max(lengths)
    logits = 2 * torch.randn(2, width, VOCABULARY, dtype=torch.float64, generator=generator)
    ids = torch.randint(VOCABULARY, (2, width), generator=generator)
    batch, responses = {}, []
    for row, (side, length) in enumerate(zip(("chosen", "rejected"), lengths, strict=True)):
        own = ids[row : row + 1, : prompt + length]
        labels = own.clone()
        labels[:, :prompt] = -100
        batch |= {f"{side}_input_ids": own, f"{side}_labels": labels, f"{side}_attention_mask": torch.ones_like(own)}
        log_probs = logits[row].log_softmax(-1)
        responses.append(torch.stack([log_probs[t - 1, ids[row, t]] for t in range(prompt, prompt + length)]))
    return logits, batch, responses


def trl_parts(trainer_class: type, logits: torch.Tensor, batch: dict[str, Any], **options: Any) -> tuple[float, float]:
    """`get_batch_loss_metrics` of CPOTrainer or ORPOTrainer: the whole loss, and its NLL term, unweighted."""
    trainer = trainer_class.__new__(trainer_class)
    defaults = {"label_smoothing": 0.0, "alpha": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "loss_type": "sigmoid"}
    common = {"is_encoder_decoder": False, "aux_loss_enabled": False, "pad_token_id": 0, "padding_value": 0}
    vars(trainer).update({**defaults, **common, "accelerator": ACCELERATOR, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda self: self.double())  # ORPO's rounds to fp32, on purpose
        loss, metrics = trainer.get_batch_loss_metrics(Stub(logits=logits), batch)
    return float(loss), float(metrics["nll_loss"])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_cpo_trainer(lengths: tuple[int, int]) -> None:
    """cpo, simpo and slic; TRL's NLL is the token mean over the batch: of one pair, the response's."""
    from trl.experimental.cpo import CPOTrainer

    for seed in range(3):
        logits, batch, responses = random_logits(lengths, PROMPT, seed)
        loss, nll = trl_parts(CPOTrainer, logits, batch, beta=0.1, cpo_alpha=0.0)
        assert nll == 0 and ours(losses.CPO(nll_weight=0.0), *responses) == pytest.approx(loss, rel=1e-6)
        loss, nll = trl_parts(CPOTrainer, logits, batch, beta=0.1, cpo_alpha=0.4)
        assert -float(responses[0].mean()) == pytest.approx(nll, rel=1e-6)
        assert ours(losses.CPO(nll_weight=0.4), *responses) == pytest.approx(loss, rel=1e-6)
        options = {"beta": 2.5, "simpo_gamma": 0.75, "cpo_alpha": 0.0, "loss_type": "simpo"}  # γ itself: γ/β = 0.3
        loss, _ = trl_parts(CPOTrainer, logits, batch, **options)
        assert ours(losses.SimPO(beta=2.5, gamma_ratio=0.3), *responses) == pytest.approx(loss, rel=1e-6)
        # SLiC's δ on s is 1/β here; its λ counts nats, not nats per token
        loss, nll = trl_parts(CPOTrainer, logits, batch, beta=1.0, cpo_alpha=0.1 * lengths[0], loss_type="hinge")
        assert ours(losses.SLiC(delta=1.0, nll_weight=0.1), *responses) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_orpo_trainer(lengths: tuple[int, int]) -> None:
    """TRL's NLL is of the prompt's tokens too: ours only with a prompt of one token, which nothing predicts."""
    from trl.experimental.orpo import ORPOTrainer

    for seed in range(3):
        for prompt in (PROMPT, 1):
            logits, batch, responses = random_logits(lengths, prompt, seed)
            loss, nll = trl_parts(ORPOTrainer, logits, batch, beta=0.3)
            whole, mean = ours(losses.ORPO(odds_weight=0.3), *responses), float(responses[0].mean())
            assert whole + mean == pytest.approx(loss - nll, rel=1e-6)
            assert math.isclose(-mean, nll, rel_tol=1e-6) == (prompt == 1)
            if prompt == 1:
                assert whole == pytest.approx(loss, rel=1e-6)
