"""A source -> numbered raw rows: hub id, local folder or file, or the built-in task."""

import csv
import gzip
import json
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from glob import iglob
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mixdpo.errors import InputError
from mixdpo.storage.files import sha256
from mixdpo.storage.identity import content_hash

NumberedRows = Iterator[tuple[int, dict[str, Any]]]


BUILT_IN = {"constraints": "constraints_pairs.jsonl", "heldout": "constraints_heldout.jsonl"}


HUB_FILE = "hf://datasets/"
DATA_FILE = re.compile(r"\.(parquet|(jsonl?|csv)(\.gz)?)$")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


# Which files of a folder belong to which split, as `datasets` decides by their names.
LIKE_DATA = re.compile(r"\.(parquet|jsonl?|ndjson|csv|tsv|arrow|feather|orc|avro|xlsx?|pkl)(\.\w+)?$|\.(zip|tar|t?gz)$")
DESCRIPTIONS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SHARD = re.compile(r"data/([\w.]+)-\d{5}-of-\d{5}[^/]*$")
SPLITS = {"train": "train(ing)?", "validation": "valid(ation)?|val|dev", "test": "test(ing)?|eval(uation)?"}
CONFIGURATIONS = re.compile(r"---\n((?!---).*\n)*?configs:")  # in a README.md, as hub data sets have them


# By default a csv field may not exceed 128 kB; a long response does.
csv.field_size_limit(2**31 - 1)


class Source(NamedTuple):
    """Rows of one source, numbered from 1, and its name for error messages. A folder's files are numbered through."""

    name: str
    key: str  # changes whenever the content does
    rows: NumberedRows
    files: list[tuple[int, str]] | None = None  # of a folder, as reading gets to them: number of rows before, name
    not_read: Sequence[str] = ()  # files of a folder that belong to no split

    def place(self, number: int) -> str:
        """Where row `number` is: "row 3", or in a folder "b.csv, row 1"."""
        before, name = self.files[bisect_left(self.files, (number, "")) - 1] if self.files else (0, "")
        return f"{name}, row {number - before}".removeprefix(", ")


def open_source(source: str, split: str) -> Source:
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


def is_one_file(source: str) -> bool:
    """Whether the source has no splits."""
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
        raise InputError(f"{path} is one file and has no split {split!r}: use 'train', or name the file that holds it.")
    return Source(str(path), sha256(path), file_rows(path))


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
    return Source(f"{name}, split {split!r}", table._fingerprint, enumerate(table, 1))


def _open_folder(path: Path, split: str) -> Source:
    """Rows of the files of a split, in name order. A slice such as train[:4] is cut from the rows of all its files."""
    from datasets import ReadInstruction

    splits, name = _files_by_split(path), f"{path}, split {split!r}"
    files: list[tuple[int, str]] = []
    asked = {each: splits[each] for each in re.findall(r"[\w.]+", split) if each in splits}
    # only a slice has to know how many rows there are
    rows = {each: 0 if split == each else sum(1 for _ in _rows_of(path, names)) for each, names in asked.items()}
    try:
        cut = [(each.splitname, each.from_, each.to) for each in ReadInstruction.from_spec(split).to_absolute(rows)]
    except (ValueError, AssertionError) as error:
        known = "; ".join(f"{each}: {', '.join(names[:3])}" for each, names in splits.items())
        raise InputError(f"{name} cannot be read: {error}. Give a data.split of these ({known or 'none'}).") from None
    parts = [(asked[each], begin, None if split == each else end) for each, begin, end in cut]
    key = content_hash((each, sha256(path / each)) for names in asked.values() for each in names)
    return Source(name, key, _folder_rows(path, parts, files), files, splits.get("", ()))


def _files_by_split(path: Path) -> dict[str, list[str]]:
    """Names below the folder, without hidden ones, by split. A file or its folder names the split by a word such as
    train, dev or test; of data/NAME-00000-of-00001.* any NAME is a split. If none names any, all files are `train`;
    else a file that names none has the split "".

    Raises:
        InputError: a file has data in a form that is not read.
    """
    splits: dict[str, list[str]] = {}
    for name in sorted(iglob("**", root_dir=path, recursive=True)):
        folder, _, file = name.rpartition("/")
        if LIKE_DATA.search(file) and file not in DESCRIPTIONS and (path / name).is_file():
            if not DATA_FILE.search(file):
                raise InputError(f"{path / name} is not read: give .parquet, .json, .jsonl or .csv, or move it away.")
            shard = SHARD.match(name)
            for split in [shard[1]] if shard else _named_splits(folder) or _named_splits(file) or [""]:
                splits.setdefault(split, []).append(name)
    return {"train": splits[""]} if splits.keys() == {""} else splits


def _named_splits(name: str) -> list[str]:
    return [split for split, words in SPLITS.items() if re.search(rf"(?<![^-._ 0-9/])({words})(?![^-._ 0-9/])", name)]


def _rows_of(path: Path, names: list[str]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    return ((name, number, row) for name in names for number, row in file_rows(path / name))


def _folder_rows(path: Path, parts: Iterable[tuple[list[str], int, int | None]], files: list[Any]) -> NumberedRows:
    """Rows `begin` to `end` of each part's files, numbered through. `files` gets each file with its first row."""
    number = 0
    for names, begin, end in parts:
        for name, own, row in islice(_rows_of(path, names), begin, end):
            if not files or files[-1][1] != name:
                files.append((number, name))
            number = files[-1][0] + own
            yield number, row


def file_rows(path: Path) -> NumberedRows:
    """Rows of a data file. Lines are decoded singly, so that a fault is named by its own row."""
    number = 0
    kind = DATA_FILE.search(path.name)
    read = {"parquet": _parquet_rows, "csv": _csv_rows}.get(kind[2] or kind[1] if kind else "", _json_rows)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, row in read(file):
                if row is not None:
                    yield number, row
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        cause = f"{type(error).__name__}: {str(error)[:300]}"
        raise InputError(
            f"{path}, row {number + 1}: cannot be read: {cause}. Correct the row, or save the file as UTF-8."
        ) from error


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


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(named := dict(pairs)) < len(pairs):
        raise ValueError(f"an object names a key twice: {', '.join(key for key, _ in pairs)}")
    return named


DECODER = json.JSONDecoder(object_pairs_hook=_named_once)


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
