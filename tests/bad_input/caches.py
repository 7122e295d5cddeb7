"""Caches, checkpoints and files that are written."""

import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from bad_input.case import Case, Place, cases, parts
from lightning_modules.verbs.run_cli import check_checkpoint
from mixdpo.evaluation import response_cache
from mixdpo.evaluation.response_cache import kept_responses
from mixdpo.model.adapters import Lora
from mixdpo.model.reference_cache import ReferenceCache
from mixdpo.routing.route import Routing
from mixdpo.storage.files import write_json, written_whole
from mixdpo.token_cleaning.scoring import open_losses

# Caches: sqlite, npy, json. None is needed: each fault ends in a warning that names the file.


def warned(do: Callable[[Place], Any]) -> Callable[[Place], str]:
    def text(place: Place) -> str:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            do(place)
        assert len(told) == 1, told
        return str(told[0].message)

    return text


def reference_cache(fault: Callable[[Path], Any], use: str = "open") -> Any:
    def do(place: Place) -> Any:
        cache = ReferenceCache({"fault": str(place.folder)})
        cache.add([(b"key", np.ones(3))])
        cache._store.close()
        fault(cache.path)
        again = ReferenceCache({"fault": str(place.folder)})
        return again.get([(b"key", 3)]) if use == "get" else again.add([(b"other", np.ones(2))])

    return do


def overwritten(path: Path) -> None:
    """The pages after the first one."""
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def halved(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE entries SET value = ?", (np.full(3, 0.5, dtype=np.float32).tobytes(),))


def other_table(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE log_probs (name TEXT)")


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def losses_cache(content: Callable[[Path], Any]) -> Any:
    def do(place: Place) -> Any:
        identity = {"data": str(place.folder)}
        content(Path(open_losses(5, identity).filename))
        return open_losses(5, identity)

    return do


def responses_cache(fault: Callable[[Path], Any]) -> Any:
    def do(place: Place) -> Any:
        kept_responses({}, list)
        fault(response_cache.cache_root() / "responses/responses.sqlite")
        return kept_responses({}, list)

    return do


def file_onto_folder(place: Place) -> None:
    with written_whole(place.folder) as partial:
        partial.write_text("x")


DELETE = "Delete it if it is damaged, or name another folder in MIXDPO_CACHE"


def borne(entrance: str, *rows: tuple[str, Callable[[Place], Any], str | tuple[str, ...]]) -> list[Case]:
    return [Case(f"{entrance} cache", fault, warned(do), parts(says), tolerated=True) for fault, do, says in rows]


CACHES = [
    *borne(
        "reference",
        ("text", reference_cache(lambda path: path.write_text("text " * 99)), (".sqlite", DELETE)),
        ("damaged pages", reference_cache(overwritten, "get"), (".sqlite", "malformed", DELETE)),
        ("halved values", reference_cache(halved, "get"), ".sqlite … computed anew"),
        ("another table", reference_cache(other_table, "get"), ("no such table", DELETE)),
        ("a folder", reference_cache(into_folder), ("unable to open", DELETE)),
    ),
    *borne(
        "token-losses",
        ("cut off", losses_cache(lambda path: path.write_bytes(path.read_bytes()[:130])), (".npy is damaged", DELETE)),
        (
            "of another length",
            losses_cache(lambda path: np.save(path, np.zeros(4, dtype=np.float32))),
            ("(4,)", DELETE),
        ),
        (
            "altered values",
            losses_cache(lambda path: np.save(path, np.full(5, 0.1, dtype=np.float32))),
            ".npy holds damaged losses … computed anew",
        ),
    ),
    *borne(
        "responses",
        ("cut off", responses_cache(lambda p: p.write_bytes(p.read_bytes()[:5000])), (".sqlite", DELETE)),
        ("altered", responses_cache(halved), ".sqlite … computed anew"),
    ),
    *cases(
        "written files",
        ("a folder in the way", file_onto_folder, "is a folder … give a file's name"),
        (
            "a file in the way",
            lambda place: write_json(Path(place.write("x", "")) / "y.json", {}),
            "cannot write … Give another place",
        ),
    ),
]

# Checkpoints.


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


LAST, BESIDE = "give a run's RUNS/NAME/checkpoints/last.ckpt", "Continue with the config.yaml beside it"
CHECKPOINTS = [
    *cases(
        "ckpt_path",
        ("no such file", checkpoint(None), ("/no/last.ckpt is no checkpoint", "FileNotFoundError", LAST)),
        ("nothing", checkpoint(""), ("is no checkpoint", LAST)),
        ("text", checkpoint("not a checkpoint\n"), ("is no checkpoint", LAST)),
        ("cut off", half, ("or is damaged", LAST)),
        ("a list", saved([1, 2]), ("is no checkpoint", LAST)),
        ("of another program", saved({"state_dict": {}, "epoch": 1}), ("is no checkpoint", LAST)),
        ("holds a program", saved({"adapters": Path("x")}), ("is no checkpoint", LAST)),
        ("another batch size", resumed(data={"batch_size": 8}), ("belongs to another run", "batch_size", BESIDE)),
        ("another route", resumed(data={"routing": Routing(hard_fraction=0.5)}), ("route: ", BESIDE)),
        ("of pairs, for samples", resumed("fit_sft"), ("belongs to another run", "SFTDataModule", BESIDE)),
        ("another adapter", resumed(lora=Lora(targets=["q_proj"])), ("lora: ", BESIDE)),
    )
]

CASES = [*CACHES, *CHECKPOINTS]
