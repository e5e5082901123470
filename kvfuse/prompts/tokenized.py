"""One model's tokenization of a prompt: its ids, and which characters each of them covers."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvfuse.prompts.chat import Prompt, RenderedPrompt, render


@dataclass(frozen=True)
class TokenizedPrompt:
    """One model's tokenization of one prompt.

    Attributes:
        ids: ``(n,)`` int64.
        offsets: ``(n, 2)`` int64, the characters of the text that each token covers; a piece of a character covers all of it.
        prompt: The text.
        pad_id: What to pad ``ids`` with.
        positions: ``(n,)`` int64, the position of each token, for RoPE.
    """

    ids: np.ndarray
    offsets: np.ndarray
    prompt: RenderedPrompt
    pad_id: int
    positions: np.ndarray


def read(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> TokenizedPrompt:
    """Render and tokenize a prompt for one model.

    Raises:
        PromptError: See :func:`kvfuse.prompts.chat.render`.
    """
    rendered = render(prompt, tokenizer)
    encoded = tokenizer(rendered.text, add_special_tokens=not rendered.templated, return_offsets_mapping=True)
    pairs = encoded["offset_mapping"]
    offsets = np.fromiter(chain.from_iterable(pairs), dtype=np.int64, count=2 * len(pairs)).reshape(
        -1, 2
    )  # 3.5 x np.array
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    if rendered.templated:  # else there are no special tokens in the text
        _release_space(offsets, ids, rendered.text, tokenizer)
    return TokenizedPrompt(
        ids, _cover_composed(offsets, rendered.text), rendered, tokenizer.pad_token_id or 0, np.arange(len(ids))
    )


def _release_space(offsets: np.ndarray, ids: np.ndarray, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep special tokens to their own text, in place. Some (phi-4's) swallow the white space beside them, a message's or not."""
    greedy = [token for token, added in tokenizer.added_tokens_decoder.items() if added.lstrip or added.rstrip]
    if not greedy:
        return
    for place in np.flatnonzero(np.isin(ids, greedy)):
        start, end = offsets[place]
        offsets[place] = end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())


def _cover_composed(offsets: np.ndarray, text: str) -> np.ndarray:
    """Let a token cover the characters that a normaliser composed into its last one: of ``e + \u0301`` it names only the e.

    They are those that no token covers. Spaces are never composed; some tokenizers leave them out of a word's offsets.
    """
    if text.isascii():
        return offsets
    starts, ends = offsets[offsets[:, 1] > offsets[:, 0]].T
    reach = np.maximum.accumulate(ends)
    following = np.append(starts[1:], len(text))
    gaps = np.array(
        [gap for gap in np.flatnonzero(following > reach) if not text[reach[gap]].isspace()], dtype=np.int64
    )
    if not len(gaps):
        return offsets
    gap = gaps[np.minimum(np.searchsorted(reach[gaps], offsets[:, 1]), len(gaps) - 1)]
    composed = (reach[gap] == offsets[:, 1]) & (offsets[:, 1] > offsets[:, 0])
    return np.stack([offsets[:, 0], np.where(composed, following[gap], offsets[:, 1])], axis=1)
