"""Agreement with TRL 1.16's DPOTrainer: log-probabilities, loss, and ten steps of training, where they can differ.

The policy's B matrices are filled with N(0, 0.02) on both sides while the reference stays the base, so that policy and
reference differ: a wrong reference, a shifted label or a wrong sign of Δ all show.
"""

import math
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WORDS, build, make_pairs, write_pairs
from test_preference_module import first_batch
from test_scoring import fill

from lightning_modules.preference import PreferenceModule
from mixdpo import losses
from mixdpo.losses import DPO
from mixdpo.model.adapters import Lora
from mixdpo.model.fused_head import SequenceLogProbs
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant

STEPS, BATCH, RATE, BETA = 10, 2, 1.0, 0.1
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")
]


def pairs_in_training_order() -> list[dict[str, Any]]:
    """Chosen and rejected responses of different words, so that there is something to learn in ten steps."""
    rows = sorted(make_pairs(STEPS * BATCH, seed=5), key=lambda row: -row["margin"])
    draw = random.Random(0)
    for row in rows:
        for side, words in (("chosen", WORDS[:8]), ("rejected", WORDS[8:])):
            row[side] = " ".join(draw.choices(words, k=draw.randint(3, 10)))
    return rows


def trl_trainer(model_folder: str, folder: Path, batch: int) -> Any:
    """DPOTrainer on the same pairs in the same order, plain SGD at a constant rate; records log-probs and losses."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows, sides = pairs_in_training_order(), {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    messages = [{key: [{"role": role, "content": row[key]}] for key, role in sides.items()} for row in rows]
    batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": BATCH // batch}
    rate = {"learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    plain = dict.fromkeys(("bf16", "fp16", "gradient_checkpointing"), False) | {"use_cpu": True, "disable_tqdm": True}
    logs = {"output_dir": str(folder), "logging_steps": 1, "save_strategy": "no", "report_to": []}
    steps = {"beta": BETA, "max_steps": STEPS, "train_sampling_strategy": "sequential"}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=DPOConfig(**batches, **rate, **plain, **logs, **steps),
        train_dataset=Dataset.from_list(messages),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    fill(trainer.model, "default", 7, 0.02)
    return trainer


def our_run(model_folder: str, folder: Path, trl_model: Any, accumulate: int) -> tuple[Any, PreferenceModule, Any]:
    source = write_pairs(folder / "pairs.jsonl", pairs_in_training_order())
    options = {"lr": RATE, "schedule": Constant(warmup=0.0), "preference_loss": DPO(beta=BETA)}
    options |= {"lora": Lora(rank=4, alpha=8), "trainer": {"accumulate_grad_batches": accumulate}}
    data = {"batch_size": BATCH, "routing": Routing(hard_fraction=0.0)}
    run = build(model_folder, source, folder / "ours", data=data, **options)
    first_batch(*run)
    theirs = {name.replace(".default.", ".policy."): value for name, value in trl_model.named_parameters()}
    for name, parameter in run[1].model.named_parameters():
        if parameter.requires_grad:
            parameter.data = theirs[name].detach().clone()
    return run


def record_losses(trainer: Any) -> list[float]:
    losses: list[float] = []
    compute = trainer._compute_loss

    def recorded(*arguments: Any, **options: Any) -> Any:
        result = compute(*arguments, **options)
        losses.append(float(result[0] if isinstance(result, tuple) else result))
        return result

    trainer._compute_loss = recorded
    return losses


def test_log_probs_and_loss_of_single_pairs(tiny_model: str, tmp_path: Path) -> None:
    trl = trl_trainer(tiny_model, tmp_path / "trl", batch=1)
    _, module, data = our_run(tiny_model, tmp_path, trl.model, accumulate=BATCH)
    loader, ours = iter(trl.get_train_dataloader()), list(data.train_dataloader())
    by_id = {int(batch.ids[0]): batch for batch in ours}
    differences = []
    for index in range(STEPS * BATCH):
        trl._metrics["train"].clear()
        loss = trl.compute_loss(trl.model, trl._prepare_inputs(next(loader)))
        batch = by_id[data.train_pairs[int(data.route.order[index])]["pair_id"]]
        policy, reference = module.policy_and_reference(batch)
        metrics = {name: values[-1] for name, values in trl._metrics["train"].items()}
        assert policy.sums[0].item() == pytest.approx(metrics["logps/chosen"], abs=1e-5, rel=1e-6)
        assert policy.sums[1].item() == pytest.approx(metrics["logps/rejected"], abs=1e-5, rel=1e-6)
        own = module.route_losses(batch, policy, reference)[0][0].item()
        assert own == pytest.approx(float(loss), abs=1e-5)
        differences.append(abs(own - 0.6931472))
    assert max(differences) > 1e-3, "policy and reference do not differ: the comparison could not fail"


def test_ten_sgd_steps(tiny_model: str, tmp_path: Path) -> None:
    trl = trl_trainer(tiny_model, tmp_path / "trl", batch=BATCH)
    trainer, module, data = our_run(tiny_model, tmp_path, trl.model, accumulate=1)
    theirs = record_losses(trl)
    trl.train()
    ours: list[float] = []
    step = module.training_step
    module.training_step = lambda *a: (ours.append(float(loss := step(*a))), loss)[1]  # type: ignore[method-assign]
    trainer.fit(module, data)
    assert len(ours) == len(theirs) == STEPS
    assert theirs[0] - min(theirs) >= 0.05, f"TRL's loss hardly falls: {theirs}"
    assert ours == pytest.approx(theirs, abs=1e-4)


# The loss code of TRL's own trainers, through a stub model with random per-token log-probs. Batch 1 (TRL averages some
# terms over the tokens of a batch), fp64. The trainers are not initialised: only what their loss code reads is set.
PROMPT, VOCABULARY = 3, 11
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
