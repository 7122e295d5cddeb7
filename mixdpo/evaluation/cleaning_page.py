"""What the page of a run shows of token cleaning: stages, samples with each token coloured by its score."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from mixdpo.batches.token_pool import turns
from mixdpo.data.chat_template import Tokenizer
from mixdpo.token_cleaning.run_tokens import RunTokens, ScoredStage, read_cleaning


def cleaning_part(run: str, samples: int, seed: int) -> dict[str, Any]:
    """What token cleaning cut in a run, for the page: thresholds, kept shares, and samples token by token.

    Raises:
        InputError: `run` has no cleaning, its files do not fit together, or its tokenizer cannot be loaded.
    """
    from mixdpo.model.loading import load_tokenizer

    cleaning = read_cleaning(run)
    tokenizer = load_tokenizer(cleaning.tokenizer)
    kept, reached = (int(which.sum()) for which in (cleaning.weights > 0, ~np.isnan(cleaning.weights)))
    summary = f"{len(cleaning.pool.samples):,} samples with {len(cleaning.pool):,} response tokens; training has "
    summary += f"reached {reached:,} of these and kept {kept:,} ({kept / max(reached, 1):.1%})"
    last = cleaning.weights[cleaning.pool.offsets[1:] - 1][np.diff(cleaning.pool.offsets) > 0]
    return {
        "summary": summary,
        "ends": {"cut": int((last == 0).sum()), "reached": int((~np.isnan(last)).sum())},
        "stages": cleaning.stages,
        "scored": [stage.summary | {"title": _title(stage)} for stage in cleaning.scored_stages()],
        "samples": [_sample(cleaning, tokenizer, *example) for example in cleaning.examples(samples, seed)],
        "identity": cleaning.identity,
    }


def _title(stage: ScoredStage) -> str:
    return f"Stage {stage.summary['stage']}, from step {stage.summary['step']}"


def _sample(cleaning: RunTokens, tokenizer: Tokenizer, index: int, stage: ScoredStage) -> dict[str, Any]:
    """Title and parts of a sample: a text for context, a mapping for each shown piece of a response."""
    row, tokens = cleaning.pool.samples[index], slice(*cleaning.pool.offsets[[index, index + 1]])
    ids, weights = row["input_ids"], cleaning.weights[tokens]
    labels = list(zip(cleaning.scores[tokens].tolist(), weights.tolist(), strict=True))
    parts: list[Any] = []
    end = used = 0
    for first, last in turns(row["spans"]):
        parts.append(tokenizer.decode(ids[end:first]).strip())
        parts += _response(tokenizer, ids[first:last], labels[used : used + last - first], stage)
        end, used = last, used + last - first
    names = filter(None, [row["source"], f"row {row['row']}", f"sample {row['sample_id']}"])
    title = f"{_title(stage)}; {', '.join(names)}; {len(labels):,} response tokens, {(weights > 0).mean():.0%} kept"
    return {"title": title, "parts": [*parts, tokenizer.decode(ids[end:]).strip()]}


def _response(tokenizer: Tokenizer, ids: list[int], labels: list[Any], stage: ScoredStage) -> Iterator[dict]:
    """The pieces of a response. `labels`: (score, weight) of each of the `ids`."""
    for start, end, text in visible_units(tokenizer, ids):
        scores, weights = zip(*labels[start:end], strict=True)
        lines = [f"score {score:.4g}, weight {weight:.4g}" for score, weight in labels[start:end]]
        yield {
            "text": text.replace("\n", "↵\n"),
            "title": "\n".join([repr(text), *lines]),
            "strength": np.clip((np.mean(scores) - stage.centre) / (stage.reach or 1), -1, 1),
            "cut": 0 in weights,
        }


def visible_units(tokenizer: Tokenizer, ids: list[int]) -> Iterator[tuple[int, int, str]]:
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
