"""The shape of the house: which room may import which, and how large anything may grow (`make size` prints it all)."""

import ast
import inspect
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from statistics import median

import pytest
import size
import yaml

FLOORS = [
    {"mixdpo.errors"},
    {"mixdpo.storage"},
    {"mixdpo.options", "mixdpo.routing", "mixdpo.batches", "mixdpo.constraints"},
    {"mixdpo.data", "mixdpo.first_look", "mixdpo.pages"},
    {"mixdpo.model"},
    {"mixdpo.losses", "mixdpo.signals", "mixdpo.token_cleaning", "mixdpo.metrics"},
    {"mixdpo.evaluation"},
    {"mixdpo.__main__"},
    {"datamodules", "lightning_modules"},
    {"run"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def name_of(path: Path) -> str:
    parts = path.relative_to(size.ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in size.source_files()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "mixdpo" else parts[:1])


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, in functions as well, but not under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            # `from mixdpo.losses import functions` is of a module, `… import DPO` of what a module holds
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in inner}
    return names


IMPORTS = {module: imports(path) for module, path in MODULES.items()}


def test_no_room_imports_from_its_own_floor_or_a_higher_one() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in sorted(names & MODULES.keys())
        if room_of(name) != room_of(module) and FLOOR[room_of(name)] >= FLOOR[room_of(module)]
    ]
    assert wrong == []


def test_no_circle_of_imports() -> None:
    own = {module: (names & MODULES.keys()) - {module} for module, names in IMPORTS.items()}
    list(TopologicalSorter(own).static_order())  # raises CycleError with the modules


def test_mixdpo_never_imports_lightning() -> None:
    tops = {m: {name.split(".")[0] for name in names} for m, names in IMPORTS.items() if m.split(".")[0] == "mixdpo"}
    assert [module for module, names in tops.items() if names & LIGHTNING] == []


def test_sizes() -> None:
    files = [str(path.relative_to(size.ROOT)) for path in size.source_files() if size.lines(path) > size.FILE]
    assert files == []
    sizes = [function for path in size.source_files() for function in size.functions(path)]
    assert [place for lines, place in sizes if lines > size.FUNCTION] == []
    assert median(lines for lines, _ in sizes) <= size.MEDIAN
    assert size.lines(size.ROOT / "run.py") <= size.RUN


def test_budget() -> None:
    rooms = size.code_by_room()
    assert rooms.total() <= size.SOURCE
    assert sum(lines for room, lines in rooms.items() if room not in size.NOT_CORE) <= size.CORE
    assert sum(map(size.lines, (size.ROOT / "tests").rglob("*.py"))) <= size.TESTS


def test_code_lines_are_those_that_run(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text('"""A\ndocstring."""\n\n# of x\nx = (\n    1,\n)\n"""Of x."""\n\n\ndef f():\n    """Of f."""\n')
    assert size.code_lines(file) == 4  # x takes three lines, f one


def test_from_the_demo_to_the_equation_in_two_hops() -> None:
    """1: configs/demo.yaml -> the room that its class path names. 2: the room -> the class with its equation."""
    demo = yaml.safe_load((size.ROOT / "configs/demo.yaml").read_text("utf-8"))
    room, _, name = demo["model"]["init_args"]["preference_loss"]["class_path"].rpartition(".")
    loss = getattr(import_module(room), name)
    assert name == "DPO" and loss.__module__ in {room, *IMPORTS[room]}
    source = inspect.getsource(loss)
    assert "logsigmoid" in source and "2305.18290" in source


# Interfaces of other packages that may change without notice: an upgrade that takes one away fails here.
# module: names. Attention over packed rows; roles of one base; the exact cut of a step, exact resume, default device
PRIVATE = {
    "transformers": "AttentionInterface.register AttentionMaskInterface.register PreTrainedModel._supports_sdpa"
    " PreTrainedModel.activation_checkpointing_enable PreTrainedModel.tie_weights PretrainedConfig.get_text_config"
    " DynamicCache.batch_repeat_interleave GenerationConfig BitsAndBytesConfig",
    "transformers.integrations.sdpa_attention": "sdpa_attention_forward",
    "transformers.masking_utils": "sdpa_mask",
    "peft.tuners.tuners_utils": "BaseTunerLayer",
    "peft.utils.integrations": "dequantize_module_weight",
    "peft": "get_peft_model_state_dict load_peft_weights",
    "lightning.pytorch.loops": "_FitLoop._should_accumulate _FitLoop._can_stop_early"
    " _TrainingEpochLoop._should_check_val_fx",
    "lightning.pytorch.strategies.strategy": "Strategy.tensor_init_context Strategy.checkpoint_io",
    "lightning.pytorch.plugins.precision": "Precision.forward_context",
    "lightning.pytorch.plugins.io": "TorchCheckpointIO.save_checkpoint",
    "lightning.pytorch.cli": "LightningCLI.instantiate_trainer",
    "jsonargparse": "ArgumentParser.validate ArgumentParser.error lazy_instance",
    "accelerate": "init_empty_weights",
}
ARGUMENTS = [
    ("transformers.integrations.sdpa_attention:sdpa_attention_forward", ("attention_mask", "is_causal", "scaling")),
    ("transformers:DynamicCache.__init__", ("config",)),
    ("peft:PeftModel.from_pretrained", ("adapter_name", "is_trainable")),
    ("peft:PeftModel.load_adapter", ("adapter_name", "is_trainable")),
    ("lightning.pytorch:Trainer.fit", ("ckpt_path", "weights_only")),
    ("accelerate:init_empty_weights", ("include_buffers",)),
    ("torch.cuda:is_bf16_supported", ("including_emulation",)),
]
STATE_OF_MODEL_CHECKPOINT = {"dirpath", "best_model_path", "best_model_score", "best_k_models", "kth_best_model_path"}


@pytest.mark.parametrize("module", PRIVATE)
def test_it_is_there(module: str) -> None:
    for name in PRIVATE[module].split():
        resolve_name(f"{module}:{name}")


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS)
def test_it_takes_these_arguments(name: str, arguments: tuple[str, ...]) -> None:
    assert set(arguments) <= set(inspect.signature(resolve_name(name)).parameters)


def test_what_a_model_checkpoint_keeps() -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    assert set(ModelCheckpoint().state_dict()) >= STATE_OF_MODEL_CHECKPOINT


def test_what_a_lora_layer_has(tiny_model: str) -> None:
    """Roles flip its two flags; adapters are copied matrix by matrix."""
    from mixdpo.model.adapters import Lora, adapter_layers, add_adapters
    from mixdpo.model.loading import load_base

    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=2))
    for layer in adapter_layers(model):
        assert layer._active_adapter == ["policy"] and layer._disable_adapters is False
        assert {"policy"} == set(layer.lora_A) == set(layer.lora_B) == set(layer.scaling) == set(layer.lora_dropout)
        assert layer.get_delta_weight("policy").shape == layer.get_base_layer().weight.shape
        assert isinstance(layer.cast_input_dtype_enabled, bool)


def test_what_a_model_has(tiny_model: str) -> None:
    from mixdpo.model.loading import load_base

    model = load_base(tiny_model, quantization="none", dtype="float32")
    assert model.config._attn_implementation == "auto"
    assert isinstance(model.all_tied_weights_keys, dict)
    assert all(isinstance(module._non_persistent_buffers_set, set) for module in model.modules())
    assert any(hasattr(module, "gradient_checkpointing") for module in model.modules())


def test_what_a_trainer_has() -> None:
    import lightning as L

    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    loop = trainer.fit_loop
    for owner, name in (
        (loop, "_data_fetcher"),
        (loop.epoch_progress.current, "completed"),
        (loop.epoch_loop, "val_loop"),
        (loop.epoch_loop.val_loop, "restarting"),
        (loop.epoch_loop.batch_progress, "is_last_batch"),
        (trainer._logger_connector, "_first_loop_iter"),
        (trainer, "checkpoint_callbacks"),
        (trainer.strategy, "reduce_boolean_decision"),
    ):
        assert hasattr(owner, name), name
