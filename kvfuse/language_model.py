"""A frozen language model with its tokenizer, and what identifies it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvfuse.backends.dtypes import fast_dtype
from kvfuse.backends.offloading import loaded
from kvfuse.cache.kv import KVSpec
from kvfuse.errors import PairError, first_line
from kvfuse.prompts.chat_options import CHAT_OPTIONS, ChatOptions, set_chat_options
from kvfuse.stages.context import context_length
from kvfuse.stages.prefill import continues_exactly, probe
from kvfuse.stages.rope import RoPE, measure_rope
from kvfuse.support.hub import SOURCE_OPTIONS, reading, select

SAMPLED_TENSORS, SAMPLES_PER_TENSOR = 32, 4


@dataclass(frozen=True)
class Identity:
    """The properties of a model that a fuser trained with it remembers.

    Attributes:
        name: Folder or Hub id it was loaded from; only shown, never compared.
        kv: Shape of its cache.
        tokenizer: SHA-256 of the tokenizer's vocabulary, merges and rules.
        weights: Single weights spread evenly over the model; a fine-tune of the same architecture differs in them.
        dtype: The dtype they were loaded in, e.g. ``bfloat16``.
    """

    name: str
    kv: KVSpec
    tokenizer: str
    weights: tuple[float, ...]
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weights": list(self.weights)}


@dataclass
class LanguageModel:
    """A causal language model of transformers with its tokenizer.

    Attributes:
        model: Any ``AutoModelForCausalLM`` that keeps a KV-cache.
        tokenizer: Its fast tokenizer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """Folder or Hub id that the model was loaded from."""
        return self.model.name_or_path or type(self.model).__name__

    @classmethod
    def from_pretrained(cls, name: str | Path, **model_options: Any) -> Self:
        """Load model and tokenizer from a local folder or the Hub.

        Args:
            name: Folder, Hub id or GGUF file.
            model_options: For ``AutoModelForCausalLM.from_pretrained``, e.g. ``device_map``. ``dtype`` is that of the
                weights by default, or float32 on a CPU that is faster with it. Options that say which files to read
                (:data:`kvfuse.support.hub.SOURCE_OPTIONS`) reach the tokenizer too. ``escape_special_tokens`` and
                ``system_in_user`` are the switches of :class:`kvfuse.prompts.chat_options.ChatOptions`.

        Raises:
            PairError: There is no causal language model of that name.
        """
        source, switches = select(model_options, SOURCE_OPTIONS), select(model_options, CHAT_OPTIONS)
        options = {key: value for key, value in model_options.items() if key not in {**source, **switches}}
        with reading("a causal language model", name, source) as (place, files):
            model = AutoModelForCausalLM.from_pretrained(place, **{"dtype": "auto", **options, **files})
        model.name_or_path = str(name)
        if model_options.get("dtype", "auto") == "auto":
            model = _in_fast_dtype(model)
        tokenizer = load_tokenizer(name, **source)
        set_chat_options(tokenizer, ChatOptions(**switches))
        return cls(model.eval().requires_grad_(False), tokenizer)

    @cached_property
    def context(self) -> int | None:
        """The longest prompt the model was made for, in tokens; None if its configuration does not say.

        Set it to allow another length.
        """
        return context_length(self.model.config)

    @cached_property
    def kv_spec(self) -> KVSpec:
        """Shape of the model's cache, measured in a run over two tokens."""
        return probe(self.model)

    @cached_property
    def continues_exactly(self) -> bool:
        """Whether several tokens after a filled cache are computed as one by one, measured."""
        return continues_exactly(self.model)

    @cached_property
    def rope(self) -> RoPE:
        """The model's rotation of keys by their positions, measured. Raises PairError where there is none."""
        return measure_rope(self.model)

    @cached_property
    def identity(self) -> Identity:
        """See :class:`Identity`."""
        return Identity(
            name=self.name,
            kv=self.kv_spec,
            tokenizer=tokenizer_hash(self.tokenizer),
            weights=_sample_weights(self.model),
            dtype=str(self.model.dtype).removeprefix("torch."),
        )


def require_device(name: str) -> str:
    """A device by name, as ``device_map`` takes it, e.g. ``cuda:1`` or ``auto``.

    Raises:
        PairError: This machine has no such device.
    """
    try:
        if name != "auto":
            torch.zeros(1, device=name).item()  # which the device meta cannot
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        got = f"got {name!r}: {first_line(error)}"
        raise PairError(f"expected a device of this machine, such as cpu or cuda:0, {got}; choose one") from error
    return name


def load_tokenizer(name: str | Path, **source: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer without its model; ``source`` as in :data:`kvfuse.support.hub.SOURCE_OPTIONS`.

    Raises:
        PairError: There is none.
    """
    with reading("a tokenizer", name, source) as (place, files):
        return AutoTokenizer.from_pretrained(place, **files)


def load_config(name: str | Path, **source: Any) -> PreTrainedConfig:
    """Load a model's configuration without its weights; ``source`` as in :func:`load_tokenizer`.

    Raises:
        PairError: There is none.
    """
    with reading("a model's configuration", name, source) as (place, files):
        return AutoConfig.from_pretrained(place, **files)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the rules that decide the ids of a text; padding and truncation, which users set, do not count.

    Raises:
        PairError: The tokenizer is not a fast one; only these know the characters that a token covers.
    """
    if not tokenizer.is_fast:
        raise PairError(f"expected a fast tokenizer, got {type(tokenizer).__name__}; convert it to tokenizer.json")
    # 1) All of tokenizer.json, without what a call sets
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: value for key, value in rules.items() if key not in ("padding", "truncation", "version")}
    # 2) Keys in one order, whatever wrote the file
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def check_identity(model: LanguageModel, *, role: str, expected: dict[str, Any]) -> None:
    """Refuse a model that a fuser was not trained with.

    Args:
        model: The model at hand. Quantised weights are not compared, only shapes and tokenizer.
        role: ``receiver`` or ``sharer``, for the message.
        expected: :meth:`Identity.to_dict` of the model in training; of a published fuser, only name and shape are
            known.

    Raises:
        PairError: Its cache has another shape, or tokenizer or weights are another model's.
    """
    # 1) Shapes are known of every fuser
    name, kv = expected["name"], KVSpec(**expected["kv"])
    trained_with = f"({model.name}); the fuser was trained with {role} {name!r}"
    if model.kv_spec != kv:
        raise PairError(f"expected a {role} with {kv}, got {model.kv_spec} {trained_with}")
    # 2) Tokenizer and weights of those that were not read from a published folder
    if "tokenizer" in expected and model.identity.tokenizer != expected["tokenizer"]:
        raise PairError(f"expected the tokenizer of {name!r}, got another one {trained_with}")
    comparable = "weights" in expected and not getattr(model.model, "is_quantized", False)
    if comparable and not _same_weights(expected, model.identity):
        raise PairError(f"expected the weights of {name!r}, got other ones {trained_with}")


def _in_fast_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """A model in the dtype that its device computes fastest; as it is where it is quantised or lies on disk."""
    # Layers on disk stay in the dtype of their files
    is_movable = all(parameter.device == model.device for parameter in model.parameters())
    if not is_movable or model.device.type == "meta" or getattr(model, "is_quantized", False):
        return model
    dtype = fast_dtype(model.dtype, model.device, model.name_or_path)
    return model if dtype == model.dtype else model.to(dtype)


def _sample_weights(model: PreTrainedModel) -> tuple[float, ...]:
    """A few weights of tensors spread evenly over the model, in the model's dtype."""
    # Sorted by name, so that the order of modules does not matter
    names = sorted(name for name, _ in model.named_parameters())
    values: list[float] = []
    for name in names[:: max(1, len(names) // SAMPLED_TENSORS)]:
        with loaded(model, name) as tensor:
            values += _sample(tensor)
    return tuple(round(value, 9) for value in values)


def _sample(tensor: torch.Tensor) -> list[float]:
    last = tensor.numel() - 1
    # linspace is float32, which rounds the last index of a large embedding up
    indices = torch.linspace(0, last, SAMPLES_PER_TENSOR).long().clamp(max=last)
    return tensor.detach().flatten()[indices.to(tensor.device)].float().tolist()


def _same_weights(expected: dict[str, Any], identity: Identity) -> bool:
    """Equal, or equal up to rounding (bf16 keeps 8 bits) where the model was loaded in another dtype."""
    tolerance = 0.0 if identity.dtype == expected["dtype"] else 2**-7
    trained, loaded = torch.tensor(expected["weights"]), torch.tensor(identity.weights)
    return len(loaded) == len(trained) and torch.allclose(loaded, trained, rtol=tolerance, atol=tolerance * 1e-3)
