"""The strict reader of every JSON and YAML text from outside: configs, studies, files of rows, bodies of a server."""

import json
import math
import re
from statistics import mode
from typing import Any

import yaml

from mixdpo.errors import InputError


def parse_json(text: str | bytes, where: str, remedy: str = "correct it") -> Any:
    """
    Args:
        where: name of the text in errors: a file, a line of a file, a server's response.
        remedy: end of the error: what to do about a refused text.

    Raises:
        InputError: the text is no JSON in UTF-8, is nested too deeply, or holds a key twice or a number that is not
            finite.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply: {remedy}") from None
    except ValueError as error:
        raise InputError(f"{where} is no valid JSON ({error}): {remedy}") from None


def unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that refuses, by a ValueError, a key that stands twice."""
    content = dict(items)
    if len(content) < len(items):
        raise ValueError(f"the key {mode(key for key, _ in items)!r} stands twice")
    return content


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is no finite number")
    return value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads 1e-4 as a number, as YAML 1.2 does, and a date as text."""


INT, FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("int", "float"))
_FLOAT = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
_NUMBER = re.compile(rf"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)$|{_FLOAT}")
_Loader.add_implicit_resolver(FLOAT, re.compile(_FLOAT), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)


def parse_yaml(text: str, where: str, *, finite: bool = True) -> Any:
    """
    Args:
        where: name of the text in errors: config FILE, study FILE.
        finite: refuse NaN and infinite numbers.

    Raises:
        InputError: the text is no YAML; or it holds a key twice, a key that is a list or mapping, or a value such as
            1_0 or 1:30, which YAML 1.1 and 1.2 read differently.
    """
    try:
        loader = _Loader(text)
        if (node := loader.get_single_node()) is None:
            return None
        _check_nodes(node, finite)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where} is no valid YAML ({' '.join(str(error).split())}): correct it") from None


def _refused(what: str, node: yaml.Node) -> ValueError:
    return ValueError(f"{what}, line {node.start_mark.line + 1}")


def _check_nodes(root: yaml.Node, finite: bool) -> None:
    nodes, seen = [root], {root}
    for node in nodes:
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node, finite)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            inner = [each for item in node.value for each in item]
        nodes += [each for each in inner if each not in seen]
        seen.update(inner)  # an alias may stand for a list that it is in


def _check_scalar(node: yaml.ScalarNode, finite: bool) -> None:
    if node.tag in (INT, FLOAT) and not _NUMBER.match(node.value):
        raise _refused(f"{node.value} is a number or a text: write digits only, or put the text in quotes", node)
    if finite and node.tag == FLOAT and (node.value.lower().endswith(("inf", "nan")) or math.isinf(float(node.value))):
        raise _refused(f"{node.value} is no finite number", node)


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused("a key is a list or a mapping", key)
        if first := lines.get((key.tag, key.value)):
            raise _refused(f"the key {key.value!r} stands twice, in line {first} and again", key)
        lines[key.tag, key.value] = key.start_mark.line + 1
