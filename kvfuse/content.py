"""What a run reads, identified by content: models, fusers and files have a hash that changes with what is in them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvfuse.errors import PairError
from kvfuse.fusers.folder import locate
from kvfuse.language_model import load_config, load_tokenizer, tokenizer_hash
from kvfuse.published.reader import find_projectors
from kvfuse.support.files import sha256
from kvfuse.support.run_folder import Inputs

CONFIGURATIONS = ("config.json", "generation_config.json", "adapter_config.json", "*.py")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first kind that a folder has
FUSER_FILES = ("*.json", "*.safetensors", "projector_*.pt")
NOT_CONTENT = ("_name_or_path", "transformers_version")  # keys of a configuration that say where it comes from
NO_FILE = "none"


def model_content(role: str, name: str) -> Inputs:
    """A model's weights, configuration, tokenizer and chat template.

    Args:
        role: ``receiver``, ``sharer`` and the like, for the names.
        name: Folder, or Hub id, whose commit identifies its files.

    Raises:
        PairError: Weights or tokenizer are missing, or the weights are truncated.
    """
    tokenizer = load_tokenizer(name)
    reading = [tokenizer_hash(tokenizer), tokenizer.special_tokens_map]
    return {
        f"the {role}'s weights": _weights(name),
        f"the {role}'s configuration": _hash_files(Path(name), CONFIGURATIONS),
        f"the {role}'s tokenizer": hash_json(reading),
        f"the {role}'s chat template": hash_json(tokenizer.chat_template),
    }


def fuser_content(source: str | Path, subfolder: str = "") -> str:
    """A fuser's weights and configuration, in our format or the authors'. Raises CheckpointError if there is none."""
    folder = locate(source, subfolder)
    return _hash_files(find_projectors(folder) or folder, FUSER_FILES)


def file_content(file: str | Path | None) -> str:
    """The bytes of a file; ``none`` where there is no file."""
    if file is None or not Path(file).is_file():
        return NO_FILE
    return sha256(Path(file))


def hash_json(value: Any) -> str:
    """A value that JSON can hold; others are taken as text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _weights(name: str) -> str:
    folder = Path(name)
    if folder.is_file():
        return file_content(folder)
    if not folder.is_dir():
        return str(load_config(name)._commit_hash)
    kind = next((pattern for pattern in WEIGHTS if any(folder.glob(pattern))), None)
    if kind is None:
        raise PairError(f"expected weights in {folder}, got none of {', '.join(WEIGHTS)}; name the folder of a model")
    for file in folder.glob(WEIGHTS[0]):
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise PairError(f"expected whole weights in {file}, got: {error}; copy the file again") from error
    return _hash_files(folder, [kind])


def _hash_files(folder: Path, patterns: Iterable[str]) -> str:
    """Names and contents of a folder's files."""
    # One order, whatever the file system's
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return hash_json(
        [(file.name, _configuration(file) if file.suffix == ".json" else file_content(file)) for file in files]
    )


def _configuration(file: Path) -> str:
    """A file of JSON, however it is written, without the keys that say where it comes from."""
    # Two writers of one configuration may format it differently
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return file_content(file)
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in NOT_CONTENT}
    return hash_json(content)
