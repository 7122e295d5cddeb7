"""The templates of HTML pages. Every value is escaped."""

import re

from jinja2 import Environment, PackageLoader, StrictUndefined

template = Environment(loader=PackageLoader("mixdpo", "pages"), autoescape=True, undefined=StrictUndefined).get_template


def public(text: str) -> str:
    """The text without the passwords, tokens and queries of its URLs."""
    return re.sub(r"(\w://)(?:[^/@\s]+@)?([^\s?'\"]*)(?:\?[^\s'\",}\]]*)?", r"\1\2", text)
