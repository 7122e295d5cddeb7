"""Each difficulty signal against a direct computation: one sequence at a time, unpadded, through plain transformers."""

from pathlib import Path

import pytest
import torch
from conftest import collate, make_pairs, write_pairs
from test_adapters import saved_adapter
from test_preference_module import plain_log_prob
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from mixdpo.data.encoding import encode_rows
from mixdpo.data.pairs import read_pairs
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, add_adapters
from mixdpo.model.loading import load_base, load_reward_model, load_tokenizer
from mixdpo.signals.signals import CHES, ImplicitReward, PolicyLogProb, Rating, RewardModel, ches

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


def test_ches_by_hand():
    """⟨(1, 2), (3, −1)⟩ − ‖(1, 2)‖² = 1 − 5; a pair of equal responses has 0, the hardest there is on this side."""
    assert ches(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])).tolist() == [-4.0]
    same = torch.randn(3, 5)
    assert ches(same, same).tolist() == [0.0] * 3


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


def test_rating(pairs):
    assert margins(Rating(), None, pairs).tolist() == [pair["margin"] for pair in pairs]
