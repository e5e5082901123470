"""Examples -> token ids for every model, from their tokenizers alone."""

import hashlib
import importlib
import inspect
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.fusers import fuser_class
from kvfuse.language_model import LanguageModel, load_config, load_tokenizer, tokenizer_hash
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import align, default_token_alignment
from kvfuse.prompts.chat_options import ChatOptions, chat_options_of, set_chat_options
from kvfuse.prompts.response import tokenize_response
from kvfuse.stages.context import context_length, crosses, rope_switch
from kvfuse.training.data.columns import EncodedExample
from kvfuse.training.data.examples import Example
from kvfuse.training.recipe import Recipe

ENCODING_MODULES = (
    "kvfuse.support.files",
    "kvfuse.support.rows",
    "kvfuse.prompts.messages",
    "kvfuse.prompts.chat",
    "kvfuse.prompts.chat_options",
    "kvfuse.prompts.template_spans",
    "kvfuse.prompts.ends",
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
"""The code that decides the encoded rows: an edit of these modules, and of no other, encodes all data again."""


class TooLongError(PromptError):
    """An example that does not fit a model's context or ``data.max_tokens``."""


@dataclass(frozen=True)
class Reader:
    """The part of a model that encoding needs: its tokenizer, and the lengths that it can read.

    Attributes:
        name: Folder or Hub id.
        tokenizer: The model's.
        context: Its longest prompt in tokens.
        switch: See :func:`kvfuse.stages.context.rope_switch`.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    switch: int | None = None

    @classmethod
    def of(cls, model: LanguageModel) -> Self:
        return cls(model.name, model.tokenizer, model.context, rope_switch(model.model.config))

    @classmethod
    def load(cls, name: str, options: ChatOptions) -> Self:
        """Load without the weights. Raises PairError where tokenizer or configuration are missing."""
        config, tokenizer = load_config(name), load_tokenizer(name)
        set_chat_options(tokenizer, options)
        return cls(name, tokenizer, context_length(config), rope_switch(config))

    def require_room(self, length: int, what: str, max_tokens: int | None = None) -> None:
        """Raises TooLongError for a length beyond the context or ``max_tokens``."""
        # The tighter of the two limits, of which either may be missing
        room = min((limit for limit in (self.context, max_tokens) if limit is not None), default=length)
        if length > room:
            raise TooLongError(f"expected {what} to fit {room} tokens of {self.name}, got {length}; shorten them")

    def require_one_rope(self, *, prompt: int, response: int) -> None:
        """Raises TooLongError for a response that goes on where all keys of its prompt would be rotated otherwise."""
        if crosses(self.switch, read=prompt - 1, total=prompt + response):
            raise TooLongError(
                f"expected prompt and response to fit {self.switch} tokens of {self.name}, which rotates its keys "
                f"otherwise beyond, or a longer prompt, got {prompt} and {response}; shorten them"
            )

    def identify(self) -> list[Any]:
        """Everything that decides the ids it reads."""
        tokenizer = self.tokenizer
        return [
            tokenizer_hash(tokenizer),
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            self.context,
            self.switch,
            astuple(chat_options_of(tokenizer)),
        ]


@dataclass(frozen=True)
class Encoder:
    """Aligns prompts and tokenizes responses for a pair.

    Attributes:
        receiver: The model that answers.
        sharers: The models that only read, each with one of :data:`kvfuse.prompts.alignment.TOKEN_ALIGNMENTS`.
        fuse: The prompt positions to fuse, one of :data:`kvfuse.prompts.alignment.FUSE`.
        fuse_response: Whether the response is fused too, so that the sharers read it.
        max_tokens: Longest prompt and response together, where that is less than a context.
    """

    receiver: Reader
    sharers: tuple[tuple[Reader, str], ...]
    fuse: str = "all"
    fuse_response: bool = False
    max_tokens: int | None = None

    @classmethod
    def of(cls, pair: CacheToCache) -> Self:
        """The encoder for a loaded pair."""
        configs = [fuser.config for fuser in pair.fusers]
        sharers = zip(map(Reader.of, pair.sharers), (config.token_alignment for config in configs), strict=True)
        return cls(Reader.of(pair.receiver), tuple(sharers), configs[0].fuse, pair.fuse_response)

    @classmethod
    def load(cls, recipe: Recipe) -> Self:
        """The encoder for a recipe's models, of which only tokenizers and configurations are loaded."""
        chat_options = recipe.chat_options
        receiver, sharer = (Reader.load(name, chat_options) for name in (recipe.receiver, recipe.sharer))
        identical = tokenizer_hash(receiver.tokenizer) == tokenizer_hash(sharer.tokenizer)
        # Options that the recipe leaves out have the defaults of the fuser's configuration
        defaults, options = fuser_class(recipe.fuser.kind).config_class, recipe.fuser.options
        fuse, fuse_response = (options.get(name, getattr(defaults, name)) for name in ("fuse", "fuse_response"))
        alignment = token_alignment(recipe, identical)
        return cls(receiver, ((sharer, alignment),), fuse, fuse_response, recipe.data.max_tokens)

    def encode(self, example: Example) -> EncodedExample:
        """Align the prompt, and tokenize the response as it would follow the prompt.

        Raises:
            TooLongError: The example does not fit a model.
            PromptError: See :func:`kvfuse.prompts.chat.render`.
        """
        sharers = [(sharer.tokenizer, alignment) for sharer, alignment in self.sharers]
        # 1) The prompt for all models
        prompt = align(example.prompt, self.receiver.tokenizer, sharers, self.fuse)
        # 2) The response for the receiver, and for the sharers where it is fused too
        readers = sharers if self.fuse_response else []
        response = tokenize_response(prompt, example.response, self.receiver.tokenizer, readers, example.ends)
        # 3) Both must fit
        encoded = EncodedExample(prompt, response)
        self._require_room(encoded)
        return encoded

    def _require_room(self, example: EncodedExample) -> None:
        prompt, length = example.prompt, len(example.prompt.receiver.ids) + len(example.response.ids)
        self.receiver.require_room(length, "prompt and response", self.max_tokens)
        self.receiver.require_one_rope(prompt=len(prompt.receiver.ids), response=len(example.response.ids))
        what = "prompt and response" if example.response.sharers else "the prompt"
        sharers = zip(self.sharers, prompt.sharers, example.sharer_responses, strict=True)
        for (sharer, _), (tokens, _), (response_ids, _) in sharers:
            sharer.require_room(len(tokens.ids) + len(response_ids), what, self.max_tokens)

    def fingerprint(self, *others: Any) -> str:
        """32 hex digits that change with everything that decides the encoded rows: tokenizers, options, code."""
        # 1) Tokenizers, options and libraries
        readers = [self.receiver.identify(), *([*sharer.identify(), alignment] for sharer, alignment in self.sharers)]
        versions = transformers.__version__, tokenizers.__version__
        content = [readers, [self.fuse, self.fuse_response, self.max_tokens, *others, *versions]]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
        # 2) Our own code
        for module in ENCODING_MODULES:
            digest.update(source_of(module).read_bytes())
        return digest.hexdigest()[:32]


def source_of(module: str) -> Path:
    """The file of a module. Raises ModuleNotFoundError where it has moved, so that no fingerprint silently omits it."""
    return Path(inspect.getfile(importlib.import_module(module)))


def token_alignment(recipe: Recipe, identical: bool) -> str:
    """The token alignment of a recipe's pair; ``identical`` says whether the two tokenizers are."""
    return recipe.token_alignment if recipe.token_alignment != "auto" else default_token_alignment(identical)
