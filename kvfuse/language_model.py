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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvfuse.cache.kv import KVSpec
from kvfuse.errors import PairError, first_line
from kvfuse.stages.prefill import probe
from kvfuse.stages.rope import RoPE, measure_rope

SAMPLED_TENSORS, SAMPLES_PER_TENSOR = 32, 4


@dataclass(frozen=True)
class Identity:
    """What a fuser remembers of a model it was trained with.

    Attributes:
        name: Folder or Hub id it was loaded from; only told, never compared.
        kv: Shape of its cache.
        tokenizer: SHA-256 of the tokenizer's vocabulary, merges and rules.
        weights: Single weights spread evenly over the model; a fine-tune of the same architecture differs in them.
        dtype: What they were loaded as, e.g. ``bfloat16``.
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
        """What the model was loaded as."""
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
        """The longest prompt the model was made for, in tokens; None if it does not say."""
        return _context(self.model.config)

    @cached_property
    def kv_spec(self) -> KVSpec:
        """Shape of the model's cache, read off a two-token run."""
        return probe(self.model)

    @cached_property
    def rope(self) -> RoPE:
        """How the model turns its keys by their positions, measured. Raises PairError where none does."""
        return measure_rope(self.model)

    @cached_property
    def identity(self) -> Identity:
        """See :class:`Identity`."""
        return Identity(
            self.name,
            self.kv_spec,
            tokenizer_hash(self.tokenizer),
            _sample_weights(self.model),
            str(self.model.dtype).removeprefix("torch."),
        )


def load_tokenizer(name: str | Path, revision: str = "main") -> PreTrainedTokenizerBase:
    """Load a tokenizer alone. Raises PairError where there is none."""
    with reraise_as("a tokenizer", name):
        return AutoTokenizer.from_pretrained(name, revision=revision)


def load_context(name: str | Path) -> int | None:
    """A model's :attr:`LanguageModel.context` without the model. Raises PairError where there is no configuration."""
    with reraise_as("a model's configuration", name):
        return _context(AutoConfig.from_pretrained(name))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides the ids of a text; padding and truncation, which users set, do not.

    Raises:
        PairError: The tokenizer is not a fast one, which alone can tell which characters a token covers.
    """
    if not tokenizer.is_fast:
        raise PairError(f"expected a fast tokenizer, got {type(tokenizer).__name__}; convert it to tokenizer.json")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: value for key, value in rules.items() if key not in ("padding", "truncation", "version")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def check_identity(whose: str, expected: dict[str, Any], model: LanguageModel) -> None:
    """Refuse a model that a fuser was not trained with.

    Args:
        whose: ``receiver`` or ``sharer``, for the message.
        expected: :meth:`Identity.to_dict` of the model in training; of a published fuser, only name and shape are known.
        model: The model at hand. Quantised weights are not compared, only shapes and tokenizer.

    Raises:
        PairError: Its cache has another shape, or tokenizer or weights are another model's.
    """
    trained_with = f"the fuser was trained with {whose} {expected['name']!r}"
    if model.kv_spec != KVSpec(**expected["kv"]):
        raise PairError(
            f"expected a {whose} with {KVSpec(**expected['kv'])}, got {model.kv_spec} ({model.name}); {trained_with}"
        )
    if "tokenizer" in expected and model.identity.tokenizer != expected["tokenizer"]:
        raise PairError(
            f"expected the tokenizer of {expected['name']!r}, got another one ({model.name}); {trained_with}"
        )
    if (
        "weights" in expected
        and not getattr(model.model, "is_quantized", False)
        and not _same_weights(expected, model.identity)
    ):
        raise PairError(f"expected the weights of {expected['name']!r}, got other ones ({model.name}); {trained_with}")


def _context(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def reraise_as(what: str, name: str | Path) -> Iterator[None]:
    """Turn what transformers says about a model that cannot be loaded into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise PairError(
            f"expected {what} at {str(name)!r}, got: {first_line(error)}; name a local folder or a Hub id"
        ) from error


def _sample_weights(model: PreTrainedModel) -> tuple[float, ...]:
    """A few weights of tensors spread evenly over the model, in the model's dtype."""
    tensors = [tensor for _, tensor in sorted(model.named_parameters())]
    chosen = tensors[:: max(1, len(tensors) // SAMPLED_TENSORS)]
    return tuple(round(value, 9) for tensor in chosen for value in _sample(tensor))


def _sample(tensor: torch.Tensor) -> list[float]:
    last = tensor.numel() - 1
    places = (
        torch.linspace(0, last, SAMPLES_PER_TENSOR).long().clamp(max=last)
    )  # float32 rounds the last of a large embedding up
    return tensor.detach().flatten()[places.to(tensor.device)].float().tolist()


def _same_weights(expected: dict[str, Any], got: Identity) -> bool:
    """Equal, or equal up to rounding (bf16 keeps 8 bits) where the model was loaded in another dtype."""
    tolerance = 0.0 if got.dtype == expected["dtype"] else 2**-7
    theirs, ours = torch.tensor(expected["weights"]), torch.tensor(got.weights)
    return len(ours) == len(theirs) and torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * 1e-3)
