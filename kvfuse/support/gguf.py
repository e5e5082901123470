"""GGUF files: transformers dequantises them in minutes, so a converted copy is kept beside the Hub's cache."""

from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from kvfuse.support.files import sha256, write_folder

DIGITS = 32  # of the file's hash, in the name of its copy


def converted(file: Path) -> Path:
    """The folder of a GGUF file's model and tokenizer in transformers' format, in float32, made when first asked for.

    Copies are named by the file's content, so that a moved file keeps its copy and another file gets its own.
    """
    state = file.stat()
    folder = Path(constants.HF_HOME, "kvfuse", "gguf", _content(file.resolve(), state.st_size, state.st_mtime_ns))
    return folder if folder.is_dir() else write_folder(folder, lambda fresh: _convert(file, fresh))


@cache
def _content(file: Path, size: int, changed: int) -> str:
    """Digits of a file's hash, computed once while its size and time of change stay."""
    return sha256(file)[:DIGITS]


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name}
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    # Transformers does not save a model that it knows to be from GGUF: the same weights, in a plain one
    loaded.config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(loaded.config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
