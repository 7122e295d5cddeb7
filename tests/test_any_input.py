"""Properties: whatever stands in a file, a reader gives rows or names the row; whatever is packed comes out again."""

import gzip
import json
import re
from pathlib import Path

import datasets
import pytest
from conftest import sources
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pairs import PAIR

from mixdpo.batches.rows import Piece, token_rows
from mixdpo.data.conversations import read_samples
from mixdpo.data.pairs import read_pairs
from mixdpo.data.sources import file_rows
from mixdpo.errors import InputError

Row = dict[str, object]
few = settings(max_examples=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets.config.HF_DATASETS_CACHE, before = tmp_path_factory.mktemp("cache"), datasets.config.HF_DATASETS_CACHE
    datasets.disable_progress_bars()
    yield tmp_path_factory.mktemp("any")
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


text = st.one_of(st.sampled_from(["a", "b", "", " ", "\ud800", "\x00", "<|im_end|>"]), st.text(max_size=4))
message = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", 3]), "content": text}),
    st.dictionaries(st.sampled_from(["role", "content", "from"]), text, max_size=2),
)
scalar = st.none() | st.booleans() | st.integers() | st.floats()
anything = st.one_of(text, st.lists(message, max_size=3), scalar, st.just({"a": [1]}))
number = st.one_of(st.floats(-5, 5), anything)


def rows_of(usable: Row, **columns: st.SearchStrategy[object]) -> st.SearchStrategy[list[Row]]:
    """Rows of which some are usable, some have any value in one column, some in all."""
    fields = st.fixed_dictionaries({}, optional=columns)
    row = st.one_of(st.just(usable), fields, fields.map(lambda change: usable | change))
    return st.lists(row, min_size=1, max_size=5)


def check(read: object, path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        table = read(str(path))
    except InputError as error:
        assert str(path) in str(error)
        assert re.search(r", row [1-9]", str(error)) or "no usable" in str(error)
    else:
        assert len(table.dataset) + sum(table.dropped.values()) == len(rows)
        assert table.dataset["row"][:] == sorted(set(table.dataset["row"][:]))


@given(rows_of(PAIR, prompt=anything, chosen=anything, rejected=anything, margin=number, pair_id=anything))
@few
def test_pairs_are_kept_counted_or_named(folder: Path, rows: list[Row]) -> None:
    check(read_pairs, folder / "pairs.jsonl", rows)


COLUMNS = ("prompt", "completion", "messages", "instruction", "output", "input", "id", "source")


@given(rows_of({"prompt": "a", "completion": "b"}, **dict.fromkeys(COLUMNS, anything)))
@few
def test_samples_are_kept_counted_or_named(folder: Path, rows: list[Row]) -> None:
    check(read_samples, folder / "samples.jsonl", rows)


LINE = json.dumps(PAIR | {"chosen": "é\u2028"}, ensure_ascii=False).encode() + b"\n"
GOOD = {
    "a.jsonl": LINE * 3,
    "a.json": b"[" + b", ".join([LINE] * 3) + b"]",
    "a.csv": b'prompt,chosen\n"a\nb",c\n\nd,"e ""f"""\n',
    "a.jsonl.gz": gzip.compress(LINE * 3, mtime=0),
}


changes = st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=3)), max_size=3)


@given(st.sampled_from(sorted(GOOD)), changes, st.data())
@few
def test_damaged_files_give_rows_or_name_one(folder, name, damage, data) -> None:
    content = GOOD[name]
    for place, new in damage:
        content = content[:place] + new + content[place + len(new) :]
    content = content[: data.draw(st.integers(0, len(content)))]
    path = folder / name
    path.write_bytes(content)
    try:
        rows = list(file_rows(path))
    except InputError as error:
        assert re.match(rf"{re.escape(str(path))}, row [1-9]\d*: cannot be read: ", str(error))
        assert str(error).endswith(".") and str(error).count(". ") >= 1
    else:
        assert all(isinstance(row, dict) for _, row in rows)
        assert [number for number, _ in rows] == sorted({number for number, _ in rows})


ids = st.lists(st.integers(1, 99), min_size=1, max_size=6)


@st.composite
def documents(draw: st.DrawFn) -> list[list[Piece]]:
    """A prompt and up to two responses each, numbered through, or a conversation with several spans."""
    made: list[list[Piece]] = []
    number = 0
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            whole = draw(ids)
            bounds = sorted(draw(st.sets(st.integers(1, len(whole)), max_size=4)))
            made.append([Piece(whole, number, bounds[: len(bounds) // 2 * 2])])
            number += 1
            continue
        pieces = [Piece(draw(ids))]
        for _ in range(draw(st.integers(1, 2))):
            response = draw(ids)
            pieces.append(Piece(response, number, (0, len(response))))
            number += 1
        made.append(pieces)
    return made


@given(documents(), st.integers(0, 30))
@few
def test_packed_rows_hold_each_document_once_and_change_no_target(made: list[list[Piece]], pack: int) -> None:
    count = 1 + max(piece.completion for document in made for piece in document)
    rows = token_rows(made, count, pack)
    sizes = [sum(len(piece.ids) for piece in document) for document in made]
    used: dict[int, int] = {}
    for document, size, (row, start, *ends) in zip(made, sizes, rows.documents, strict=True):
        assert start == used.get(row, 0) and ends[-1] == start + size  # side by side, nothing between them
        used[row] = ends[-1]
        assert rows.input_ids[row, start : ends[-1]].tolist() == [token for piece in document for token in piece.ids]
        first = len(document[0].ids)
        expected = [*range(first), *(first + i for piece in document[1:] for i in range(len(piece.ids)))]
        assert rows.position_ids[row, start : ends[-1]].tolist() == expected
    assert sorted(used) == list(range(len(rows.input_ids))) and rows.tokens == sum(sizes)
    assert all(used[row] <= pack for row in used if sum(place[0] == row for place in rows.documents) > 1)
    for (row, *_), (other, *_), size in zip(rows.documents, rows.documents[1:], sizes[1:], strict=False):
        assert row == other or used[row] + size > pack  # a new row only where the old one has no room
    # each target, with the token that predicts it, as in the document alone
    flat, expected = rows.input_ids.flatten(), []
    for document in made:
        for piece in document:
            before = [] if piece is document[0] else list(document[0].ids)
            whole = [*before, *piece.ids]
            for start, end in zip(piece.spans[::2], piece.spans[1::2], strict=True):
                places = range(len(before) + start, len(before) + end)
                expected += [(piece.completion, whole[place - 1], whole[place]) for place in places]
    found = (rows.completion.tolist(), flat[sources(rows)].tolist(), rows.target.tolist())
    assert expected == list(zip(*found, strict=True))
