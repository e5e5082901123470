"""One model's tokenization of a prompt: its ids, and which characters each of them covers."""

from dataclasses import dataclass
from itertools import chain, pairwise
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.prompts.chat import RenderedPrompt, render
from kvfuse.prompts.chat_options import cuts
from kvfuse.prompts.messages import Prompt

_GREEDY: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, list[int]]] = WeakKeyDictionary()
"""Per tokenizer its length (tokens may be added) and the ids of special tokens that swallow adjacent white space."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """One model's tokenization of one prompt.

    Attributes:
        ids: ``(n,)`` int64.
        offsets: ``(n, 2)`` int64, the characters of the text that each token covers; a piece of a character covers all
            of it.
        prompt: The text.
        pad_id: The id to pad ``ids`` with.
        positions: ``(n,)`` int64, the position of each token, for RoPE.
        cuts: Where the text was cut, so that messages hold no special tokens
            (:attr:`kvfuse.prompts.chat_options.ChatOptions.escape_special_tokens`).
    """

    ids: np.ndarray
    offsets: np.ndarray
    prompt: RenderedPrompt
    pad_id: int
    positions: np.ndarray
    cuts: tuple[int, ...] = ()


def tokenize(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> TokenizedPrompt:
    """Render and tokenize a prompt for one model.

    Raises:
        PromptError: See :func:`kvfuse.prompts.chat.render`.
    """
    rendered = render(prompt, tokenizer)
    marks = cuts(rendered.text, rendered.spans, tokenizer)
    listed, edges_of = encode_cut(rendered.text, tokenizer, marks, add_special_tokens=not rendered.templated)
    ids = np.array(listed, dtype=np.int64)  # (n,)
    edges = chain.from_iterable(edges_of)  # np.fromiter takes a third of the time of np.array
    offsets = np.fromiter(edges, dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)  # (n, 2)
    if rendered.templated:  # plain text contains no special tokens
        _release_space(offsets, ids, rendered.text, tokenizer)
    if not rendered.text.isascii():
        offsets = _cover_composed(offsets, rendered.text)
    return TokenizedPrompt(ids, offsets, rendered, tokenizer.pad_token_id or 0, np.arange(len(ids)), marks)


def encode_cut(
    text: str, tokenizer: PreTrainedTokenizerBase, marks: tuple[int, ...], *, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a text that is tokenized in parts; special tokens are added to the first alone."""
    if not marks:
        encoded = encode(text, tokenizer, add_special_tokens=add_special_tokens)
        return encoded.ids, encoded.offsets
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in pairwise((0, *marks, len(text))):
        encoded = encode(text[start:end], tokenizer, add_special_tokens=add_special_tokens and start == 0)
        ids += encoded.ids
        offsets += [(first + start, last + start) for first, last in encoded.offsets]
    return ids, offsets


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> Encoding:
    """Tokenize a text in this thread: a quarter of the time of ``tokenizer(text)``, which hands it to a pool.

    Raises:
        PromptError: The text has a lone surrogate, half of a character, which tokenizers cannot read.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"expected a text of whole characters, got the lone surrogate {text[error.start]!a} "
            f"at character {error.start}; decode the text as UTF-8"
        ) from error
    return backend(tokenizer).encode(text, add_special_tokens=add_special_tokens)


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A fast tokenizer's backend, reset as ``tokenizer(text)`` would: earlier calls leave their settings in it."""
    rust = tokenizer.backend_tokenizer
    if rust.padding or rust.truncation:
        rust.no_padding()
        rust.no_truncation()
    if rust.encode_special_tokens != tokenizer.split_special_tokens:
        rust.encode_special_tokens = tokenizer.split_special_tokens
    return rust


def _release_space(offsets: np.ndarray, ids: np.ndarray, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep special tokens to their own text, in place: some (phi-4's) swallow adjacent spaces, even a message's."""
    size, greedy = _GREEDY.get(tokenizer, (0, []))
    if size != len(tokenizer):  # listing the added tokens takes longer than tokenizing a short prompt
        greedy = [token for token, added in tokenizer.added_tokens_decoder.items() if added.lstrip or added.rstrip]
        _GREEDY[tokenizer] = len(tokenizer), greedy
    for index in np.flatnonzero(np.isin(ids, greedy)) if greedy else ():
        start, end = offsets[index]
        offsets[index] = end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())


def _cover_composed(offsets: np.ndarray, text: str) -> np.ndarray:
    """Let a token cover the characters that a normaliser composed into its last one: of ``e + \u0301`` it names only
    the e.

    They are those that no token covers. Spaces are never composed; some tokenizers leave them out of a word's offsets.
    """
    # 1) Gaps between what all tokens so far cover and the start of the next token
    starts, ends = offsets[offsets[:, 1] > offsets[:, 0]].T
    reach = np.maximum.accumulate(ends)
    following = np.append(starts[1:], len(text))
    gaps = np.array(
        [gap for gap in np.flatnonzero(following > reach) if not text[reach[gap]].isspace()], dtype=np.int64
    )
    if not len(gaps):
        return offsets
    # 2) The tokens that end where a gap begins reach to its end
    gap = gaps[np.minimum(np.searchsorted(reach[gaps], offsets[:, 1]), len(gaps) - 1)]
    composed = (reach[gap] == offsets[:, 1]) & (offsets[:, 1] > offsets[:, 0])
    return np.stack([offsets[:, 0], np.where(composed, following[gap], offsets[:, 1])], axis=1)
