"""A token-cleaning run as one web page: stages, score histograms, samples with each token coloured by its score."""

from collections.abc import Iterable, Iterator
from html import escape
from importlib.resources import files
from itertools import islice
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from mixdpo.batches.token_pool import turns
from mixdpo.errors import InputError
from mixdpo.storage.files import written_whole
from mixdpo.token_cleaning.run_tokens import RunTokens, ScoredStage, read_cleaning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


Stage = dict[str, Any]


BLUE, ORANGE = np.array([66, 146, 222]), np.array([246, 140, 50])  # light enough to carry black text


COUNT, SHARE, NUMBER = "{:,}", "{:.1%}", "{:.3g}"


COLUMNS = {"step": COUNT, "samples": COUNT, "tokens": COUNT, "kept_share": SHARE, "threshold": NUMBER, "ties": COUNT}


COLUMNS |= {"ties_kept": COUNT, "samples_keeping_nothing": COUNT, "mean_abs_score": NUMBER, "planted_share": SHARE}


COLUMNS |= {f"planted_{key}": NUMBER for key in ("auc", "precision", "recall")} | {"planted_kept_noise_rate": SHARE}


PAGE = """<h2>Stages</h2><div class="card wide">{stages}</div>{parts}
<h2>Samples</h2><div class="card legend"><span>low <i class="scale"></i> high score; white at the threshold</span>
<span><b class="token dropped">cut</b>: no label, stays in the context</span>
{planted}<span class="context">grey: context, never trained on</span>
<div class="quiet">Point at a token for its score and weight. ↵ is a line break, ▯ a part of a character.</div></div>
{samples}
<details class="quiet"><summary>What the scores depend on</summary><code>{identity}</code></details>
"""


PLANTED_KEY = '<span><b class="token planted">noise</b>: planted on purpose</span>'


HISTOGRAM_TITLE = """<p class="quiet">Tokens by score, <b class="token" style="background:var(--blue)">kept</b> on
<b class="token" style="background:var(--orange)">cut</b>; the outermost bars hold all beyond, 1 % a side</p>"""


def report(run: str, out: str | None = None, samples: int = 12, seed: int = 0) -> None:
    """Write a page that shows what token cleaning cut: thresholds, score histograms, and samples token by token.

    Two margins files are compared instead: `mixdpo report A.margins B.margins [--out PAGE.html]`.

    Args:
        run: folder of a run with token cleaning.
        out: the .html file to write, replaced if it exists; default report.html in `run`.
        samples: number of samples to show, spread over stages and sources.
        seed: of the choice of samples.

    Raises:
        InputError: `run` has no cleaning, its files do not fit each other, or its tokenizer is not found.
    """
    from mixdpo.model.loading import load_tokenizer

    if samples < 0:
        raise InputError(f"samples {samples}: need at least 0")
    cleaning = read_cleaning(run)
    body = _body(cleaning, load_tokenizer(cleaning.tokenizer), samples, seed)
    kept, reached = (int(which.sum()) for which in (cleaning.weights > 0, ~np.isnan(cleaning.weights)))
    summary = f"{len(cleaning.pool.samples):,} samples with {len(cleaning.pool):,} response tokens; training has "
    summary += f"reached {reached:,} of these and kept {kept:,} ({kept / max(reached, 1):.1%})"
    path = Path(out) if out else Path(run) / "report.html"
    write_page(path, f"Token cleaning: {escape(Path(run).resolve().name)}", summary, body)


def write_page(path: Path, title: str, summary: str, body: str) -> None:
    shell = Template((files("mixdpo") / "pages" / "page.html").read_text("utf-8"))
    with written_whole(path) as partial:
        partial.write_text(shell.substitute(title=title, summary=summary, body=body), "utf-8")
    print(f"wrote {path}")


def _body(cleaning: RunTokens, tokenizer: "Tokenizer", samples: int, seed: int) -> str:
    cards = (_sample_card(cleaning, tokenizer, *example) for example in cleaning.examples(samples, seed))
    return PAGE.format(
        stages=_stage_table(cleaning.stages),
        parts="".join(_stage_card(cleaning, stage) for stage in cleaning.scored_stages()),
        planted=PLANTED_KEY if "planted" in cleaning.pool.samples.column_names else "",
        samples="".join(cards) or "<p>No scored sample is shown.</p>",
        identity="\n".join(escape(f"{key}: {value}") for key, value in cleaning.identity.items()),
    )


def _stage_table(stages: list[Stage]) -> str:
    flat = [stage | {f"planted_{key}": value for key, value in stage.get("planted", {}).items()} for stage in stages]
    columns = {key: form for key, form in COLUMNS.items() if any(key in stage for stage in flat)}
    rows = [
        [f"{stage['stage']}{'' if stage['scorer'] else ': all tokens'}"]
        + [_number(stage.get(key), form) for key, form in columns.items()]
        for stage in flat
    ]
    return table(["stage", *(key.replace("_", " ") for key in columns)], rows)


def _title(stage: ScoredStage) -> str:
    return f"Stage {stage.facts['stage']}, from step {stage.facts['step']}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else form.format(value)


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{heading}</th>' for heading in headings)}</tr>{body}</table>"


def _bar(share: float | None) -> str:
    return f'{_number(share, SHARE)}<i class="bar" style="--share:{share or 0:.1%}"></i>'


def _stage_card(cleaning: RunTokens, stage: ScoredStage) -> str:
    facts = stage.facts
    positions = [[str(i + 1), _bar(share)] for i, share in enumerate(facts["by_position"])]
    sources = [
        [escape(name), f"{of['tokens']:,}", _bar(of["kept_share"])] for name, of in sorted(facts["by_source"].items())
    ]
    columns = [
        HISTOGRAM_TITLE + _histogram(*cleaning.scored_tokens(stage.samples), stage),
        table(["tenth of the response", "kept"], positions),
        table(["source", "tokens", "kept"], sources),
    ]
    rule = escape(f"{facts['scorer']} → {facts['selection']}")
    content = f'<code>{rule}</code><div class="columns"><div>{"</div><div>".join(columns)}</div></div>'
    return f'<div class="card"><h3>{_title(stage)}</h3>{content}</div>'


def _histogram(scores: np.ndarray, weights: np.ndarray, stage: ScoredStage, bins: int = 60) -> str:
    if not len(scores):
        return "<p>No token is scored.</p>"
    low, high = min(np.quantile(scores, 0.01), stage.centre), max(np.quantile(scores, 0.99), stage.centre)
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts = [np.histogram(np.clip(scores[which], low, edges[-1]), edges)[0] for which in (~(weights > 0), weights > 0)]
    tops = np.cumsum([np.zeros(bins), *counts], axis=0) * 122 / np.sum(counts, axis=0).max()
    parts, step = [], 350 / bins
    for kind, lower, upper in (("cut", *tops[:2]), ("kept", *tops[1:])):
        for x, bottom, top in zip(5 + step * np.arange(bins), lower, upper, strict=True):
            size = f'width="{step - 0.5:.1f}" height="{top - bottom:.1f}"'
            parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{140 - top:.1f}" {size}/>' if top > bottom else "")
    if (threshold := stage.facts["threshold"]) is not None:
        place = 5 + 350 * (threshold - low) / (edges[-1] - low)
        parts += [_label(place, 9, f"threshold {threshold:.3g}"), f'<path class="mark" d="M{place:.1f} 12V140"/>']
    parts += [_label(x, 153, f"{edges[i]:.3g}") for x, i in ((5, 0), (180, bins // 2), (355, bins))]
    return f'<svg viewBox="0 0 360 157" role="img">{"".join(parts)}<path d="M5 140.5H355"/></svg>'


def _label(x: float, y: float, text: str) -> str:
    anchor = "start" if x < 60 else "end" if x > 300 else "middle"
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _sample_card(cleaning: RunTokens, tokenizer: "Tokenizer", index: int, stage: ScoredStage) -> str:
    row, tokens = cleaning.pool.samples[index], slice(*cleaning.pool.offsets[[index, index + 1]])
    ids, weights = row["input_ids"], cleaning.weights[tokens]
    planted = row.get("planted") or [0] * len(weights)
    facts = list(zip(cleaning.scores[tokens].tolist(), weights.tolist(), planted, strict=True))
    parts, end, used = [], 0, 0
    for first, last in turns(row["spans"]):
        parts += [_context(tokenizer, ids[end:first])]
        parts += _response(tokenizer, ids[first:last], facts[used : used + last - first], stage)
        end, used = last, used + last - first
    title = escape(f"{_title(stage)}; {row['source']}, row {row['row']}, sample {row['sample_id']}")
    title += f"; {len(facts):,} response tokens, {(weights > 0).mean():.0%} kept"
    text = "".join([*parts, _context(tokenizer, ids[end:])])
    return f'<div class="card"><p class="quiet">{title}</p><div class="text">{text}</div></div>'


def _context(tokenizer: "Tokenizer", ids: list[int]) -> str:
    text = tokenizer.decode(ids).strip()
    shown = escape(" ".join(text.split()))
    if len(text) > 300:
        shown = f"<details><summary>{escape(text[:160])} … {escape(text[-80:])}</summary>{escape(text)}</details>"
    return f'<div class="context">{shown}</div>' if text else ""


def _response(tokenizer: "Tokenizer", ids: list[int], facts: list[Any], stage: ScoredStage) -> Iterator[str]:
    """`facts`: (score, weight, planted) of each of the `ids`."""
    for start, end, text in visible_units(tokenizer, ids):
        scores, weights, planted = zip(*facts[start:end], strict=True)
        names = f"token{' dropped' * (0 in weights)}{' planted' * any(planted)}"
        style = f"background:{_colour(np.mean(scores), stage)}"
        lines = [f"score {s:.4g}, weight {w:.4g}{', planted noise' * p}" for s, w, p in facts[start:end]]
        title = escape("\n".join([repr(text), *lines]))
        shown = escape(text.replace("\n", "↵\n"))
        yield f'<span class="{names}" style="{style}" title="{title}">{shown}</span>'


def _colour(score: float, stage: ScoredStage) -> str:
    if np.isnan(score):
        return "none"
    strength = np.clip((score - stage.centre) / (stage.reach or 1), -1, 1)
    mixed = 255 + abs(strength) * ((BLUE if strength > 0 else ORANGE) - 255)
    return "#" + bytes(mixed.round().astype(np.uint8)).hex()


def visible_units(tokenizer: "Tokenizer", ids: list[int]) -> Iterator[tuple[int, int, str]]:
    """(start, end, text): the tokens start … end - 1 together make whole characters; ▯ where none do.

    A byte-level tokenizer splits a character over tokens, each of which decodes to U+FFFD.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)  # some tokenizers drop the space before a first token
    before, start = len(tokenizer.decode(anchor)), 0
    while start < len(ids):
        whole = ((end, tokenizer.decode(anchor + ids[start:end])[before:]) for end in range(start + 1, len(ids) + 1))
        end, text = next(((end, text) for end, text in islice(whole, 8) if "\ufffd" not in text), (start + 1, "▯"))
        yield start, end, text
        start = end
