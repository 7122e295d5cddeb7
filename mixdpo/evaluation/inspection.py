"""`mixdpo inspect`: what a run will make of its data, at the terminal and as a page, before anything is trained.

Numbers are computed here. `pages/inspect.html` has the words, once for the terminal and once for the page: the macros
of `pages/inspect_terminal.html` and `pages/inspect_page.html` give them their form.
"""

import argparse
import logging
import re
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
from rich.console import Console
from rich.text import Text

from mixdpo.batches.token_pool import turns
from mixdpo.data.ratings import find_margin_columns
from mixdpo.data.sources import open_source
from mixdpo.errors import InputError
from mixdpo.evaluation.cleaning_page import visible_units
from mixdpo.pages import template
from mixdpo.routing.route import Route, Routing
from mixdpo.storage.files import write_text

SHARES = (0.05, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Candidate shares of hard pairs, beside the config's, the suggested one and, if there are few, all between ties."""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The verb's options, with those of `mixdpo estimate` that decide its numbers, and the words for run.py."""
    what = "Print what a run will make of DATA, and write it as a page. Needs the base's tokenizer, no GPU, no weights."
    parser = argparse.ArgumentParser("mixdpo inspect", description=what, allow_abbrev=False)
    parser.add_argument("data", help="data.source: a file, folder or hub id; options of run.py fit may follow")
    parser.add_argument("--base", help="model.base: a hub id or a folder; the config's if not given")
    parser.add_argument("--config", action="append", help="of run.py; configs/own_pairs.yaml if not given")
    parser.add_argument("--out", help="the page to write; DATA.inspect.html in this folder if not given")
    fixed = argparse.Namespace(show=inspect_data, card=None, lengths=None, share=0.4)
    options, rest = parser.parse_known_args(arguments, fixed)
    logging.disable(logging.INFO)  # the page says it
    words = [f"--config={each}" for each in options.config or ["configs/own_pairs.yaml"]]
    words += [f"--data.source={options.data}", *([f"--model.base={options.base}"] if options.base else [])]
    return options, words + rest


def inspect_data(data: Any, estimate: Callable[[], dict[str, Any]], options: argparse.Namespace) -> None:
    """Print what a run will make of the rows of a data module, and write it as a page.

    Args:
        data: data module whose trainer is connected. Where its rows have no margin, its routing is set to need none.
        estimate: () -> memory and hours, as `mixdpo estimate` has them.
        options: of `parse`.

    Raises:
        InputError: the data cannot be read, encoded or split.
    """
    row: dict[str, Any] = next(open_source(data.source, data.split).rows, (0, "", {}))[2]
    columns = data.noun == "pair" and data.margins_file is None and find_margin_columns(row, data.margin, needed=False)
    if columns == () and data.routing.by_margin:
        data.routing, data.validation_threshold = Routing(hard_fraction=0, order="shuffled"), None
    data.setup("fit")
    splits = {name: _counts(getattr(data, f"{name}_pairs", table)) for name, table in data.tables.items()}
    memory: dict[str, Any] = {}
    try:
        memory = estimate()
    except InputError as error:  # says nothing about the data
        data.doubts.append(str(error))
    cuts = _cuts(data.route) if data.noun == "pair" and columns != () else None
    name = Path(str(data.source).strip("[]")).name
    scorer = getattr(getattr(data.trainer.lightning_module, "cleaning", None), "scorer", None)
    facts = {"title": name, "summary": [f"as {data.tokenizer} will see it"], "data": data, "row": row, "cuts": cuts}
    facts |= {"splits": splits, "memory": memory, "columns": columns, "scores": getattr(scorer, "column", None)}
    facts |= {"units": partial(_units, data.encoder), "percentiles": np.percentile, "turns": turns}
    render = template("inspect.html").render
    path = Path(options.out or f"{name}.inspect.html")
    write_text(path, visible(render(facts, layout="page.html", form="inspect_page.html")))
    # what the data says is escaped: no text of it is a tag
    pieces = re.findall("<([a-z ]+)>(.*?)</>", render(facts, layout=None, form="inspect_terminal.html"), re.DOTALL)
    Console(highlight=False).print(Text.assemble(*((visible(unescape(text)), style) for style, text in pieces)), end="")
    print(f"wrote {path}")


def visible(text: str) -> str:
    """The text with ▯ for each character that moves a terminal or turns text around."""
    return "".join("▯" if category(each)[0] == "C" and each != "\n" else each for each in text.replace("\t", "    "))


def _units(tokenizer: Any, ids: list[int]) -> list[tuple[str, bool]]:
    """Texts of the tokens, and whether the token is a special one."""
    known = set(tokenizer.all_special_ids)
    return [(text, bool(known.intersection(ids[start:end]))) for start, end, text in visible_units(tokenizer, ids)]


def _counts(rows: Any) -> dict[str, Any]:
    """What is counted in a split, and `tokens`: (N, texts) of each row."""
    names, keys, lengths = [name for name in rows.column_names if name.endswith("_ids")], [], []
    for part in rows.select_columns(names).with_format("numpy").iter(1000):
        for texts in zip(*(part[name] for name in names), strict=True):
            keys.append(tuple(hash(ids.tobytes()) for ids in texts))
            lengths.append([len(ids) for ids in texts])
    known = set(keys)
    counts = {"tokens": np.array(lengths), "repeated": len(keys) - len(known)}
    if len(names) > 1:
        margins = np.asarray(rows["margin"])
        times = np.unique(margins, return_counts=True)[1]
        counts |= {"prompts": len({key[0] for key in keys}), "zero": int((margins == 0).sum())}
        counts |= {"negative": int((margins < 0).sum())}
        counts |= {"tied": int(times[times > 1].sum()), "both": sum((prompt, b, a) in known for prompt, a, b in keys)}
    return counts


def _cuts(route: Route) -> dict[str, Any]:
    """Histogram of the margins, candidate cuts, and the one nearest to the config's share that no tie straddles."""
    margins, count, hard = np.sort(route.margins), len(route.margins), int(route.is_hard.sum())
    clipped = np.clip(route.margins, *np.quantile(margins, [0.005, 0.995]))
    edges = np.histogram_bin_edges(clipped, 20)
    bins = [np.histogram(clipped[which], edges)[0].tolist() for which in (~route.is_hard, route.is_hard)]
    clean = 1 + np.flatnonzero(np.diff(margins))
    wanted = hard if 0 < hard < count else round(0.1 * count)
    best = int(clean[np.abs(clean - wanted).argmin()]) if len(clean) else 0
    share = next(near for n in range(1, 10) if round((near := round(best / count, n)) * count) == best)
    few = clean.tolist() if len(clean) < 9 else []
    cuts = np.array(sorted({*(round(share * count) for share in SHARES), hard, best, *few} - {0, count}), dtype=int)
    below, to = (np.searchsorted(margins, margins[cuts], side) for side in ("left", "right"))
    rows = zip(cuts.tolist(), margins[cuts].tolist(), (to - below).tolist(), (cuts - below).tolist(), strict=True)
    counts = {"pairs": count, "hard": hard, "wanted": wanted, "best": best, "share": share, "rows": list(rows)}
    bars = list(zip(edges[:-1].tolist(), edges[1:].tolist(), *bins, strict=True))
    return counts | {"bins": bars, "most": int(np.add(*bins).max())}
