"""Margins files: made by `run.py predict`, continued, refused, used by fit, compared by `mixdpo compare-margins`."""

import itertools
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
from conftest import build, collate, make_pairs, make_trainer, write_pairs
from test_cli import ROOT, in_process
from test_preference_module import plain_log_prob
from test_scoring import changed_model, saved_adapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from datamodules.preference import PreferenceDataModule
from lightning_modules.cli import run
from lightning_modules.margins import MarginModule
from mixdpo.__main__ import main
from mixdpo.data.encoding import encode_rows
from mixdpo.data.pairs import read_pairs
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, add_adapters
from mixdpo.model.identity import base_fingerprint
from mixdpo.model.loading import load_base, load_reward_model, load_tokenizer
from mixdpo.signals.compare_margins import overlap, spearman
from mixdpo.signals.margins_file import FORMAT, read_margins
from mixdpo.signals.signals import CHES, ImplicitReward, PolicyLogProb, Rating, RewardModel
from mixdpo.storage.store import read_store

SOURCE_ROWS = make_pairs(10)
pytestmark = pytest.mark.filterwarnings("ignore:.*return_predictions")


@pytest.fixture(scope="module")
def made(tiny_model, source, tmp_path_factory):
    """A margins file of CHES; tests that change it copy it."""
    return predict(tiny_model, source, tmp_path_factory.mktemp("made"))


class Counted(CHES):
    """Counts the pairs that were computed, and fails in the batch `fails`."""

    computed: ClassVar[list[int]] = []
    fails = -1

    def __call__(self, model, batch):
        if len(self.computed) // 3 == type(self).fails:
            raise KeyboardInterrupt
        self.computed.extend(batch.ids.tolist())
        return super().__call__(model, batch)


def predict(model, source, folder, signal=None, *, name="a.margins", data=None, trainer=None, **options):
    """What one `run.py predict` does; the path of the margins file."""
    options = {"quantization": "none", "dtype": "float32", **options}
    module = MarginModule(model, signal or CHES(), output=str(folder / name), **options)
    limits = {"max_length": 64, "max_prompt_length": 32, "eval_batch_size": 3}
    pairs = PreferenceDataModule(source, **{"tokenizer": model, **limits, **(data or {})})
    make_trainer(folder, **(trainer or {})).predict(module, pairs, return_predictions=False)
    return str(folder / name)


def without_date(path):
    header, *lines = Path(path).read_text().splitlines()
    return [{key: value for key, value in json.loads(header).items() if key != "date"}, *lines]


def test_file(tiny_model, source, made):
    file = read_margins(made)
    assert len(file.pairs) == 10 and np.isfinite([margin for _, margin in file.pairs.values()]).all()
    weights = base_fingerprint(add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora()))
    expected = {"signal": "mixdpo.signals.signals.CHES", "options": {"normalised": False}, "needs": "policy"}
    expected |= {"base": tiny_model, "weights": weights, "adapter": None, "adapter_weights": None, "source": source}
    expected |= {"lengths": "max_length 64, max_prompt_length 32, truncate", "pairs": 10}
    expected |= {"dtype": "none, float32, auto, 32-true"}
    assert expected.items() <= file.header.items() and {"date", "tokenizer", "template", "data"} <= file.header.keys()
    assert [path.name for path in Path(made).parent.iterdir()] == ["a.margins"]


def test_interrupted_and_continued(tiny_model, source, made, tmp_path, capfd):
    """No pair is computed twice, and the file is that of the computation that was never interrupted."""
    Counted.computed, Counted.fails = [], 2
    with pytest.raises(SystemExit):  # what Lightning makes of an interrupt
        predict(tiny_model, source, tmp_path, Counted())
    part = tmp_path / "a.margins.part"
    assert len(read_store(part, "margins", "")[1]) == 6 == len(Counted.computed)
    with pytest.raises(InputError, match=r"a\.margins cannot be read"):
        read_margins(str(tmp_path / "a.margins"))
    with pytest.raises(InputError, match=r"part holds other margins \(options\.normalised: False there"):
        predict(tiny_model, source, tmp_path, Counted(True))
    Counted.fails = -1
    predict(tiny_model, source, tmp_path, Counted(), trainer={"limit_predict_batches": 1})  # a limit leaves the part
    assert part.exists() and len(Counted.computed) == 9
    path = predict(tiny_model, source, tmp_path, Counted())
    assert len(Counted.computed) == len(set(Counted.computed)) == 10
    assert without_date(path)[1:] == without_date(made)[1:] and not part.exists()
    before = Path(path).read_bytes()
    assert predict(tiny_model, source, tmp_path, Counted()) == path  # complete already
    assert len(Counted.computed) == 10 and Path(path).read_bytes() == before


def test_other_content_is_not_overwritten(tiny_model, source, made, tmp_path):
    path, before = Path(shutil.copy(made, tmp_path)), Path(made).read_bytes()
    others = [{"signal": PolicyLogProb()}, {"signal": Rating()}, {"dtype": "float64"}]
    for change in (*others, {"data": {"limit": 5}}, {"data": {"max_length": 40}}):
        with pytest.raises(InputError, match=r"a\.margins holds other margins .* there, .* here.*model\.output"):
            predict(tiny_model, source, tmp_path, **change)
    assert path.read_bytes() == before
    path.write_bytes(before[: before.rfind(b"{")])
    with pytest.raises(InputError, match=r"has 9 of its 10 pairs"):
        predict(tiny_model, source, tmp_path)


def test_data_without_a_margin(tiny_model, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "margin"} for row in make_pairs(10)]
    source = write_pairs(tmp_path / "unrated.jsonl", rows)
    path = predict(tiny_model, source, tmp_path)
    with pytest.raises(InputError, match=r"no column to take the margin from"):
        predict(tiny_model, source, tmp_path, Rating(), name="rating")
    trainer, module, data = build(tiny_model, source, tmp_path / "none")
    with pytest.raises(InputError, match=r"no column to take the margin from"):
        trainer.fit(module, data)
    trainer, module, data = build(tiny_model, source, tmp_path / "run", data={"margins_file": path, "validation": 0.3})
    trainer.fit(module, data)
    margins = {pair_id: margin for pair_id, (_, margin) in read_margins(path).pairs.items()}
    both = (data.train_pairs, data.validation_pairs)
    used = {i: margin for pairs in both for i, margin in zip(pairs["pair_id"], pairs["margin"], strict=True)}
    assert len(margins) == 10 and used == margins
    route = json.loads((tmp_path / "run/route.json").read_text())
    assert route["margins"]["file"] == path and route["margins"]["signal"] == "mixdpo.signals.signals.CHES"


def fit_with(tiny_model, source, folder, path, model=None, adapter=None, **data):
    """Train by these margins, although a column is named as well; the run's folder."""
    data = {"margin": "margin", "margins_file": path, **data}
    trainer, module, pairs = build(model or tiny_model, source, folder / "run", adapter=adapter, data=data)
    trainer.fit(module, pairs)
    assert sorted(pairs.route.margins) == sorted(margin for _, margin in read_margins(path).pairs.values())
    return folder / "run"


def test_files_that_fit_refuses(tiny_model, source, made, tmp_path):
    rows = make_pairs(10)
    rows[3]["chosen"] += " red"
    rows[6]["pair_id"] = "new"
    changed = write_pairs(tmp_path / "changed.jsonl", rows)
    with pytest.raises(InputError, match=r"not fit 2 of the 10 pairs of .*changed.jsonl \(first: row 4\): compute"):
        fit_with(tiny_model, changed, tmp_path, made)
    with pytest.raises(InputError, match=r"another encoding of the pairs.*max_length 64.*max_length 40"):
        fit_with(tiny_model, source, tmp_path, made, max_length=40)
    with pytest.raises(InputError, match=r"another encoding of the pairs.*template"):
        fit_with(tiny_model, source, tmp_path, made, chat_template="plain")


def read(tiny_model, source, folder, **data):
    """The data module once it has read and encoded all."""
    trainer, module, pairs = build(tiny_model, source, folder / "run", data=data)
    trainer.strategy._lightning_module, pairs.trainer = module, trainer
    pairs.setup("fit")
    return pairs


@pytest.mark.parametrize("computed_on", [0, 1])
def test_ids_that_both_files_number_alike_are_refused(tiny_model, tmp_path, computed_on):
    """As numbered from 0 in each; the margins of one file would be taken for those of the other."""
    files = [make_pairs(10, seed=seed) for seed in (0, 1)]
    both = [write_pairs(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(files)]
    path = predict(tiny_model, both[computed_on], tmp_path, Rating())
    with pytest.raises(InputError, match=r"10 pairs of .*1\.jsonl .*row 1.*of .*0\.jsonl: leave pair_id out"):
        read(tiny_model, both[0], tmp_path, validation=both[1], margins_file=path)
    bare = [[{k: v for k, v in row.items() if k != "pair_id"} for row in rows] for rows in files]
    both = [write_pairs(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(bare)]
    path = predict(tiny_model, write_pairs(tmp_path / "all.jsonl", [*bare[0], *bare[1]]), tmp_path, Rating(), name="b")
    data = read(tiny_model, both[0], tmp_path, validation=both[1], margins_file=path)
    found = [pairs["margin"][:] for pairs in (data.train_pairs, data.validation_pairs)]
    assert found == [[row["margin"] for row in rows] for rows in files]


def test_validation_of_another_split_or_of_a_file_without_any(tiny_model, tmp_path):
    tables = {name: datasets.Dataset.from_list(make_pairs(9 + i, seed=i)) for i, name in enumerate(("prefs", "held"))}
    folder = str(tmp_path / "saved")
    for name, table in tables.items():
        table.to_json(f"{folder}/data/{name}-00000-of-00001.jsonl")
    counts = read(tiny_model, folder, tmp_path, split="prefs", validation=folder, validation_split="held").counts
    assert counts[f"read/{folder}, split prefs"] == {"pairs": 9, "rows of data/prefs-00000-of-00001.jsonl": 9}
    assert counts[f"read/{folder}, split held"] == {"pairs": 10, "rows of data/held-00000-of-00001.jsonl": 10}
    with pytest.raises(InputError, match="a prompt that is trained on"):  # held out of the split that is trained on
        read(tiny_model, folder, tmp_path, split="prefs", validation=folder)
    held_out = write_pairs(tmp_path / "held_out.jsonl", make_pairs(3, seed=2))
    assert len(read(tiny_model, folder, tmp_path, split="prefs", validation=held_out).validation_pairs) == 3


def test_another_base_is_refused(tiny_model, source, made, tmp_path):
    """By its weights, not by its name; ratings and reward models may come from anywhere."""
    rating = predict(tiny_model, source, tmp_path, Rating(), name="rating")
    assert read_margins(rating).header["weights"] is None
    same, other = str(shutil.copytree(tiny_model, tmp_path / "same")), changed_model(tiny_model, tmp_path / "other")
    fit_with(tiny_model, source, tmp_path, made, model=same)
    with pytest.raises(InputError, match=r"another base model"):
        fit_with(tiny_model, source, tmp_path, made, model=other)
    fit_with(tiny_model, source, tmp_path, rating, model=other, max_length=50)
    margins = [row["margin"] for row in make_pairs(10)]
    assert [margin for _, margin in read_margins(rating).pairs.values()] == margins


def test_another_adapter_is_refused(tiny_model, source, made, tmp_path):
    """Log-probs are of the policy that training starts from; an adapter's reward may be of any adapter."""
    trained = fit_with(tiny_model, source, tmp_path / "1", made)
    adapter = str(trained / "adapter")
    of_adapter = predict(tiny_model, source, tmp_path, PolicyLogProb(), name="b", adapter=adapter)
    reward = predict(tiny_model, source, tmp_path, ImplicitReward(), name="c", adapter=adapter)
    with pytest.raises(InputError, match=r"another base model or adapter \(adapter_weights: \w+ there, None here\)"):
        fit_with(tiny_model, source, tmp_path / "2", of_adapter)
    fit_with(tiny_model, source, tmp_path / "3", of_adapter, adapter=adapter)
    fit_with(tiny_model, source, tmp_path / "4", reward)


def test_command_line(tiny_model, source, tmp_path):
    options = ["--model.base", tiny_model, "--data.source", source, "--runs", str(tmp_path / "runs")]
    options += ["--trainer.enable_progress_bar", "false"]
    options += ["--model.quantization", "none", "--model.dtype", "float32"]
    assert in_process("predict", "--config", "configs/signals/ches.yaml", *options) == 0
    path = tmp_path / "runs/ches.margins"
    assert read_margins(path).header["options"] == {"normalised": False}
    assert [file.name for file in path.parent.iterdir()] == ["ches.margins"]
    options += ["--model.output", str(tmp_path / "r")]
    assert in_process("predict", "--config", "configs/signals/rating.yaml", *options) == 0
    assert read_margins(tmp_path / "r").pairs.keys() == read_margins(path).pairs.keys()


def write_margins(path, margins, texts=None, **header):
    said = {"format": FORMAT, "signal": "s", "options": {}, "needs": "rating", "base": "<b>", "adapter": None}
    said |= {"source": "d", "pairs": len(margins), **header}
    pairs = [{"pair_id": i, "text": (texts or {}).get(i, f"t{i}"), "margin": m} for i, m in margins.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in [said, *pairs]))
    return str(path)


def brute_force_ranks(values):
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


@pytest.mark.parametrize("seed", range(5))
def test_spearman_with_ties(seed):
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, 5, 30).astype(float), draw.integers(0, 3, 30) + 0.5
    expected = np.corrcoef(brute_force_ranks(x), brute_force_ranks(y))[0, 1]
    assert spearman(x, y) == pytest.approx(expected) and spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    with pytest.warns(RuntimeWarning, match="constant"):
        assert np.isnan(spearman(x, np.ones(30)))


def test_overlap_by_hand():
    x = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    y = np.array([2.0, 9, 1, 3, 4, 5, 6, 7, 8, 10])
    found = overlap(x, y, 0.3)  # {0, 1, 2} and {2, 0, 3}: two of three in common, four in all
    assert (found["share"], found["jaccard"]) == (pytest.approx(2 / 3), pytest.approx(2 / 4))
    assert (found["chance_share"], found["chance_jaccard"]) == (pytest.approx(0.3), pytest.approx(0.9 / 5.1))
    assert (found["ties_a"], found["ties_b"]) == (1, 1)


def test_overlap_with_ties_is_the_mean_over_ways_to_break_them():
    x, y = np.array([0.0, 0, 0, 1, 2, 3]), np.array([0.0, 1, 1, 1, 1, 2])
    ways = [  # all sets of the three smallest, ties taken in every way
        [set(s) for s in itertools.combinations(range(6), 3) if max(v[list(s)]) <= min(np.delete(v, list(s)))]
        for v in (x, y)
    ]
    expected = np.mean([len(one & other) / 3 for one in ways[0] for other in ways[1]])
    assert overlap(x, y, 0.5)["share"] == pytest.approx(expected)


def test_compare_margins(tmp_path, capsys):
    a = write_margins(tmp_path / "a.margins", {i: float(i % 4) for i in range(20)})
    b = write_margins(tmp_path / "b.margins", {i: float(i) for i in range(5, 25)}, {7: "another text"})
    assert main(["compare-margins", a, b]) == 0
    printed = capsys.readouterr().out
    shared = [i for i in range(5, 20) if i != 7]
    expected = np.corrcoef(brute_force_ranks([i % 4 for i in shared]), brute_force_ranks(shared))[0, 1]
    assert f"14 pairs in common, Spearman's rank correlation {expected:.3f}" in printed


def z_scores(values):
    return [(value - statistics.fmean(values)) / statistics.pstdev(values) for value in values]


def test_alignment_potential(tmp_path, capsys):
    draw = np.random.default_rng(0)
    rating, gap = ({i: float(draw.normal()) for i in range(12)} for _ in range(2))
    a = write_margins(tmp_path / "a", rating)
    model = {"needs": "policy", "weights": "w", "adapter_weights": None, "lengths": "l", "date": "d"}
    model |= {"options": {"normalised": True}}
    b = write_margins(tmp_path / "b", dict(sorted(gap.items(), reverse=True)), **model)
    assert main(["combine-margins", a, b, str(tmp_path / "out")]) == 0
    file, parts = read_margins(tmp_path / "out"), [read_margins(a).header, read_margins(b).header]
    expected = [r - g for r, g in zip(z_scores(rating.values()), z_scores([abs(g) for g in gap.values()]), strict=True)]
    assert [file.pairs[i] for i in rating] == [(f"t{i}", pytest.approx(expected[i])) for i in rating]
    assert file.header["parts"] == parts and file.header["signal"] == "alignment_potential"
    assert file.of_policy and file.header.items() >= {"needs": "policy", "weights": "w", "lengths": "l"}.items()
    assert main(["combine-margins", a, b, str(tmp_path / "out")]) == 0  # a second time it is there already

    def refused(one, other, *options):
        assert main(["combine-margins", one, other, str(tmp_path / "new"), *options]) == 2
        assert not list(tmp_path.glob("new*"))
        return capsys.readouterr().err

    same, said = ((i, dict.fromkeys(range(i), 1.0)) for i in (12, 11)), {"options": {"normalised": True}}
    flat, less = (write_margins(tmp_path / str(i), margins, **said) for i, margins in same)
    changed = write_margins(tmp_path / "changed", gap, {3: "another text"})
    longer = write_margins(tmp_path / "b0", {12: 0.5}, **model | {"lengths": "x"})
    sums = write_margins(tmp_path / "b1", gap, **model | {"options": {}})
    assert all("must hold the same pairs" in refused(a, other) for other in (less, changed))
    assert "must have no pair in common" in refused(a, b, "--how", "union")
    assert all("give a file of ratings first" in refused(*pair) for pair in ((b, a), (a, sums)))
    assert "of different signals" in refused(write_margins(tmp_path / "c", {12: 0.5}), b, "--how", "union")
    assert "no alignment potential" in refused(a, flat)
    assert "lengths: l there, x here" in refused(b, longer, "--how", "union")


def test_cross_fit(tiny_model, source, tmp_path, monkeypatch):
    """Every pair's margin is that of the adapter that was trained on the half of the prompts without the pair's."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["mixdpo"])
    out, data = tmp_path / "learned.margins", {"max_length": 64, "max_prompt_length": 32}
    words = f"""--model.base {tiny_model} --model.quantization none --data.source {source} --runs {tmp_path / "runs"}
        --data.max_length 64 --data.max_prompt_length 32 --trainer.callbacks null --trainer.enable_progress_bar false"""
    run(["cross-fit", "configs/demo.yaml", str(out), *words.split()])
    file, halves = read_margins(out), []
    for half, name in enumerate(("half0", "half1")):
        adapter = str(tmp_path / "runs" / name / "adapter")
        halves.append(set(read(tiny_model, source, tmp_path, half=half, validation=0, **data).train_pairs["pair_id"]))
        whole = read_margins(predict(tiny_model, source, tmp_path, ImplicitReward(), name=name, adapter=adapter)).pairs
        assert halves[half] and {i: file.pairs[i] for i in whole if i not in halves[half]} == {
            i: (text, pytest.approx(margin, abs=1e-5)) for i, (text, margin) in whole.items() if i not in halves[half]
        }
    assert not halves[0] & halves[1] and halves[0] | halves[1] == file.pairs.keys() and len(file.pairs) == 10
    assert len({round(margin, 6) for _, margin in file.pairs.values()}) == 10  # both have learnt
    assert {part["signal"] for part in file.header["parts"]} == {"mixdpo.signals.signals.ImplicitReward"}
    fit_with(tiny_model, source, tmp_path, str(out))


# Signals, each against a direct computation: one sequence at a time, unpadded, through plain transformers.
LIMITS = {"max_length": 64, "max_prompt_length": 32}


@pytest.fixture(scope="module")
def pairs(tiny_model, tmp_path_factory):
    source = write_pairs(tmp_path_factory.mktemp("signals") / "pairs.jsonl", make_pairs(9))
    return list(encode_rows(read_pairs(source).dataset, load_tokenizer(tiny_model), **LIMITS)[0])


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    return saved_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "adapter", rank=3, targets=["q_proj"])


def plain(tiny_model, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).double().eval()
    return model


def ours(tiny_model, adapter=None):
    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float64"), Lora(rank=1), adapter)
    return model.double().eval()


@torch.no_grad()
def states(model, prompt, completion):
    """From the last prompt token to the completion's last token but one."""
    output = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True)
    return output.hidden_states[-1][0, len(prompt) - 1 : len(prompt) + len(completion) - 1]


@torch.no_grad()
def margins(signal, model, pairs, size=4, share=True):
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return torch.cat([signal(model, collate(b, [True] * len(b), evaluation=True, share_prompt=share)) for b in batches])


@torch.no_grad()
def log_prob_margins(model, pairs, per_token=False):
    def of(side):
        sums = torch.stack([plain_log_prob(model, pair["prompt_ids"], pair[side]) for pair in pairs])
        return sums / torch.tensor([len(pair[side]) if per_token else 1 for pair in pairs])

    return (of("chosen_ids") - of("rejected_ids")).tolist()


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_policy_log_prob_and_implicit_reward(tiny_model, adapter, pairs):
    policy, base = (log_prob_margins(plain(tiny_model, name), pairs) for name in (adapter, None))
    for name, of_model in ((adapter, policy), (None, base)):
        close(margins(PolicyLogProb(), ours(tiny_model, name), pairs), [0.1 * margin for margin in of_model])
        per_token = [0.1 * margin for margin in log_prob_margins(plain(tiny_model, name), pairs, per_token=True)]
        close(margins(PolicyLogProb(normalised=True), ours(tiny_model, name), pairs), per_token)
    expected = [0.3 * (p - r) for p, r in zip(policy, base, strict=True)]
    assert max(map(abs, expected)) > 0.01
    close(margins(ImplicitReward(beta=0.3), ours(tiny_model, adapter), pairs), expected)


@pytest.mark.parametrize("normalised", [False, True])
def test_ches(tiny_model, pairs, normalised):
    model, expected = plain(tiny_model), []
    for pair in pairs:
        w, lost = (states(model, pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids"))
        assert (len(w), len(lost)) == (len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        scale_l, scale_w = (len(w) * len(lost), len(w) ** 2) if normalised else (1, 1)
        total_w, total_l = w.sum(0), lost.sum(0)
        expected.append(-((total_w @ total_l) / scale_l - (total_w @ total_w) / scale_w).item())
    close(margins(CHES(normalised), ours(tiny_model), pairs), expected)


@pytest.mark.parametrize("signal", [PolicyLogProb(), ImplicitReward(), CHES()], ids=str)
def test_batches_do_not_matter(tiny_model, adapter, pairs, signal):
    model = ours(tiny_model, adapter)
    expected = margins(signal, model, pairs, size=1)
    for size, share in ((4, True), (9, True), (3, False)):
        torch.testing.assert_close(margins(signal, model, pairs, size, share), expected, rtol=1e-9, atol=1e-9)


def classifier(folder: Path, tiny_model: str, kind: str, pad: int | None, labels: int = 1) -> str:
    """A tiny reward model with the tokenizer of the tiny model."""
    torch.manual_seed(2)
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_labels": labels, "pad_token_id": pad, "max_position_embeddings": 256}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **shape))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("kind", "pad", "share"), [("llama", None, True), ("llama", 3, False), ("bert", 1, True)])
def test_reward_model(tiny_model, tmp_path, pairs, kind, pad, share):
    """Whatever the pad token (none, its own, the end token 3) and the pooling."""
    name = classifier(tmp_path, tiny_model, kind, pad)
    reference, expected = AutoModelForSequenceClassification.from_pretrained(name).eval(), []
    for pair in pairs:
        ids = (torch.tensor([pair["prompt_ids"] + pair[side]]) for side in ("chosen_ids", "rejected_ids"))
        chosen, rejected = (reference(each).logits.item() for each in ids)
        expected.append(chosen - rejected)
    model = load_reward_model(name, quantization="none", dtype="float32")
    if kind == "llama":  # nf4 keeps the head
        assert type(load_reward_model(name, dtype="float32").score) is torch.nn.Linear
    found = margins(RewardModel(), model, pairs, share=share)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 1e-3


def test_what_is_no_reward_model(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"no reward model.*\(has 3\)"):
        load_reward_model(classifier(tmp_path / "three", tiny_model, "llama", 1, labels=3), quantization="none")
    with pytest.raises(InputError, match=r"no reward model.*lacks \['score.weight'\]"):
        load_reward_model(tiny_model, quantization="none")
    with pytest.raises(InputError, match="cannot load"):
        load_reward_model(str(tmp_path / "nothing"))
