"""The reference's log-probabilities on disk: the same training with and without, computed once, never stale."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import collate, fit, same
from test_preference_module import forwards

import mixdpo.storage.store
from lightning_modules.callbacks.clean_tokens import RefreshReference
from mixdpo import losses
from mixdpo.batches.batch import completion_key
from mixdpo.model.reference_cache import ReferenceCache
from mixdpo.routing.route import Routing

IDS = [{"prompt_ids": [4, 5, 6, 7, 8][: 2 + i], "chosen_ids": [*range(10, 13 + i)]} for i in range(4)]
PAIRS = [ids | {"rejected_ids": [20 + i, 21, 3], "margin": float(i), "pair_id": i} for i, ids in enumerate(IDS)]


def test_values_come_back_in_the_order_asked_for_and_only_if_all_are_known() -> None:
    first, second = ReferenceCache({"model": "a"}), ReferenceCache({"model": "a"})
    values = {completion_key([1], [i]): np.arange(i + 1, dtype=np.float32) - 0.3 for i in range(3)}
    first.add(values.items())
    keys = [(key, len(values[key])) for key in values][::-1]
    assert np.array_equal(second.get(keys), np.concatenate([values[key] for key, _ in keys]))  # another run's, at once
    assert second.get([*keys, (completion_key([1], [9]), 1)]) is None
    assert second.get([(keys[0][0], 9)]) is None  # another length
    assert ReferenceCache({"model": "b"}).get(keys[:1]) is None
    double = ReferenceCache({"model": "a"}, "float64")
    double.add([(b"key", np.array([1 / 3])), (b"nan", np.array([-1.0, np.nan])), (b"inf", np.array([-np.inf]))])
    assert double.get([(b"key", 1)]) == 1 / 3
    assert double.store.get().keys() == {b"key"}  # what is not finite is not kept


def test_a_key_tells_prompt_from_completion_and_one_text_from_another() -> None:
    texts = ([1, 2], [3]), ([1], [2, 3]), ([1, 2], [4]), ([5, 2], [3]), ([], [1, 2, 3])
    assert len({completion_key(*ids) for ids in texts}) == len(texts)
    assert completion_key((1, 2), (3,)) == completion_key([1, 2], np.array([3]))


@pytest.mark.parametrize("damage", ["no database", "a folder"])
def test_a_damaged_file_is_done_without(damage: str) -> None:
    path = ReferenceCache({"model": "a"}).store.path
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    with pytest.warns(UserWarning, match=rf"log-probabilities, {path}, cannot be used .*MIXDPO_CACHE") as told:
        cache = ReferenceCache({"model": "a"})
        for _ in range(2):
            cache.get([(b"key", 1)])
            cache.add([(b"key", np.ones(1))])
    assert len(told) == 1
    assert cache.get([(b"key", 1)]) == 1  # kept in memory


def test_a_folder_that_cannot_be_written_is_done_without(tiny_model, source, tmp_path, monkeypatch) -> None:
    """One warning in a run, whatever its reference becomes; and the same adapter."""
    trainer = {"first": (RefreshReference(every=2, role="reference"),), "max_epochs": 2}
    off = fit(tiny_model, source, tmp_path / "off", trainer=trainer, reference_cache=False, lr=1.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(mixdpo.storage.store, "cache_root", lambda: tmp_path / "file")
    with pytest.warns(UserWarning, match=rf"{tmp_path}/file/reference/\w+\.sqlite, cannot be used") as told:
        on = fit(tiny_model, source, tmp_path / "on", trainer=trainer, lr=1.0)
    (said,) = [str(each.message) for each in told if "the cache of" in str(each.message)]
    assert "--runs" not in said
    assert same(on, off)


@pytest.mark.parametrize("fault", ["vanishes", "is full"])
def test_a_folder_that_fails_in_the_middle_of_a_run_is_done_without(fault: str) -> None:
    cache = ReferenceCache({"model": "a"})
    cache.add([(b"first", np.ones(3))])
    if fault == "vanishes":
        shutil.rmtree(cache.store.path.parent)
    else:
        database = cache.store._database
        database.execute(f"PRAGMA max_page_count = {database.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.warns(UserWarning, match=rf"{cache.store.path}, cannot be used") as told:
        for number in range(3):
            cache.add([(bytes([number]), np.full(10_000, number))])
    assert len(told) == 1 and cache.get([(b"\x02", 10_000)])[0] == 2


@pytest.mark.parametrize("factor", [np.nan, 0.5], ids=str)
def test_altered_values_are_computed_anew(factor: float, tiny_model: str, source: str, tmp_path: Path) -> None:
    """A run that reads such a file trains as one without a file, and leaves the right values in the file."""
    off = fit(tiny_model, source, tmp_path / "off", reference_cache=False)
    fit(tiny_model, source, tmp_path / "first")
    (file,) = mixdpo.storage.store.cache_root().glob("reference/*.sqlite")
    with closing(sqlite3.connect(file)) as database, database:
        rows = database.execute("SELECT key, value FROM entries").fetchall()
        altered = [((factor * np.frombuffer(value, np.float32)).tobytes(), key) for key, value in rows]
        database.executemany("UPDATE entries SET value = ? WHERE key = ?", altered)
    with pytest.warns(UserWarning, match=rf"{file} holds damaged .*log-probabilities: these are computed anew"):
        assert same(fit(tiny_model, source, tmp_path / "on"), off)
    with closing(sqlite3.connect(file)) as database:
        assert sorted(database.execute("SELECT key, value FROM entries")) == sorted(rows)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_batch_names_the_completions_that_the_reference_sees(share_prompt: bool) -> None:
    hard = [False, True, False, False]
    batch = collate(PAIRS, hard, share_prompt=share_prompt)
    easy = [pair for pair, is_hard in zip(PAIRS, hard, strict=True) if not is_hard]
    sides = [(pair["prompt_ids"], pair[side]) for pair in easy for side in ("chosen_ids", "rejected_ids")]
    assert batch.reference_keys == tuple((completion_key(*ids), len(ids[1])) for ids in sides)
    targets = [token for ids in sides for token in ids[1]]
    assert batch.reference_rows.target.tolist() == targets  # the order that the values are put together in
    assert collate(PAIRS, [True] * 4).reference_keys == ()


def test_the_second_epoch_and_the_next_run_do_not_run_the_reference(tiny_model, source, tmp_path, monkeypatch) -> None:
    modules = []
    trainer = {"max_epochs": 2, "limit_val_batches": 1.0}
    data = {"routing": Routing(hard_fraction=0), "validation": 0.1, "eval_batch_size": 8}
    runs = [("off", False, 6 + 2), ("cold", True, 3 + 1), ("warm", True, 0)]  # of two epochs of three steps
    for name, cache, expected in runs:
        with monkeypatch.context() as patch:
            grads = forwards(patch)
            modules.append(fit(tiny_model, source, tmp_path / name, trainer=trainer, data=data, reference_cache=cache))
        validations = grads.count(False) - expected
        assert grads.count(True) == 6 and validations == 2, name  # the policy's own, without gradient
        assert same(modules[-1], modules[0])


def test_what_is_kept_and_what_never_is(tiny_model: str, source: str, tmp_path: Path) -> None:
    """No hard pair, and nothing for a loss without reference or where it is switched off."""
    fit(tiny_model, source, tmp_path / "a", preference_loss=losses.SimPO())
    fit(tiny_model, source, tmp_path / "b", reference_cache=False)
    assert not (mixdpo.storage.store.cache_root() / "reference").exists()
    fit(tiny_model, source, tmp_path / "run", data={"routing": Routing(hard_fraction=0.5)})
    (file,) = mixdpo.storage.store.cache_root().glob("reference/*.sqlite")
    with closing(sqlite3.connect(file)) as kept:
        assert kept.execute("SELECT count(*) FROM entries").fetchone() == (2 * 6,)


def test_a_refreshed_reference_is_another_one(tiny_model: str, source: str, tmp_path: Path) -> None:
    """Two epochs with a refresh every two steps: what was kept of an old reference would change the training."""
    modules = []
    for name, cache in [("off", False), ("on", True), ("again", True)]:
        trainer = {"first": (RefreshReference(every=2, role="reference"),), "max_epochs": 2}
        modules.append(fit(tiny_model, source, tmp_path / name, trainer=trainer, reference_cache=cache, lr=1.0))
        assert same(modules[-1], modules[0])
    files = mixdpo.storage.store.cache_root().glob("reference/*.sqlite")
    assert len(list(files)) == 3  # the base and two refreshed ones
