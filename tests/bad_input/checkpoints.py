"""Checkpoints, and files that are written. Damaged caches are in test_reference.py, test_scoring.py and others."""

from pathlib import Path
from typing import Any

from test_scoring import changed_model
from tiny import make_pairs

from bad_input.case import Place, cases
from lightning_modules.verbs.run_cli import check_checkpoint
from mixdpo.losses import IPO
from mixdpo.model.adapters import Lora
from mixdpo.routing.route import Routing
from mixdpo.storage.files import write_json, written_whole


def file_onto_folder(place: Place) -> None:
    with written_whole(place.folder) as partial:
        partial.write_text("x")


def file_into_file(place: Place) -> None:
    write_json(Path(place.write("x", "")) / "y.json", {})


WRITTEN = cases(
    "written files",
    ("a folder in the way", file_onto_folder, "is a folder … give a file's name"),
    ("a file in the way", file_into_file, "cannot write … Give another place"),
)


def checkpoint(content: Any) -> Any:
    return lambda place: check_checkpoint(place.write("last.ckpt", content) if content is not None else "/no/last.ckpt")


def saved(what: Any) -> Any:
    def do(place: Place) -> Any:
        import torch

        torch.save(what, place.folder / "last.ckpt")
        return check_checkpoint(str(place.folder / "last.ckpt"))

    return do


def half(place: Place) -> Any:
    content = (place.shared.run / "checkpoints/last.ckpt").read_bytes()
    return check_checkpoint(place.write("last.ckpt", content[: len(content) // 2]))


def resumed(how: str = "fit", **options: Any) -> Any:
    def do(place: Place) -> Any:
        return getattr(place, how)(ckpt_path=str(place.shared.run / "checkpoints/last.ckpt"), **options)

    return do


def on_other_rows(change: Any) -> Any:
    rows = [row | change(row) for row in make_pairs(16)]
    return lambda place: resumed(source=place.write("other.jsonl", rows))(place)


def on_another_base(place: Place) -> Any:
    return resumed(model=changed_model(place.model, place.folder / "base"))(place)


LAST, BESIDE = "give a run's RUNS/NAME/checkpoints/last.ckpt", "use the config.yaml beside it"
CHECKPOINTS = [
    *cases(
        "ckpt_path",
        ("no such file", checkpoint(None), ("/no/last.ckpt is no checkpoint", "FileNotFoundError", LAST)),
        ("text", checkpoint("not a checkpoint\n"), ("is no checkpoint", LAST)),
        ("cut off", half, ("or is damaged", LAST)),
        ("a list", saved([1, 2]), ("is no checkpoint", LAST)),
        ("of another program", saved({"state_dict": {}, "epoch": 1}), ("is no checkpoint", LAST)),
        ("holds a program", saved({"adapters": Path("x")}), ("is no checkpoint", LAST)),
        ("another batch size", resumed(data={"batch_size": 8}), ("belongs to another run", "batch_size", BESIDE)),
        ("another route", resumed(data={"routing": Routing(hard_fraction=0.5)}), ("route: ", BESIDE)),
        ("of pairs, for samples", resumed("fit_sft"), ("belongs to another run", "SFTDataModule", BESIDE)),
        ("another loss", resumed(preference_loss=IPO()), ("preference_loss: ", BESIDE)),
        ("another rate", resumed(lr=0.3), ("optimizer.lr: ", BESIDE)),
        ("clipped gradients", resumed(trainer={"gradient_clip_val": 1.0}), ("gradient_clip_val: ", BESIDE)),
        ("other texts", on_other_rows(lambda row: {"chosen": f"{row['chosen']} red"}), ("data: ", BESIDE)),
        ("other margins", on_other_rows(lambda row: {"margin": -row["margin"]}), ("route: ", BESIDE)),
        ("another base", on_another_base, ("base: ", BESIDE)),
        ("another adapter", resumed(lora=Lora(targets=["q_proj"])), ("lora: ", BESIDE)),
    )
]

CASES = [*WRITTEN, *CHECKPOINTS]
