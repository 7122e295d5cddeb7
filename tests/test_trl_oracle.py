"""Agreement with TRL 1.16's DPOTrainer: log-probabilities, loss, and ten steps of training, where they can differ.

The policy's B matrices are filled with N(0, 0.02) on both sides while the reference stays the base, so that policy and
reference differ: a wrong reference, a shifted label or a wrong sign of Δ all show.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, build, make_pairs, write_pairs
from test_preference_module import first_batch
from test_scoring import fill

from lightning_modules.preference import PreferenceModule
from mixdpo.losses import DPO
from mixdpo.model.adapters import Lora
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
    trl_losses = record_losses(trl)
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
    assert len(trl_losses) == STEPS * BATCH
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
