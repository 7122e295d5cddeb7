"""Two options that exclude each other: the one from the later place on the command line counts."""

import os
from itertools import pairwise
from typing import Any

from mixdpo.errors import InputError
from mixdpo.storage.files import read_text
from mixdpo.storage.read import parse_yaml

# group of options -> the option in the group that cannot be given together with `threshold`
SHARES = {"data.init_args.routing": "hard_fraction", "model.init_args.cleaning.selection": "keep_ratio"}


def last_places(arguments: list[str]) -> dict[str, int]:
    """The number of the last place that gives each option a value other than null, as {"data.routing.order": 2}.

    Each config is a place, and so are the options before, between and after configs.

    Raises:
        InputError: a config is no YAML, or no mapping. jsonargparse would name the option, but not the file.
    """
    places: dict[str, int] = {}
    number = 0
    for word, after in pairwise([*arguments, ""]):
        option, _, value = word.partition("=") if "=" in word else (word, "", after)
        if not option.startswith("-"):
            continue
        is_config = option in ("-c", "--config")
        is_group = any(f"--{_short(group)}.".startswith(f"{_short(option)}.") for group in SHARES)
        is_file = (is_config or is_group) and os.path.isfile(value)
        try:
            content = parse_yaml(read_text(value) if is_file else value, f"config {value}", finite=False)
        except InputError:
            if is_file:
                raise
            continue  # jsonargparse refuses the value, or takes it as text
        if is_file and not isinstance(content, dict):
            raise InputError(f"config {value} should be a mapping of options, not a {type(content).__name__}")
        number += is_config
        given = _leaves(content, "" if is_config else f".{option.lstrip('-')}")
        places |= {name: number for name, leaf in given.items() if leaf is not None}
        number += is_config
    return places


def keep_latest(config: Any, places: dict[str, int]) -> None:
    """Set to null the one that an earlier place gives."""
    for group, share in SHARES.items():
        names = [f"{group}.threshold", f"{group}.{share}"]
        threshold, other = (places.get(_short(name), -1) for name in names)
        if None not in map(config.get, names) and threshold != other:
            config[names[threshold > other]] = None


def _short(name: str) -> str:
    return name.replace(".init_args", "")


def _leaves(tree: Any, name: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {_short(name)[1:]: tree}
    return {path: leaf for key, inner in tree.items() for path, leaf in _leaves(inner, f"{name}.{key}").items()}
