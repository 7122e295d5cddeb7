"""Configs that come with MixDPO: configs/ of a clone, mixdpo/configs/ of an installed package."""

import re
from collections.abc import Sequence
from os.path import exists, isdir, isfile
from pathlib import Path

from mixdpo.errors import InputError, nearest
from mixdpo.storage.files import read_text

_PACKAGE = Path(__file__).parents[1]
SHIPPED = next(each for each in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if each.is_dir())


def shipped_names() -> list[str]:
    """demo, …, then controls/blend, …: those of a folder follow each other."""
    names = [str(path.relative_to(SHIPPED).with_suffix("")) for path in SHIPPED.rglob("*.yaml")]
    return sorted(names, key=lambda name: name.rpartition("/")[::2])


def find_config(name: str) -> str:
    """The path of a config: NAME or NAME.yaml if it is a file (or YAML text), otherwise the shipped configs/NAME.yaml.

    Raises:
        InputError: there is neither.
    """
    if (exists(name) and not isdir(name)) or not re.fullmatch(r"[\w./~][\w./~+-]*", name):
        return name
    if isfile(f"{name}.yaml"):
        return f"{name}.yaml"
    short, names = re.sub(r"^configs/|\.ya?ml$", "", name), shipped_names()
    if short not in names:
        alike = [each for each in names if each.endswith(f"/{short}")]
        meant = f"; did you mean {alike[0]!r}?" if alike else nearest(short, names)
        raise InputError(f"there is no config {name}, neither in {Path.cwd()} nor in `mixdpo configs`{meant}")
    return str(SHIPPED / f"{short}.yaml")


def find_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments, with a path for each `--config NAME`, `--config=NAME` and `-c NAME`; raises as `find_config`."""
    text, option = "\0".join(["", *arguments]), r"(?<=\0)(?:-c|--config)([\0=])([^\0]*)"
    return re.sub(option, lambda found: f"--config{found[1]}{find_config(found[2])}", text).split("\0")[1:]


def configs() -> None:
    """Print the configs that come with MixDPO, each with the first line of its comment. --config takes their names."""
    first = {name: read_text(SHIPPED / f"{name}.yaml").splitlines()[0].removeprefix("# ") for name in shipped_names()}
    print(*(f"{name:32} {line}" for name, line in first.items()), sep="\n")
