"""A frozen language model with its tokenizer, and what identifies it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvfuse.backends.offloading import loaded
from kvfuse.cache.kv import KVSpec
from kvfuse.errors import PairError, first_line
from kvfuse.stages.context import context_length
from kvfuse.stages.prefill import continues_exactly, probe
from kvfuse.stages.rope import RoPE, measure_rope

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
            name: Folder or Hub id.
            model_options: For ``AutoModelForCausalLM.from_pretrained``, e.g. ``dtype``, ``device_map``, ``revision``.

        Raises:
            PairError: There is no causal language model of that name.
        """
        with reraise_as("a causal language model", name):
            model = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **model_options})
        tokenizer = load_tokenizer(name, revision=model_options.get("revision", "main"))
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


def load_tokenizer(name: str | Path, revision: str = "main") -> PreTrainedTokenizerBase:
    """Load a tokenizer without its model. Raises PairError where there is none."""
    with reraise_as("a tokenizer", name):
        return AutoTokenizer.from_pretrained(name, revision=revision)


def load_context(name: str | Path) -> int | None:
    """A model's :attr:`LanguageModel.context` without its weights. Raises PairError where there is no configuration."""
    with reraise_as("a model's configuration", name):
        return context_length(AutoConfig.from_pretrained(name))


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


@contextmanager
def reraise_as(what: str, name: str | Path) -> Iterator[None]:
    """Turn the errors of transformers for a model that cannot be loaded into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        got = first_line(error)
        raise PairError(f"expected {what} at {str(name)!r}, got: {got}; name a local folder or a Hub id") from error


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
