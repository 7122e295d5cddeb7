"""Rows of any source -> one memory-mapped table of records, with row numbers, ids and counts of dropped rows."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from mixdpo.data.columns import suggestion
from mixdpo.data.messages import checked_text
from mixdpo.data.sources import Source, open_source
from mixdpo.errors import InputError, located
from mixdpo.storage.identity import content_hash, hash63

if TYPE_CHECKING:
    import datasets


Dataset: TypeAlias = "datasets.Dataset"
Parse = Callable[[dict[str, Any], Collection[int]], list[dict[str, Any]]]


class Table(NamedTuple):
    """The usable rows of one source, memory-mapped. The column `row` (int64, from 1) is the line of a JSON-lines file,
    else the number of the record; in a folder it counts through all files. The column `place` says where the row is, as
    in "row 3" or, in a folder, "b.csv, row 1". `dropped` counts the rows that were kept out, by cause. `noted` counts
    what is not taken as it is in the other rows, such as blank responses, what was read of each file of a folder, and
    files and columns that are not read. The data set has the column `context` only if a row has a context."""

    dataset: Dataset
    dropped: dict[str, int]
    noted: dict[str, int]


def read_table(
    source: Any, split: str, limit: int | None, noun: str, parse: Parse, columns: dict[str, str], *, key: Any = None
) -> Table:
    """The usable rows of a source.

    Args:
        noun: the word for a row, whose id is the column NOUN_id.
        parse: a row and the ids of earlier rows -> its records. A record's `drop` says why the record is not
            usable, or ""; its `noted` counts what is not taken as it is, by cause; `context` and `unread` are those of
            `settle_columns`.
        columns: names and types of the record's other columns; type "messages" is a list of roles and contents,
            "weights" a list of float32.
        key: further options that the table depends on, besides the data, `limit` and the code of this folder.

    Raises:
        InputError: the source cannot be read, a row is malformed, or no row is usable.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    opened, text = open_source(source, split), Value("string")
    lists = {"messages": [{"role": text, "content": text}], "weights": [Value("float32")]}
    columns = columns | {"row": "int64"} | dict.fromkeys(("place", "drop", "noted", "context", "unread"), "string")
    features = Features({name: lists.get(kind) or Value(kind) for name, kind in columns.items()})
    fingerprint = content_hash([opened.name, opened.key, key, limit, room_code()])
    rows = partial(_table_rows, opened, parse, noun, limit)
    try:
        table = Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error  # the disk may be full
        raise InputError(str(cause) if isinstance(cause, InputError) else f"{opened.name}: {cause}") from None
    causes = table["drop"]  # a cached table holds the dropped rows' causes too
    kept = [index for index, cause in enumerate(causes) if not cause]
    dropped = dict(Counter(cause for cause in causes if cause))
    if not kept:
        raise InputError(f"{opened.name} has no usable {noun} ({len(causes)} rows read, kept out: {dropped}).")
    noted = Counter(f"rows of {file}" for place in table["place"] if (file := place.rpartition(", row ")[0]))
    table = table.select(kept, keep_in_memory=True) if dropped else table
    for counts in table["noted"]:
        noted.update(json.loads(counts))
    unread = sorted({name for names in table.unique("unread") for name in json.loads(names)})
    for what, names in {"files of no split, not read": opened.not_read, "columns not read": unread}.items():
        noted[f"{what}: {', '.join(names)}"] = len(names)
    unused = ["context"] if table.unique("context") == [""] else []
    counted = {cause: count for cause, count in noted.items() if cause and count}
    return Table(table.remove_columns(["drop", "noted", "unread", *unused]), dropped, counted)


def room_code() -> list[str]:
    """The source text of the modules in this folder. A cached table is read again only if this text is the same."""
    return [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]


def _table_rows(source: Source, parse: Parse, noun: str, limit: int | None) -> Iterator[dict[str, Any]]:
    places: dict[int, str] = {}  # of ids
    usable, id_column = 0, f"{noun}_id"
    for number, place, row in source.rows:
        with located(f"{source.name}, {place}", f" Columns present: {', '.join(row)}.{suggestion(row, noun)}"):
            records = parse(row, places)
            if (earlier := places.get(records[0][id_column])) is not None:
                name = id_column if id_column in row else "id"
                raise InputError(f"{name} {row[name]!r:.80} is in {earlier} too: each row needs its own.")
        places |= {record[id_column]: place for record in records}
        for record in records:
            chats = {name: record[name] for name in ("prompt", "messages") if name in record}
            plain = {name: [{key: m[key] for key in ("role", "content")} for m in chat] for name, chat in chats.items()}
            yield record | plain | {"row": number, "place": place, "noted": json.dumps(record["noted"])}
        usable += not records[0]["drop"]
        if usable == limit:
            return
    if not places:
        raise InputError(f"{source.name} holds no rows: give a file or split with some.")


def row_id(row: dict[str, Any], column: str, content: Any, earlier: Collection[int]) -> int:
    """Hash of the row's value in `column`, or else of the row's content and of the number of its repeats so far.

    Raises:
        InputError: the value is no text or whole number.
    """
    if column not in row:
        numbers = (hash63(f"{json.dumps(content)} {repeat}") for repeat in count())
        return next(number for number in numbers if number not in earlier)
    name = row[column]
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
        raise InputError(f"{column!r} should be text or a whole number, not {name!r:.80}.")
    return hash63(checked_text(str(name), column))
