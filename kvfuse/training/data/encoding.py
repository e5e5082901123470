"""Examples -> what the models read of them, from their tokenizers alone."""

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.fusers import fuser_class
from kvfuse.language_model import LanguageModel, load_context, load_tokenizer, tokenizer_hash
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedRow, align, default_token_alignment
from kvfuse.prompts.response import read_response
from kvfuse.training.data.columns import EncodedExample
from kvfuse.training.data.examples import Example
from kvfuse.training.recipe import Recipe

ENCODING_MODULES = (
    "kvfuse.prompts.chat",
    "kvfuse.prompts.template_spans",
    "kvfuse.prompts.tokenized",
    "kvfuse.prompts.message_axis",
    "kvfuse.prompts.multiple_choice",
    "kvfuse.prompts.alignment",
    "kvfuse.prompts.reencode",
    "kvfuse.prompts.response",
    "kvfuse.training.data.columns",
    "kvfuse.training.data.encoding",
    "kvfuse.training.data.examples",
    "kvfuse.training.data.prepare",
    "kvfuse.training.data.shapes",
    "kvfuse.training.data.sources",
)
"""The code that decides what encoded rows are: an edit to any of them encodes a data set again, an edit elsewhere does not."""


class TooLongError(PromptError):
    """An example that a model has no room for."""


@dataclass(frozen=True)
class Reader:
    """A model as far as encoding goes: its tokenizer, and how many tokens it has room for."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    context: int | None

    @classmethod
    def of(cls, model: LanguageModel) -> Self:
        return cls(model.name, model.tokenizer, model.context)

    @classmethod
    def load(cls, name: str) -> Self:
        """Without the model. Raises PairError where there is no tokenizer or no configuration."""
        return cls(name, load_tokenizer(name), load_context(name))

    def require_room(self, length: int, what: str, most: int | None = None) -> None:
        """Raises TooLongError where neither the context nor ``most`` has room for so many tokens."""
        room = min((limit for limit in (self.context, most) if limit is not None), default=length)
        if length > room:
            raise TooLongError(f"expected {what} to fit {room} tokens of {self.name}, got {length}; shorten them")

    def identify(self) -> list[Any]:
        """What decides the ids that it reads."""
        tokenizer = self.tokenizer
        return [tokenizer_hash(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map, self.context]


@dataclass(frozen=True)
class Encoder:
    """Aligns prompts and tokenizes responses for a pair.

    Attributes:
        receiver: The model that answers.
        sharers: Those that only read, each with one of :data:`kvfuse.prompts.alignment.TOKEN_ALIGNMENTS`.
        fuse: Which prompt positions are fused.
        fuse_response: Whether the response is fused too, so that the sharers read it.
        max_tokens: The longest prompt and response, where that is less than a context.
    """

    receiver: Reader
    sharers: tuple[tuple[Reader, str], ...]
    fuse: str = "all"
    fuse_response: bool = False
    max_tokens: int | None = None

    @classmethod
    def of(cls, pair: CacheToCache) -> Self:
        """For models at hand."""
        sharers = [
            (Reader.of(one), fuser.config.token_alignment) for one, fuser in zip(pair.sharers, pair.fusers, strict=True)
        ]
        return cls(Reader.of(pair.receiver), tuple(sharers), pair.fusers[0].config.fuse, pair.fuse_response)

    @classmethod
    def load(cls, recipe: Recipe) -> Self:
        """For a recipe's models, of which only tokenizers and configurations are loaded."""
        receiver, sharer = Reader.load(recipe.receiver), Reader.load(recipe.sharer)
        how = token_alignment(recipe, tokenizer_hash(receiver.tokenizer) == tokenizer_hash(sharer.tokenizer))
        defaults, options = fuser_class(recipe.fuser.kind).config_class, recipe.fuser.options
        fuse, fuse_response = (options.get(name, getattr(defaults, name)) for name in ("fuse", "fuse_response"))
        return cls(receiver, ((sharer, how),), fuse, fuse_response, recipe.data.max_tokens)

    def encode(self, example: Example) -> EncodedExample:
        """Align the prompt and tokenize the response as it would follow it.

        Raises:
            TooLongError: A model has no room for what it reads.
            PromptError: See :func:`kvfuse.prompts.chat.render`.
        """
        sharers = [(sharer.tokenizer, how) for sharer, how in self.sharers]
        prompt = align(example.prompt, self.receiver.tokenizer, sharers, self.fuse)
        followed = sharers if self.fuse_response else []
        response = read_response(prompt, example.response, self.receiver.tokenizer, followed, example.ends)
        self.receiver.require_room(len(prompt.receiver.ids) + len(response.ids), "prompt and response", self.max_tokens)
        self._require_room(prompt, response.sharers)
        return EncodedExample(prompt, response.ids, response.sharers)

    def _require_room(self, prompt: AlignedRow, responses: tuple[tuple[np.ndarray, np.ndarray], ...]) -> None:
        for place, ((sharer, _), (reading, _)) in enumerate(zip(self.sharers, prompt.sharers, strict=True)):
            length = len(reading.ids) + (len(responses[place][0]) if responses else 0)
            sharer.require_room(length, "prompt and response" if responses else "the prompt", self.max_tokens)

    def fingerprint(self, *others: Any) -> str:
        """32 hex digits that change with anything that decides the encoded rows: tokenizers, templates, options, code."""
        readers = [self.receiver.identify(), *([*sharer.identify(), how] for sharer, how in self.sharers)]
        options = [
            self.fuse,
            self.fuse_response,
            self.max_tokens,
            *others,
            transformers.__version__,
            tokenizers.__version__,
        ]
        digest = hashlib.sha256(json.dumps([readers, options], sort_keys=True, default=str).encode())
        for module in ENCODING_MODULES:
            digest.update(source_of(module).read_bytes())
        return digest.hexdigest()[:32]


def source_of(module: str) -> Path:
    """The file of a module. Raises ModuleNotFoundError where it has moved, so that no fingerprint leaves it out unnoticed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"expected a module {module!r}, got none; correct ENCODING_MODULES")
    return Path(spec.origin)


def token_alignment(recipe: Recipe, identical: bool) -> str:
    """How a recipe's pair is aligned, by whether its tokenizers are identical."""
    return recipe.token_alignment if recipe.token_alignment != "auto" else default_token_alignment(identical)
