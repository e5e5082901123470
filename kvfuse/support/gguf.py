"""GGUF files: transformers dequantises them in minutes, so a converted copy is kept beside the Hub's cache."""

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download

from kvfuse.support.files import write_folder

DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
DIGITS = 32  # of the file's hash, in the name of its copy


def gguf_file(name: str | Path, source: dict[str, Any]) -> Path | None:
    """The GGUF file that a model's name and options mean, downloaded if need be; None where they mean none.

    Args:
        name: GGUF file; or a folder or repository of the Hub, with the file's name in ``source["gguf_file"]``.
        source: Some of :data:`kvfuse.support.hub.SOURCE_OPTIONS`.
    """
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return Path(name)
    file = source.get("gguf_file")
    if file is None:
        return None
    # A file within a folder, or within a repository of the Hub
    if Path(name).is_dir():
        return Path(name, source.get("subfolder", ""), file)
    arguments = {key: source[key] for key in DOWNLOAD_ARGUMENTS if key in source}
    return Path(hf_hub_download(str(name), file, **arguments))


def converted(file: Path) -> Path:
    """The folder of a GGUF file's model and tokenizer in transformers' format, in float32, made when first asked for.

    Copies are named by the file's content, so that a moved file keeps its copy and another file gets its own.
    """
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, "sha256").hexdigest()[:DIGITS]
    folder = Path(constants.HF_HOME, "kvfuse", "gguf", content)
    return folder if folder.is_dir() else write_folder(folder, lambda fresh: _convert(file, fresh))


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
