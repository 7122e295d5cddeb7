"""A first look at a command line, before torch is imported: a misspelt name is refused at once, and help is printed.

option_names.json has the names. What they do not decide, such as an option of a user's own class, is for the parser.
"""

import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from mixdpo.errors import InputError, check_one_of, nearest
from mixdpo.options import BY_NAME, HELP, ROOMS, nearest_option, nearest_path, option_names
from mixdpo.storage.files import read_text
from mixdpo.storage.read import parse_yaml
from mixdpo.storage.shipped import find_configs

# of verbs: what the first word is
FIRST = {"options": "--name", "inspect": "--data.source"}
FIRST |= dict.fromkeys(("estimate", "cross-fit", "compare"), "--config")
SOURCES = (*ROOMS, "lightning", "torch/optim")
# neither null, a truth value nor a number
WORD = re.compile(r"(?!(?i:null|none|true|false|yes|no|on|off|0x[\da-f]+|[\d._]+(e[\d+-]*)?)$)\w[\w.-]*")


def bare_config(arguments: list[str]) -> list[str]:
    """`VERB CONFIG …`, also where `VERB --config CONFIG …` was typed, which is how `fit` takes its config."""
    is_bare = arguments[1:2] == ["--config"] and FIRST.get(arguments[0]) == "--config"
    return arguments[:1] + arguments[1 + is_bare :]


def first_look(arguments: list[str]) -> list[str]:
    """The arguments of `run.py` for the full parser. Ends the process with a message about a misspelt name, or with the
    help of often used options and of what a config sets; `--help --all` is the full parser's."""
    arguments = bare_config(arguments)
    verb, *rest = arguments if arguments and not arguments[0].startswith("-") else ("fit", *arguments)
    try:
        check_one_of("the first word (a config file needs --config before it)", verb, option_names()["run"])
        lines = FirstLook(verb, *rest).lines
    except InputError as error:
        sys.exit(f"error: {error} ({HELP})")
    if {"-h", "--help"}.intersection(rest) and "--all" not in rest and (lines or verb == "fit"):
        print(*lines, (Path(__file__).parent / "help.txt").read_text("utf-8"), sep="\n", end="")
        sys.exit()
    return [word for word in arguments if word != "--all"]


class FirstLook:
    """Follows options as the full parser does.

    Attributes:
        chosen: class by option; "" if the class is not known.
        lines: option, value and meaning of each option that is given.

    Raises:
        InputError: an option, a class or the value of an enumeration is misspelt, or a config is no YAML.
    """

    def __init__(self, verb: str, *arguments: str) -> None:
        self.options = (known := option_names())["verbs"].get(verb) or known["run"][verb]
        if verb not in known["verbs"] or verb == "compare":
            self.options = known["run"]["fit"] | self.options
        self.chosen, self.lines = dict[str, str](), list[str]()
        words = find_configs([*([FIRST[verb]] if verb in FIRST else []), *arguments])
        for word, following in pairwise([*words, ""]):
            option, is_joined, text = word.partition("=")
            value: Any = text if is_joined else following
            if option == "--config":
                text = read_text(value) if value.endswith((".yaml", ".yml", ".json")) else value
                value = parse_yaml(text, f"config {value}", finite=False)
            if re.match(r"--(?!(help|all|\S+\.help)$)\w[^\s=]*$", option):
                self._set(option[2:], value)

    def _set(self, option: str, value: Any) -> None:
        option = re.sub(r"\+|(^config|\.class_path|\.init_args)(?=\.|$)", "", option).lstrip(".")
        if isinstance(value, dict) and value:
            for key in sorted(value, key=lambda key: key != "class_path"):
                self._set(f"{option}.{key}", value[key])
        elif isinstance(value, list) and dict in map(type, value):
            for each in value:
                self._set(option, each)
        else:
            name, known = self._find(option, option, self.options)
            if "class" in known and isinstance(value, str):
                self._choose(option, name, value)
            choices = known.get("one_of", [value])
            if value not in choices and WORD.fullmatch(str(value)):
                refuse(value, f"{name}: Expected a typing.Literal{choices}, not {value}{nearest(value, choices)}")
            self.lines += [f"  --{option} {value}\n      {known.get('says', '')}".rstrip()] * bool(option)

    def _find(self, option: str, name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The option's name in the class that has it, and what is known of it."""
        part = max((each for each in options if f"{name}.".startswith(f"{each}.")), key=len, default="")
        known, rest = options.get(part, {}), name.removeprefix(part).lstrip(".")
        if part == name or "open" in known:
            return name, known
        if "class" not in known:
            refuse(rest.partition(".")[0], f"Option '{name}' is not accepted{nearest_option(name, options)}")
        inner = option_names()["classes"].get(self.chosen.get(option.removesuffix(f".{rest}"), known.get("class")))
        return self._find(option, rest, inner) if known and inner and rest[:11] != "dict_kwargs" else (name, {})

    def _choose(self, option: str, name: str, path: str) -> None:
        (room, _, kind), homes = path.rpartition("."), option_names()["homes"]
        is_listed = room.partition(".")[0] in ROOMS or room in BY_NAME or (not room and nearest_path(path))
        if is_listed and path not in homes and WORD.fullmatch(path):
            refuse(path if kind in homes else kind, f"{name}: there is no class {path}{nearest_path(path)}")
        # what was set below an earlier class may go over to this one
        self.chosen |= {k: "" for k in self.chosen if k.startswith(f"{option}.")} | {option: homes.get(path, "")}


def refuse(word: str, message: str) -> None:
    """
    Raises:
        InputError: the message, unless a source defines the word: it is newer than the table then.
    """
    pattern = re.compile(rf"\b{re.escape(word)}: |[\"']{re.escape(word)}[\"']|(class|def) {re.escape(word)}\b")
    places = [Path(str(root), place) for root in (*sys.path, Path(__file__).parents[1]) for place in SOURCES]
    if not any(pattern.search(file.read_text("utf-8")) for place in places for file in place.rglob("*.py")):
        raise InputError(message)
