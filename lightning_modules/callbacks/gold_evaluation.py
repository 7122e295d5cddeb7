"""A callback for the gold score on held-out prompts, before and after training."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.callbacks import Callback

from lightning_modules.callbacks.best_checkpoint import load_best
from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.data.chat_template import PLAIN, tokenizer_state
from mixdpo.data.columns import template_values
from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError
from mixdpo.evaluation.generation import Response
from mixdpo.evaluation.gold import Responses, Scorer, compare, greedy, scored
from mixdpo.evaluation.kept_responses import kept_responses
from mixdpo.model.adapters import Role, role
from mixdpo.model.export import Trained, generation_dtype, merged_copy
from mixdpo.model.identity import adapter_fingerprint, base_fingerprint
from mixdpo.storage.files import write_json
from mixdpo.storage.identity import content_hash, refuse_other_run


class GoldEvaluation(Callback):
    def __init__(
        self,
        prompts: str = "heldout",
        scorer: Scorer | None = lazy_instance(ConstraintScorer),  # noqa: B008
        max_new_tokens: int = 64,
        batch_size: int = 64,
        dequantise: bool | None = None,
    ) -> None:
        """Generates greedy responses to held-out prompts with the policy before training, and with the policy in
        adapter/ after training. Writes responses.json to the run's folder, and adds the scores to the table that the
        run ends with. Responses before training are kept under ~/.cache/mixdpo for the next run that starts from the
        same weights; each run scores the responses anew.

        Args:
            prompts: File of prompt rows (jsonl), or `heldout` for the built-in ones of the task `constraints`.
            scorer: Class path of the scorer of responses: (prompt row, responses) -> scores, larger is better. Null:
                lengths and end tokens only.
            max_new_tokens: Longest response, in tokens.
            batch_size: Responses decoded together.
            dequantise: Generate with a dequantised copy that the adapter is merged into. A copy is faster, but is a
                second model in memory. True makes a copy in fp32. False makes none. Null makes a copy in fp32 on a CPU.
                On a GPU null makes a copy in the model's own dtype, or none if the copy does not fit. The run decides
                this once, and a continued run keeps the decision.
        """
        self.prompts, self.scorer = prompts, scorer
        self.options, self.dequantise = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}, dequantise
        self.before: Responses | None = None
        self.rows: dict[str, dict[str, float]] = {}  # of the table that a run ends with
        self._rows: list[dict[str, Any]] = []
        self._restored: dict[str, Any] | None = None
        self._copy: torch.dtype | None = None  # dtype of the copy that generates; None is the model itself

    def state_dict(self) -> dict[str, Any]:
        """The responses before training too: a reference that was refreshed could not give them again."""
        given = [asdict(response) for response in self.before.given] if self.before else []
        return {"asked": self._asked(), "given": given, "copy": self._copy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._copy = generation_dtype(pl_module.model, self.dequantise)
            self._rows = read_prompts(self.prompts)
            if self._restored is not None:
                refuse_other_run(self._restored["asked"], self._asked())
                self._copy = self._restored["copy"] if self.dequantise is None else self._copy
            elif trainer.ckpt_path and any(getattr(c, "role", None) == "reference" for c in trainer.callbacks):
                raise InputError("the checkpoint lacks responses of the first reference: leave GoldEvaluation out")
            self.before = self._responses(pl_module, "reference", "before training")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.before is None:  # another process evaluates
            return
        load_best(trainer, pl_module)  # RunFiles, which comes later, loads the same
        after = self._responses(pl_module, "policy", "after training")
        self.rows = compare(self.before, after, [row.get("part", "all") for row in self._rows])
        pairs = zip(self._rows, self.before.rows(), after.rows(), strict=True)
        responses = [{**row, "before": before, "after": after} for row, before, after in pairs]
        write_json(Path(trainer.default_root_dir) / "responses.json", responses)

    def _responses(self, pl_module: Any, name: Role, when: str) -> Responses:
        print(f"responses to {len(self._rows)} held-out prompts, {when}")
        encoding = pl_module.trainer.datamodule.encoding
        trained = Trained(pl_module.base, None, {}, encoding["chat_template"], encoding["chat_template_kwargs"])
        tokenizer, template = trained.tokenizer()
        if template == PLAIN:
            raise InputError("GoldEvaluation needs a chat template: give a data.chat_template other than plain")

        def generated() -> list[Response]:
            if self._copy is not None:
                return greedy(merged_copy(pl_module.model, name, self._copy), tokenizer, self._rows, **self.options)
            # Lightning's own is around the steps only
            with pl_module.trainer.precision_plugin.forward_context(), torch.no_grad(), role(pl_module.model, name):
                return greedy(pl_module.model, tokenizer, self._rows, **self.options)

        if name == "policy":
            given = generated()
        elif self._restored is not None:
            given = [Response(**response) for response in self._restored["given"]]
        else:
            given = kept_responses(self._depends_on(pl_module, tokenizer), generated)
        return scored(self._rows, given, self.scorer)

    def _asked(self) -> dict[str, Any]:
        """Options that the responses before and after training must share. The copy may change with free memory."""
        asked = [[row["prompt"], values] if (values := template_values(row)) else row["prompt"] for row in self._rows]
        digest = content_hash(asked)
        return {"GoldEvaluation.prompts": digest, "GoldEvaluation.max_new_tokens": self.options["max_new_tokens"]}

    def _depends_on(self, pl_module: Any, tokenizer: Any) -> dict[str, Any]:
        """Everything that the reference's responses depend on. Responses do not depend on the scorer."""
        model, trainer = pl_module.model, pl_module.trainer
        return {
            "weights": base_fingerprint(model),
            "adapter": adapter_fingerprint(model, "reference"),
            "ends": repr(model.get_base_model().generation_config.eos_token_id),
            "tokenizer": content_hash([tokenizer_state(tokenizer)]),
            "template": tokenizer.chat_template,
            "asked": self._asked() | {**self.options, "copy": str(self._copy)},
            "computed": [*pl_module.loading.values(), str(trainer.precision), str(pl_module.device)],
        }
