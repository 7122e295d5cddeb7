"""The interfaces of other packages that this project relies on and that may change without notice, by name: an upgrade
that takes one away fails here, and says which."""

import inspect
from pkgutil import resolve_name

import pytest

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
