"""HTML pages from the templates in this folder. Every value is escaped."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mixdpo.storage.files import written_whole


def write_page(path: Path, template: str, **content: Any) -> None:
    """Write one page, whole or not at all, and print its path.

    Args:
        path: the .html file, replaced if it exists.
        template: name of a file in this folder, which extends page.html.
        content: what the template shows: plain values.
    """
    environment = Environment(loader=PackageLoader("mixdpo", "pages"), autoescape=True, undefined=StrictUndefined)
    environment.filters["number"] = _number
    text = environment.get_template(template).render(content)
    with written_whole(path) as partial:
        partial.write_text(text, "utf-8")
    print(f"wrote {path}")


def _number(value: float | None, form: str) -> str:
    """The value in a format such as {:.1%}; a dash for None and NaN."""
    return "–" if value is None or value != value else form.format(value)
