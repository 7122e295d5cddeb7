"""README and docs: lengths of page, sentence and table row. `python tests/test_prose.py [FILE …]` prints breaches."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": 200} | {f"docs/{page.name}": 199 for page in sorted((ROOT / "docs").glob("*.md"))}


def paragraphs(text: str) -> list[str]:
    """Prose without code and tables; a list item or heading is a paragraph, a link its text, inline code one word."""
    text = re.sub(r"(?ms)^ *(```|~~~).*?^ *\1|<!--.*?-->", "\n\n", text)
    text = re.sub(r"(?m)^\|.*", "\n", text)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`+[^`]+`+", "code", text))
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*>#]|\d+\.)\s)|(?<=\n)(?=#)", text)
    return [" ".join(block.split()) for block in blocks if block]


def sentences(text: str) -> list[str]:
    return [part for block in paragraphs(text) for part in re.split(r"(?<=[.!?])[*)\"”]*\s+(?=\S)", block)]


def breaches(page: str, limit: int) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    lines = text.splitlines()
    found = [f"{page}: {len(lines)} lines, at most {limit}"] if len(lines) > limit else []
    long_rows = [(n, row) for n, row in enumerate(lines, 1) if row.startswith("|") and len(row) > 100]
    found += [f"{page}:{n}: a table row of {len(row)} characters, at most 100: {row[:60]}…" for n, row in long_rows]
    long_sentences = [each for each in sentences(text) if len(re.findall(r"\S*\w\S*", each)) > 30]
    return found + [f"{page}: {len(each.split())} words, at most 30: {each}" for each in long_sentences]


@pytest.mark.parametrize("page", PAGES)
def test_prose_can_be_skimmed(page: str) -> None:
    assert not breaches(page, PAGES[page])


def anchors(page: Path) -> set[str]:
    """GitHub's, of the headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    lost = []
    for page in map(ROOT.joinpath, (*PAGES, "CHANGELOG.md", "CONTRIBUTING.md")):
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                lost.append(f"{page.name}: {link}")
    assert not lost


def test_counting() -> None:
    words = "word " * 30
    text = f"A list:\n- one `a b c` two.\n- {words}end. Next\n\n```\n{words * 2}\n```\n| {words} |\n"
    assert sentences(text) == ["A list:", "- one code two.", f"- {words}end.", "Next"]


if __name__ == "__main__":
    for page in sys.argv[1:] or PAGES:
        print(*breaches(page, PAGES.get(page, 199)), sep="\n")
