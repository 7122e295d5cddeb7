"""A source -> numbered raw rows: hub id, local folder or file, the built-in task, memory, or a list of these."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import iglob
from importlib.resources import files
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from mixdpo.data.columns import renamed
from mixdpo.errors import InputError
from mixdpo.storage.files import sha256
from mixdpo.storage.identity import content_hash
from mixdpo.storage.read import unique_keys

NumberedRows = Iterator[tuple[int, dict[str, Any]]]


BUILT_IN = {"constraints": "constraints_pairs.jsonl", "heldout": "constraints_heldout.jsonl"}


IDS = ("pair_id", "sample_id", "id")


HUB_FILE = "hf://datasets/"
DATA_FILE = re.compile(r"\.(parquet|(jsonl?|csv)(\.gz)?)$")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


LIKE_DATA = re.compile(r"\.(parquet|jsonl?|ndjson|csv|tsv|arrow|feather|orc|avro|xlsx?|pkl)(\.\w+)?$|\.(zip|tar|t?gz)$")
CONFIGURATIONS = re.compile(r"---\n((?!---).*\n)*?configs:")  # in a README.md, as hub data sets have them


# By default a csv field may not exceed 128 kB; a long response does.
csv.field_size_limit(2**31 - 1)


class Source(NamedTuple):
    """Rows of one source, and its name for error messages."""

    name: str
    key: str  # changes whenever the content does
    rows: Iterator[tuple[int, str, dict[str, Any]]]  # number from 1; place, "row 3" or in a folder "b.csv, row 1"; row
    not_read: Sequence[str] = ()  # data files of a folder that belong to no split


class Origin(NamedTuple):
    """`data.source` or `data.validation` as given, with `data.columns`: our name of a column -> the file's. As text, it
    is the name for messages."""

    given: Any
    columns: Mapping[str, str] = {}

    def __str__(self) -> str:
        if isinstance(self.given, str):
            return self.given
        if are_several(self.given):
            return f"[{', '.join(str(Origin(each)) for each in self.given)}]"
        return f"{type(self.given).__name__} of {len(self.given)} rows"


def are_several(given: Any) -> bool:
    """Whether this is a list of sources. A list of mappings is a source: its rows."""
    return isinstance(given, list) and not all(isinstance(each, dict) for each in given)


def open_source(source: Any, split: str) -> Source:
    """Rows of an `Origin`, or of what such an origin has as `given`."""
    given, columns = source if isinstance(source, Origin) else Origin(source)
    if are_several(given):
        return _open_several([Origin(each, columns) for each in given], split)
    opened = _open_named(given, split) if isinstance(given, str) else _open_memory(given, split)
    key = content_hash([opened.key, *columns.items()])
    return opened._replace(key=key, rows=renamed(opened.rows, columns, opened.name))


def _open_several(origins: Sequence[Origin], split: str) -> Source:
    """Rows of one source after the other, numbered through. What has no splits takes no part in the choice of one."""
    own = ["train" if "[" not in split and is_one_file(each.given) else split for each in origins]
    names = [each.given if isinstance(each.given, str) else f"source {k}" for k, each in enumerate(origins, 1)]
    opened = [each._replace(name=name) for name, each in zip(names, map(open_source, origins, own), strict=True)]
    key, not_read = content_hash((each.name, each.key) for each in opened), [*chain(*(e.not_read for e in opened))]
    return Source(f"{len(opened)} sources", key, _one_after_another(opened), not_read)


def _one_after_another(sources: Sequence[Source]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """An id that an earlier source has becomes "ID of source 2": each file may count from 0."""
    numbers, first = count(1), dict[str, int]()  # source of each id
    for position, source in enumerate(sources, 1):
        for _, place, row in source.rows:
            ids = [(name, str(row[name])) for name in IDS if isinstance(row.get(name), int | str)]
            known = [(name, text) for name, text in ids if first.setdefault(text, position) < position]
            new = {name: f"{text} of source {position}" for name, text in known}
            yield next(numbers), f"{source.name}, {place}", row | new


def _open_memory(given: Any, split: str) -> Source:
    """A list of rows or a `datasets.Dataset`."""
    if split != "train":
        raise InputError(f"{Origin(given)} has no split {split!r}: use 'train', or select the rows before.")
    if not isinstance(given, list) and type(given).__name__ != "Dataset":
        forms = "a path or hub id as text, a list of rows, a datasets.Dataset, or a list of these"
        raise InputError(f"a source of type {type(given).__name__} cannot be read: give {forms}.")
    rows = given if isinstance(given, list) or given.format["type"] == "custom" else given.with_format(None)
    return Source(str(Origin(given)), content_hash(rows), _placed(enumerate(rows, 1)))


def _open_named(source: str, split: str) -> Source:
    if source.startswith(HUB_FILE):
        return _open_file(_from_hub(source), split)
    path = Path(str(files("mixdpo") / "constraints" / BUILT_IN[source]) if source in BUILT_IN else source).expanduser()
    if path.is_file():
        return _open_file(path, split)
    if not path.is_dir() and (DATA_FILE.search(source) or not HUB_ID.fullmatch(source)):
        raise InputError(f"no file or folder {str(path)!r} (looked from {Path.cwd()}). Check the path.")
    card = path / "README.md"
    if path.is_dir() and not (card.is_file() and CONFIGURATIONS.match(card.read_text("utf-8", "replace"))):
        return _open_folder(path, split)
    return _through_datasets(source, path, split)


def is_one_file(source: Any) -> bool:
    """Whether the source has no splits."""
    if not isinstance(source, str):
        return not are_several(source) or all(map(is_one_file, source))
    return source in BUILT_IN or source.startswith(HUB_FILE) or bool(DATA_FILE.search(source))


def _from_hub(source: str) -> Path:
    """Download one file of a hub data set. `datasets` refuses some data sets (AlpacaEval's is a script)."""
    from huggingface_hub import hf_hub_download

    try:
        owner, name, file = source.removeprefix(HUB_FILE).split("/", 2)
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as error:  # no OWNER/NAME/FILE, connection, authentication, no such file: an open list
        cause = f"{type(error).__name__}: {str(error).strip()[:300]}"
        raise InputError(f"{source} cannot be read: {cause}. Give {HUB_FILE}OWNER/NAME/FILE") from error


def _open_file(path: Path, split: str) -> Source:
    if not DATA_FILE.search(path.name):
        raise InputError(f"{path} should end in .parquet, .json, .jsonl or .csv; the last three also with .gz.")
    if split != "train":
        raise InputError(f"{path} is one file and has no split {split!r}: use 'train' and data.limit, or another file.")
    return Source(str(path), sha256(path), _placed(file_rows(path)))


def _through_datasets(source: str, path: Path, split: str) -> Source:
    """Rows of a hub data set, or of a copy of one whose README.md names its configurations."""
    import datasets

    names, name = ([str(path)], str(path)) if path.is_dir() else (source.split(":"), repr(source))
    try:
        table = datasets.load_dataset(*names, split=split, trust_remote_code=False)
    except Exception as error:  # connection, authentication, unknown split, broken file: an open list
        root = error.__cause__ or error
        cause = f"{type(root).__name__}: {str(root).rstrip('.')}. On the hub: ID:CONFIG or {HUB_FILE}OWNER/NAME/FILE"
        raise InputError(f"{name}, split {split!r} cannot be read: {cause}.") from error
    return Source(f"{name}, split {split!r}", table._fingerprint, _placed(enumerate(table, 1)))


def _placed(rows: NumberedRows) -> Iterator[tuple[int, str, dict[str, Any]]]:
    return ((number, f"row {number}", row) for number, row in rows)


def _open_folder(path: Path, split: str) -> Source:
    """Rows of a split's files in name order, numbered through. A slice such as train[:4] is cut from all these rows."""
    from datasets import ReadInstruction

    splits, name = _files_by_split(path), split.partition("[")[0]
    names, begin, end = splits.get(name, []), 0, None
    try:
        if name != split:
            count = sum(1 for each in names for _ in file_rows(path / each))
            (cut,) = ReadInstruction.from_spec(split).to_absolute({name: count})
            begin, end = cut.from_, cut.to
        if not names:
            raise ValueError("no such split")
    except (ValueError, AssertionError) as error:
        known = "; ".join(f"{each or 'no split'}: {', '.join(names[:3])}" for each, names in splits.items())
        raise InputError(f"{path}, split {split!r}: {error}. Give a data.split of these ({known or 'none'}).") from None
    rows = islice(((each, *numbered) for each in names for numbered in file_rows(path / each)), begin, end)
    placed = ((number, f"{each}, row {own}", row) for number, (each, own, row) in enumerate(rows, 1))
    key = content_hash((each, sha256(path / each)) for each in names)
    return Source(f"{path}, split {split!r}", key, placed, splits.get("", ()))


def _files_by_split(path: Path) -> dict[str, list[str]]:
    """Names of the folder's data files by split, as `datasets` decides by their names; "" for those of no split.

    Raises:
        InputError: a file has data in a form that is not read.
    """
    from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, get_data_patterns

    base = path.absolute()
    names = [name for name in sorted(iglob("**", root_dir=base, recursive=True)) if LIKE_DATA.search(name)]
    names = [name for name in names if Path(name).name not in FILES_TO_IGNORE]
    if others := [name for name in names if not DATA_FILE.search(name)]:
        raise InputError(f"{path / others[0]} is not read: give .parquet, .json, .jsonl or .csv, or move it away.")
    files = DataFilesDict.from_patterns(get_data_patterns(str(base)), str(base)) if names else {}
    splits = {split: [name for name in names if str(base / name) in held] for split, held in files.items()}
    rest = [name for name in names if not any(name in held for held in splits.values())]
    return splits | ({"": rest} if rest else {})


def file_rows(path: Path) -> NumberedRows:
    """Rows of a data file. Lines are decoded singly, so that a fault is named by its own row."""
    number = 0
    read = {".parquet": _parquet_rows, ".csv": _csv_rows}.get(Path(path.name.removesuffix(".gz")).suffix, _json_rows)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, row in read(file):
                if row is not None:
                    yield number, row
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        cause = f"{type(error).__name__}: {str(error)[:300]}. Correct the row, or save the file as UTF-8."
        raise InputError(f"{path}, row {number + 1}: cannot be read: {cause}") from error


def _parquet_rows(file: Any) -> NumberedRows:
    from pyarrow.parquet import ParquetFile

    return enumerate((row for batch in ParquetFile(file).iter_batches() for row in batch.to_pylist()), 1)


def _json_rows(lines: Iterable[bytes]) -> NumberedRows:
    """One object a line, or one list of objects over the whole file. A blank line is None, to keep the count."""
    lines, begun = iter(lines), False
    for number, line in enumerate(lines, 1):
        text = line.decode("utf-8-sig")
        if not begun and text.lstrip().startswith("["):  # a list counts its own rows
            rows = DECODER.decode(text + b"".join(lines).decode())
            yield from ((place, _json_object(row)) for place, row in enumerate(rows, 1))
        elif not text.strip():
            yield number, None
        else:
            begun = True
            yield number, _json_object(DECODER.decode(text))


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def _json_object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a row should be an object of named columns, not a {type(row).__name__}")
    return row


def _csv_rows(lines: Iterable[bytes]) -> NumberedRows:
    reader = csv.reader((line.decode("utf-8-sig") for line in lines), strict=True)
    header = next(reader, [])
    if len(set(header)) < len(header):
        raise ValueError(f"the header names a column twice: {', '.join(header)}")
    for number, values in enumerate(reader, 1):
        if values and len(values) != len(header):
            raise ValueError(f"{len(values)} values under {len(header)} column names")
        yield number, dict(zip(header, values, strict=True)) if values else None
