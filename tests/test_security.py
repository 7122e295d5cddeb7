"""No code of a repository runs and nothing is unpickled, whoever wrote the folder that an option names."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch

from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, add_adapters, add_reference
from mixdpo.model.export import save_adapter
from mixdpo.model.loading import load_base, load_reward_model, load_tokenizer

ROOT = Path(__file__).parents[1]
CODE = """from pathlib import Path; Path({marker!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast as T, LlamaConfig as C, LlamaForCausalLM as M"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a repository's code writes, in a session where every question is answered by yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def with_code(model: str, folder: Path, marker: Path, file: str, auto_map: dict[str, object]) -> str:
    """A copy of the model whose `file` names code beside it, and no class of transformers' own."""
    shutil.copytree(model, folder)
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    content = json.loads((folder / file).read_text())
    for name in ("tokenizer_class", "architectures"):
        content.pop(name, None)
    content |= {"auto_map": auto_map} | ({"model_type": "evil"} if file == "config.json" else {})
    (folder / file).write_text(json.dumps(content))
    return str(folder)


def test_a_tokenizers_code(tiny_model: str, tmp_path: Path, marker: Path) -> None:
    folder = with_code(tiny_model, tmp_path / "t", marker, "tokenizer_config.json", {"AutoTokenizer": ["evil.T", None]})
    with pytest.raises(InputError, match=r"tokenizer '.*': it needs code"):
        load_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize("load", [load_base, load_reward_model])
def test_a_models_code(load: object, tiny_model: str, tmp_path: Path, marker: Path) -> None:
    names = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    auto_map = {"AutoConfig": "evil.C"} | dict.fromkeys(names, "evil.M")
    folder = with_code(tiny_model, tmp_path / "m", marker, "config.json", auto_map)
    with pytest.raises(InputError, match=r"model '.*': it needs code"):
        load(folder, quantization="none", dtype="float32")  # type: ignore[operator]
    assert not marker.exists()


def test_an_adapter_in_a_pickle(tiny_model: str, tmp_path: Path) -> None:
    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=4, alpha=8))
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "a/adapter_model.bin")
    with pytest.raises(InputError, match=r"has no adapter_model.safetensors: save it anew"):
        add_reference(model, "previous", str(tmp_path / "a"))
    with pytest.raises(InputError, match=r"has no adapter_model.safetensors: save it anew"):
        add_adapters(model.get_base_model(), Lora(), str(tmp_path / "a"))


def calls(path: Path) -> list[tuple[str, set[str], int]]:
    """Name, keywords that are a literal False, and line of each call in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            false = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is False}
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            found.append((f"{owner}.{node.func.attr}", false, node.lineno))
    return found


LOADS = ("from_pretrained", "from_config", "load_dataset")


def test_every_load_says_that_it_trusts_no_code() -> None:
    """Where it is not said, transformers asks on stdin: in a script with `yes |` before it that is a yes."""
    loads = []
    for folder in ("mixdpo", "lightning_modules", "datamodules", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, false, line in calls(path):
                owner, _, method = name.partition(".")
                if method in LOADS and owner not in ("PeftModel", "LoraConfig"):
                    loads.append((f"{path.relative_to(ROOT)}:{line}", "trust_remote_code" in false))
    assert len(loads) >= 10
    assert not [where for where, said in loads if not said]
