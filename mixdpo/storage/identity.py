"""What a file or checkpoint was made with, and how that differs from the current options and data."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from os.path import isfile
from typing import Any

from torch import nn

from mixdpo.errors import InputError
from mixdpo.storage.files import read_yaml, sha256


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any], within: str = "") -> list[str]:
    """One text for each key whose values differ in two mappings. None is the same as no key."""
    changed = []
    for key in {**recorded, **current}:
        old, new = recorded.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += differences(old, new, f"{within}{key}.")
        elif old != new:
            changed.append(f"{within}{key}: {old} there, {new} here")
    return changed


def refuse_other_run(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: a part of what the checkpoint was made with is different now; names each such part.
    """
    if changed := differences(recorded, current):
        raise InputError(f"the checkpoint belongs to another run ({'; '.join(changed)}): use the config.yaml beside it")


def named_files(values: Iterable[str]) -> dict[str, str]:
    """Hashes of the files and adapters that options name, or that a YAML file among these files names.

    Args:
        values: of options: paths or JSON. A name may hold spaces if the name is quoted or stands alone.

    Returns:
        Name -> 16 hex digits of the content.

    Raises:
        InputError: a YAML file is refused by `parse_yaml`.
    """
    values = list(values)
    for config in [value for value in values if value.endswith((".yaml", ".yml")) and isfile(value)]:
        values.append(json.dumps(read_yaml(config), ensure_ascii=False, default=str))  # comments name nothing
    patterns = (".+", r'(?<=")[^"]+(?=")', r'[^\s"\[\]{},]+')
    words = {word for value in values for pattern in patterns for word in re.findall(pattern, value)}
    files = {word: path for word in words for path in (f"{word}/adapter_model.safetensors", word) if isfile(path)}
    return {word: sha256(files[word])[:16] for word in sorted(files)}


def content_hash(texts: Iterable[Any]) -> str:
    """16 hex digits of the reprs of the texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(repr(text).encode())
    return digest.hexdigest()[:16]


def hash63(text: str) -> int:
    """First 8 bytes of sha256, shifted into a non-negative int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def described(thing: Any) -> str:
    """Class and attributes of an object, as text that is the same in every process.

    The repr alone would not do: the default one holds an address, and a module's leaves out its attributes."""
    text = repr(thing).removeprefix("LazyInstance_")  # a default that YAML may override is a subclass of what it is for
    is_module, kind = isinstance(thing, nn.Module), type(thing)
    if kind.__repr__ is object.__repr__ or (is_module and kind.extra_repr is nn.Module.extra_repr):
        held = {name: value for name, value in getattr(thing, "__dict__", {}).items() if name not in vars(nn.Module())}
        text = f"{text if is_module else kind.__qualname__}({held})"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def refuse_changed(recorded: Mapping[str, str], current: Mapping[str, str], what: str) -> None:
    """
    Raises:
        InputError: scores or masks were made with other data, tokenizer, template or lengths; names each that differs.
    """
    # if another part changed, the ids changed because of it
    if changed := differences({**recorded, "ids": None}, {**current, "ids": None}) or differences(recorded, current):
        raise InputError(f"{what} was made with other options ({'; '.join(changed)}): use these, or score anew")
