"""Any place that pairs can come from -> numbered raw rows: hub id, local folder or file, or the built-in task."""

import csv
import gzip
import hashlib
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixdpo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


NumberedRows = Iterator[tuple[int, dict[str, Any]]]


BUILT_IN = {"constraints": "constraints_pairs.jsonl", "heldout": "constraints_heldout.jsonl"}


HUB_FILE = "hf://datasets/"


DATA_FILE = re.compile(r"\.(parquet|(jsonl?|csv)(\.gz)?)$")


HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


KEPT = "surrogateescape"  # bytes that are no UTF-8 stay in the text, for the row that holds them to be named


REMEDIES: dict[Any, str] = {
    UnicodeDecodeError: "Save the file as UTF-8",
    (OSError, EOFError, zlib.error): "The file is cut off, damaged or of another kind: copy or make it again",
}


# A csv field may not exceed 128 kB by default; a long completion does.
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True)
class Source:
    """Rows of one source, numbered from 1, and its name for error messages."""

    name: str
    key: str  # changes whenever the content does
    rows: NumberedRows


def open_source(source: str, split: str) -> Source:
    if not source.strip():
        raise InputError("the source is empty: give a hub id, a folder or a file")
    if source.startswith(HUB_FILE):
        return _open_file(_from_hub(source), split)
    path = Path(str(files("mixdpo") / "constraints" / BUILT_IN[source]) if source in BUILT_IN else source).expanduser()
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        return _open_file(path, split)
    if DATA_FILE.search(source) or source in BUILT_IN or not HUB_ID.fullmatch(source):
        raise InputError(f"no file or folder {str(path)!r} (looked from {Path.cwd()}). Check the path.")
    hint = (
        f" It is no local path and no built-in task ({', '.join(BUILT_IN)}), so it was sought on the hub. One of "
        "several configurations is written ID:CONFIG, one file hf://datasets/OWNER/NAME/FILE."
    )
    return _through_datasets(f"{source!r}, split {split!r}", "", hint, *source.split(":"), split=split)


def is_one_file(source: str) -> bool:
    return source in BUILT_IN or source.startswith(HUB_FILE) or bool(DATA_FILE.search(source))


def _from_hub(source: str) -> Path:
    """One file of a data set: some are no data set that `datasets` would load (AlpacaEval's is a script)."""
    from huggingface_hub import hf_hub_download

    owner, _, rest = source.removeprefix(HUB_FILE).partition("/")
    name, _, file = rest.partition("/")
    if not file:
        raise InputError(f"{source} names no file: write {HUB_FILE}OWNER/NAME/FILE")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as error:  # connection, authentication, no such file: an open list
        raise InputError(f"{source} cannot be read: {type(error).__name__}: {str(error).strip()[:300]}") from error


def _open_file(path: Path, split: str) -> Source:
    if not DATA_FILE.search(path.name):
        raise InputError(f"{path}: can be .parquet, .json, .jsonl or .csv; the last three also with .gz.")
    if split != "train":
        raise InputError(f"{path} is one file and has no split {split!r}: use 'train', or name the file that holds it.")
    with path.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()
    if path.suffix != ".parquet":
        return Source(str(path), key, text_rows(path))
    return _through_datasets(
        str(path), key, "", "parquet", data_files=str(path), split=split, cache_dir=_cache_dir(key)
    )


def _open_folder(path: Path, split: str) -> Source:
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.rglob("*"))]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()

    name, hint = f"{path}, split {split!r}", " Of several configurations name the folder or the file of one."
    if not any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _through_datasets(name, key, hint, str(path), split=split, cache_dir=_cache_dir(key))
    return _through_datasets(name, key, hint, str(path), split, load=_load_saved)


def _load_saved(path: str, split: str) -> "Dataset":
    """Of what `save_to_disk` wrote."""
    from datasets import load_from_disk

    saved = load_from_disk(path)
    splits = saved if isinstance(saved, dict) else {"train": saved}
    if split not in splits:
        raise InputError(f"the splits are {', '.join(splits)}")
    return splits[split]


def _load(*names: str, **options: Any) -> "Dataset":
    import datasets

    return datasets.load_dataset(*names, trust_remote_code=False, **options)


def _through_datasets(
    name: str, key: str, hint: str, *arguments: str, load: Callable[..., "Dataset"] = _load, **options: Any
) -> Source:
    try:
        table = load(*arguments, **options)
    except Exception as error:  # connection, authentication, unknown split, broken file: an open list
        root = error.__cause__ or error
        raise InputError(f"{name} cannot be read: {type(root).__name__}: {str(root).rstrip('.')}.{hint}") from error
    return Source(name, f"{key} {table._fingerprint}", enumerate(table, 1))


def _cache_dir(key: str) -> str:
    """One cache per content: `datasets` would trust a local file's cache while its modification time agrees."""
    import datasets

    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"mixdpo-{key[:16]}")


def text_rows(path: Path) -> NumberedRows:
    """Rows of a json, json-lines or csv file. Lines are decoded singly, so that a fault is named by its own row."""
    number = 0
    kind = DATA_FILE.search(path.name)
    read = _csv_rows if kind and kind[2] == "csv" else _json_rows
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, row in read(file):
                if row is not None:
                    yield number, row
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        remedy = next((text for kinds, text in REMEDIES.items() if isinstance(error, kinds)), "Correct or remove it")
        where = f"{path}, row {number + 1}"
        raise InputError(f"{where}: cannot be read: {type(error).__name__}: {str(error)[:300]}. {remedy}.") from error


def _json_rows(lines: Iterable[bytes]) -> NumberedRows:
    """One object a line, or one list of objects over the whole file. A blank line is None, to keep the count."""
    lines, begun = iter(lines), False
    for number, line in enumerate(lines, 1):
        if not begun and line.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            yield 0, None  # a list counts its own rows
            yield from _json_list((line + b"".join(lines)).decode("utf-8-sig", KEPT))
        elif not (text := line.decode("utf-8-sig")).strip():
            yield number, None
        else:
            begun = True
            yield number, _json_object(DECODER.decode(text))


def _json_list(text: str) -> NumberedRows:
    """Objects of a list one after the other (`json.loads` of the whole could not say which one is broken)."""
    decode, skip = DECODER.raw_decode, re.compile(r"\s*").match
    at, number = skip(text, text.index("[") + 1).end(), 0
    while text[at : at + 1] != "]":
        number += 1
        start, (row, at) = at, decode(text, at)
        text[start:at].encode(errors=KEPT).decode()  # what is no UTF-8 is the fault of this row
        yield number, _json_object(row)
        at = skip(text, at).end()
        if text[at : at + 1] not in (",", "]"):
            raise ValueError("a comma or the closing ] of the list is missing before it")
        at = skip(text, at + (text[at] == ",")).end()
    if text[at + 1 :].strip():
        raise ValueError("text follows the closing ] of the list")


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
