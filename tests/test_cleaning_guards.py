"""What a review of token cleaning found: changes that nobody saw, options without effect, late or unreadable errors."""

import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build, build_sft, fit, make_pairs, make_samples, make_trainer, write_pairs

from lightning_modules.callbacks.clean_tokens import RefreshReference
from mixdpo.batches.steps import Slices
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, add_adapters, add_reference
from mixdpo.model.export import save_adapter
from mixdpo.model.identity import adapter_fingerprint, base_fingerprint
from mixdpo.model.loading import load_base
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss, Probability, Random
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


EVOLVING = Cleaning(warm_up_stages=1)
OTHERS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str]] = {
    "another selection": (
        (BASE_LOSS,),
        (replace(BASE_LOSS, selection=Selection(0.2)),),
        r"cleaning\.selection: .*0\.2",
    ),
    "random dropped": ((Cleaning(scorer=Random()),), (None,), r"cleaning: .*Random.* there, None here"),
    "DFT dropped": ((Cleaning(scorer=Probability(), selection=None),), (None,), r"cleaning: .* there, None here"),
    "masks dropped": ((Cleaning(masks="masks"),), (None,), r"cleaning: .*masks of .* there, None here"),
    "cleaning begun": ((None,), (Cleaning(scorer=Random()),), r"cleaning: None there"),
    "a longer warm-up": ((BASE_LOSS,), (replace(BASE_LOSS, warm_up_stages=1),), r"warm_up_stages: 0 there, 1 here"),
    "another reference": (
        (Cleaning(reference="a"),),
        (Cleaning(reference="b"),),
        r"cleaning\.reference: .*a there, .*b",
    ),
    "refreshed no more": ((EVOLVING, RefreshReference()), (EVOLVING,), r"RefreshReference: .* there, None here"),
    "refreshed more often": ((EVOLVING, RefreshReference()), (EVOLVING, RefreshReference(1)), r"every stage.* every 1"),
    "another average": ((EVOLVING, RefreshReference()), (EVOLVING, RefreshReference(ema=0.5)), r"ema 0\.0 .* ema 0\.5"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_with_another_cleaning_is_refused(name: str, tiny_model: str, source: str, tmp_path: Path) -> None:
    def go(folder: str, cleaning: Cleaning | None, *refresh: Any, **options: Any) -> None:
        if cleaning is not None and cleaning.reference:
            cleaning = replace(cleaning, reference=adapter(tiny_model, tmp_path / cleaning.reference, rank=4))
        if cleaning is not None and cleaning.masks:
            fit(tiny_model, source, tmp_path / "masks", make=build_sft, data=data, cleaning=Cleaning(scorer=Random()))
            cleaning = replace(cleaning, masks=str(tmp_path / "masks/cleaning"))
        options |= {"trainer": {"max_steps": 1, "first": refresh}, "schedule": Constant(warmup=0.0)}
        fit(tiny_model, source, tmp_path / folder, make=build_sft, data=data, cleaning=cleaning, **options)

    data = {"slices": Slices(3)}
    first, other, message = OTHERS[name]
    go("cut", *first)
    with pytest.raises(InputError, match=f"another run.*{message}"):
        go("rest", *other, ckpt_path=str(tmp_path / "cut/checkpoints/last.ckpt"))


def test_base_losses_belong_to_how_they_were_computed(tiny_model: str, source: str, tmp_path: Path) -> None:
    for attention in ("by_segment", "sdpa", "sdpa"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        fit(tiny_model, source, folder, make=build_sft, cleaning=BASE_LOSS, attention=attention, data={"pack": 0})
    files = [json.loads(path.read_text()) for path in (tmp_path / "cache/token_losses").glob("*.json")]
    assert {(file["attention"], file["device"]) for file in files} == {("by_segment", "cpu"), ("sdpa", "cpu")}
    assert len(files) == 2


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


@pytest.mark.parametrize(
    ("quantization", "scale"),
    [("nf4", "weight.quant_state.offset"), ("nf4", "weight.quant_state.state2.absmax"), ("int8", "state.SCB")],
)
def test_the_base_is_the_scales_of_its_weights_as_well(quantization: Any, scale: str, tiny_model: str) -> None:
    found = []
    for factor in (1, 1, 2):
        base = load_base(tiny_model, quantization=quantization, dtype="float32")
        attrgetter(scale)(base.model.layers[1].mlp.up_proj).mul_(factor)
        found.append(base_fingerprint(add_adapters(base, Lora(rank=2))))
    assert found[0] == found[1] != found[2]


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
    assert adapter_fingerprint(module.model, "cleaning_reference") not in (
        "none",
        adapter_fingerprint(module.model, "policy"),
    )
    assert np.load(tmp_path / "run/cleaning/scores.npy").any()


@pytest.mark.parametrize(
    ("max_steps", "schedule_steps", "scored"),
    [(-1, None, [(0, 12), (2, 12), (4, 8)]), (4, None, [(0, 12), (2, 8)]), (4, 6, [(0, 12), (2, 12)])],
)
def test_another_epoch_is_cleaned_by_the_reference_in_force(
    max_steps: int, schedule_steps: int | None, scored: Any, tiny_model: str, source: str, tmp_path: Path
) -> None:
    """3 steps × 2 epochs, refreshes at steps 2 and 4: step 3 trains again what step 0 trained by the old scores. What
    is never trained again keeps the weights that it was trained with; a run that pauses goes on."""
    options: dict[str, Any] = {"cleaning": Cleaning(reference=adapter(tiny_model, tmp_path / "reference", rank=4))}
    options["trainer"] = {"first": (RefreshReference(every=2),), "max_epochs": 2, "max_steps": max_steps}
    options |= {"lora": Lora(rank=4), "schedule_steps": schedule_steps}
    module = fit(tiny_model, source, tmp_path / "run", make=build_sft, **options)
    stages = json.loads((tmp_path / "run/cleaning/stages.json").read_text())["stages"]
    assert [(stage["step"], stage["samples"]) for stage in stages] == scored
    if max_steps == -1:
        first = list(module.trainer.datamodule.pool_steps()[0])
        assert (np.load(tmp_path / "run/cleaning/decided.npy")[first] == 1).all()


def test_the_last_epoch_of_reshuffled_pairs_is_cleaned_in_its_own_order(tiny_model: str, tmp_path: Path) -> None:
    """6 steps × 2 epochs, refreshes at steps 5 and 10."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    data = {"routing": Routing(hard_fraction=0.5, order="shuffled", reshuffle=True), "batch_size": 2}
    trainer = {"first": (RefreshReference(every=5),), "max_epochs": 2}
    module = fit(tiny_model, pairs, tmp_path / "run", cleaning=Cleaning(), trainer=trainer, data=data)
    first, second = (module.trainer.datamodule.pool_steps(epoch) for epoch in (0, 1))
    assert first != second
    decided = np.load(tmp_path / "run/cleaning/decided.npy")
    assert set(np.flatnonzero(decided == 2)) == {sample for step in second[4:] for sample in step} != set()


@pytest.mark.parametrize("worse", ["previous", "base"])
def test_a_scorer_of_one_model_under_two_names_is_refused(
    worse: Any, tiny_model: str, source: str, tmp_path: Path
) -> None:
    """A given adapter starts policy, reference and previous alike: all scores would be 0, the first tokens be kept."""
    start = adapter(tiny_model, tmp_path / "start") if worse == "previous" else None
    options: dict[str, Any] = {"cleaning": Cleaning(scorer=ExcessLoss(worse=worse)), "adapter": start}
    options |= {"data": {"slices": Slices(3, only=[1, 2])}, "trainer": {"first": (RefreshReference(),)}}
    with pytest.raises(InputError, match=f"every score would be 0: {worse} and cleaning_reference"):
        fit(tiny_model, source, tmp_path / "run", make=build_sft, **options)


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
    with pytest.raises(InputError, match=r"\(hard pairs: 6, \w+ there, 3, \w+ here\)"):
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
    add_reference(model, "cleaning_reference", saved)
    add_reference(model, "previous")
    assert torch.equal(torch.get_rng_state(), before)
