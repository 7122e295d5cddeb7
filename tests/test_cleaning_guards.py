"""What a review of token cleaning found: changes that nobody saw, options without effect, late or unreadable errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build, build_sft, fit, make_pairs, make_samples, make_trainer, write_pairs

from lightning_modules.token_cleaning import RefreshReference
from mixdpo.adapters import Lora, adapter_fingerprint, add_adapters, add_reference, base_fingerprint
from mixdpo.errors import InputError
from mixdpo.export import save_adapter
from mixdpo.models import load_base
from mixdpo.routing import Routing
from mixdpo.samples import Slices
from mixdpo.schedules import Constant
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import Loss, Random
from mixdpo.token_cleaning.selection import Selection

BASE_LOSS = Cleaning(scorer=Loss("base"), selection=Selection(0.5))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "samples.jsonl", make_samples(12))


def adapter(tiny_model: str, folder: Path, **lora: Any) -> str:
    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(**lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    save_adapter(model, folder)
    return str(folder)


def test_pairs_with_other_texts_and_the_same_ids_are_other_pairs(tiny_model: str, tmp_path: Path) -> None:
    """Ids and margins alone would find the losses, masks and checkpoints of the old texts."""
    rows = make_pairs(12)
    edited = [row | {"chosen": f"fish {row['chosen']}"} for row in rows]
    sources = [write_pairs(tmp_path / f"{name}.jsonl", part) for name, part in (("old", rows), ("new", edited))]
    data = {"routing": Routing(hard_fraction=0.5)}
    scores = []
    for number, pairs in enumerate(sources):
        fit(tiny_model, pairs, tmp_path / str(number), cleaning=BASE_LOSS, data=data)
        scores.append(np.load(tmp_path / str(number) / "cleaning/scores.npy"))
    assert len(scores[1]) == len(scores[0]) + 6 and np.isfinite(scores[1]).all()
    with pytest.raises(InputError, match="data: "):
        masks = Cleaning(masks=str(tmp_path / "0/cleaning"))
        fit(tiny_model, sources[1], tmp_path / "masks", cleaning=masks, data=data)
    with pytest.raises(InputError, match="another run"):
        checkpoint = str(tmp_path / "0/checkpoints/last.ckpt")
        fit(tiny_model, sources[1], tmp_path / "resumed", cleaning=BASE_LOSS, data=data, ckpt_path=checkpoint)


def test_resuming_with_another_cleaning_is_refused(tiny_model: str, source: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"make": build_sft, "schedule": Constant(warmup=0.0)}
    fit(tiny_model, source, tmp_path / "cut", cleaning=BASE_LOSS, trainer={"max_steps": 1}, **options)
    other = Cleaning(scorer=Loss("base"), selection=Selection(0.2))
    with pytest.raises(InputError, match="another cleaning"):
        checkpoint = str(tmp_path / "cut/checkpoints/last.ckpt")
        fit(tiny_model, source, tmp_path / "rest", cleaning=other, ckpt_path=checkpoint, **options)


def test_the_base_is_its_weights_and_its_configuration(tiny_model: str) -> None:
    def fingerprint(change: Any) -> str:
        base = load_base(tiny_model, quantization="none", dtype="float32")
        change(base)
        return base_fingerprint(add_adapters(base, Lora(rank=2)))

    same = fingerprint(lambda base: None)
    assert fingerprint(lambda base: None) == same
    assert fingerprint(lambda base: base.model.layers[1].mlp.up_proj.weight.mul_(2)) != same
    assert (
        fingerprint(lambda base: base.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight.flip(0))) != same
    )
    assert fingerprint(lambda base: setattr(base.config, "rms_norm_eps", 1e-3)) != same


def test_a_reference_of_another_scale_cannot_be_refreshed(tiny_model: str, source: str, tmp_path: Path) -> None:
    """At the start, not after the first stage has been trained."""
    reference = adapter(tiny_model, tmp_path / "reference", rank=4, alpha=32)
    cleaning = Cleaning(reference=reference)
    options: dict[str, Any] = {"cleaning": cleaning, "data": {"slices": Slices(2)}}
    with pytest.raises(InputError, match="rank, alpha or target modules"):
        fit(tiny_model, source, tmp_path / "run", make=build_sft, trainer={"first": (RefreshReference(),)}, **options)


def test_a_reference_may_have_fewer_modules(tiny_model: str, source: str, tmp_path: Path) -> None:
    reference = adapter(tiny_model, tmp_path / "reference", targets=["q_proj", "v_proj"])
    module = fit(tiny_model, source, tmp_path / "run", make=build_sft, cleaning=Cleaning(reference=reference))
    assert adapter_fingerprint(module.model, "cleaning") not in ("none", adapter_fingerprint(module.model, "policy"))
    assert np.load(tmp_path / "run/cleaning/scores.npy").any()


def test_another_epoch_is_cleaned_by_the_reference_in_force(tiny_model: str, source: str, tmp_path: Path) -> None:
    """3 steps × 2 epochs, a refresh at step 2: step 3 trains again what steps 0 and 1 trained by the old scores."""
    reference = adapter(tiny_model, tmp_path / "reference", rank=4)
    refresh = RefreshReference(every=2)
    trainer = {"first": (refresh,), "max_epochs": 2, "max_steps": 4}
    lora = Lora(rank=4)
    cleaning = Cleaning(reference=reference)
    fit(tiny_model, source, tmp_path / "run", make=build_sft, cleaning=cleaning, trainer=trainer, lora=lora)
    stages = json.loads((tmp_path / "run/cleaning/stages.json").read_text())["stages"]
    assert [(stage["step"], stage["samples"]) for stage in stages] == [(0, 12), (2, 12)]


def test_masks_say_so_and_need_no_reference(tiny_model: str, source: str, tmp_path: Path) -> None:
    fit(tiny_model, source, tmp_path / "first", make=build_sft, cleaning=Cleaning(scorer=Random()))
    masks = Cleaning(masks=str(tmp_path / "first/cleaning"))
    module = fit(tiny_model, source, tmp_path / "second", make=build_sft, cleaning=masks)
    assert set(module.model.peft_config) == {"policy"}
    (stage,) = json.loads((tmp_path / "second/cleaning/stages.json").read_text())["stages"]
    assert stage["scorer"] == f"masks of {tmp_path / 'first/cleaning'}" and stage["selection"] is None


@pytest.mark.parametrize(("fraction", "message"), [(0.0, "no pair is hard"), (1.0, "no easy pair")])
def test_pairs_that_leave_nothing_to_clean_or_learn_from(
    fraction: float, message: str, tiny_model: str, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", make_pairs(8))
    with pytest.raises(InputError, match=message):
        fit(tiny_model, pairs, tmp_path / "run", cleaning=Cleaning(), data={"routing": Routing(hard_fraction=fraction)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"pack": -5}}, "pack must be 0"),
        ({"cleaning": Cleaning(scorer=Random(), warm_up_stages=1)}, "no stage to clean"),
        ({"cleaning": Cleaning(), "trainer": {"first": (RefreshReference(),)}}, "one stage"),
        ({"cleaning": Cleaning(warm_up_stages=1), "data": {"slices": Slices(2)}}, "nothing makes the warmed-up policy"),
        ({"trainer": {"first": (RefreshReference(role="reference", every=1),)}}, "a preference loss that has"),
    ],
)
def test_options_without_effect_are_refused(
    options: dict[str, Any], message: str, tiny_model: str, source: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        fit(tiny_model, source, tmp_path / "run", make=build_sft, **options)


def test_masks_for_other_hard_pairs_are_refused(tiny_model: str, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    data = [{"routing": Routing(hard_fraction=fraction)} for fraction in (0.5, 0.25)]
    fit(tiny_model, pairs, tmp_path / "run", cleaning=BASE_LOSS, data=data[0])
    with pytest.raises(InputError, match=r"another hard pairs \(hard pairs: 6, \w+ there, 3, \w+ here\)"):
        fit(tiny_model, pairs, tmp_path / "x", cleaning=Cleaning(masks=str(tmp_path / "run/cleaning")), data=data[1])


def test_modules_and_data_that_do_not_belong_together(tiny_model: str, source: str, tmp_path: Path) -> None:
    _, preference, pairs = build(tiny_model, write_pairs(tmp_path / "p.jsonl", make_pairs(8)), tmp_path / "a")
    _, sft, samples = build_sft(tiny_model, source, tmp_path / "b")
    for module, data in ((preference, samples), (sft, pairs)):
        with pytest.raises(InputError, match=f"{type(module).__name__} cannot train on what {type(data).__name__}"):
            make_trainer(tmp_path / "run").fit(module, data)


def test_hard_pairs_are_scored_when_the_first_of_them_comes(tiny_model: str, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    data = {"routing": Routing(hard_fraction=1 / 3)}
    trainer, module, loaded = build(tiny_model, pairs, tmp_path / "run", cleaning=BASE_LOSS, data=data)
    trainer.fit(module, loaded)
    (stage,) = json.loads((tmp_path / "run/cleaning/stages.json").read_text())["stages"]
    assert (stage["step"], stage["samples"]) == (2, 4)


def test_a_scorer_names_whose_losses_it_reads() -> None:
    with pytest.raises(InputError, match="roles"):
        Cleaning(scorer=len)


def test_copies_keep_the_random_numbers(tiny_model: str, tmp_path: Path) -> None:
    import torch

    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=4))
    saved = adapter(tiny_model, tmp_path / "reference", rank=4)
    before = torch.get_rng_state()
    add_reference(model, "cleaning", saved)
    add_reference(model, "previous")
    assert torch.equal(torch.get_rng_state(), before)
