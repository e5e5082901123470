"""What a sharer reads of a response while the receiver writes it, token by token.

A sharer with the receiver's tokenizer reads the same ids. Under re-encoding it reads one id for each. Otherwise it
reads its own tokens of the text so far; where a new piece changes how the text before it is tokenized, it takes its
last ids back.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvfuse.prompts.chat_options import response_cuts
from kvfuse.prompts.reencode import REENCODINGS, reencoding
from kvfuse.prompts.tokenized import encode_cut

CONTEXT_TOKENS, CONTEXT_CHARACTERS = 16, 48  # within which a new piece may change the tokens before it


class ResponseTokens(Protocol):
    """Turns the receiver's tokens of one response into a sharer's."""

    def next(self, token: int) -> tuple[int, list[int]]:
        """How many of its last ids the sharer takes back after the receiver's next token, and the ids it then reads."""


def response_tokens(
    alignment: str,
    *,
    receiver: PreTrainedTokenizerBase,
    sharer: PreTrainedTokenizerBase,
    receiver_ids: list[int],
    text: str | None,
) -> ResponseTokens:
    """What follows a prompt.

    Args:
        alignment: How the sharer is aligned, one of :data:`kvfuse.prompts.alignment.TOKEN_ALIGNMENTS`.
        receiver: The receiver's tokenizer.
        sharer: The sharer's.
        receiver_ids: The prompt as the receiver reads it.
        text: The prompt as the sharer's template wrote it; None where the sharer has read the receiver's tokens.
    """
    if alignment == "identity":
        return SameTokens()
    if alignment in REENCODINGS:
        return ReencodedTokens(reencoding(receiver=receiver, sharer=sharer, strategy=alignment))
    ids = receiver_ids[-CONTEXT_TOKENS:]
    # The text, not what the ids decode to, of which a normaliser may have removed the last line break
    return RetokenizedText(receiver, sharer, ids, _decode(receiver, ids), (text or "")[-CONTEXT_CHARACTERS:])


class SameTokens:
    """The receiver's ids."""

    def next(self, token: int) -> tuple[int, list[int]]:
        return 0, [token]


@dataclass
class ReencodedTokens:
    """One id for each of the receiver's.

    Attributes:
        table: :func:`kvfuse.prompts.reencode.reencoding`.
    """

    table: np.ndarray

    def next(self, token: int) -> tuple[int, list[int]]:
        return 0, [int(self.table[token])]


@dataclass
class RetokenizedText:
    """The sharer's own tokens of the text so far.

    They are those of :func:`kvfuse.prompts.response.tokenize_continuation` for a whole response: behind the prompt, or
    separately where a token would span both.

    Attributes:
        receiver: Turns the receiver's ids into text.
        sharer: Turns text into the sharer's ids.
        ids: The receiver's last ids.
        text: Their text, as far as characters are whole.
        context: The last characters of the prompt that the sharer has read.
        response: The response so far.
        held: The sharer's ids of it.
    """

    receiver: PreTrainedTokenizerBase
    sharer: PreTrainedTokenizerBase
    ids: list[int]
    text: str
    context: str
    response: str = ""
    held: list[int] = field(default_factory=list)

    def next(self, token: int) -> tuple[int, list[int]]:
        ids = [*self.ids, token]
        text = _decode(self.receiver, ids)
        self.ids = ids
        if text.endswith("\ufffd") or len(text) <= len(self.text):  # half a character, or a token without text
            return 0, []
        # 1) Tokenize the response so far
        self.response += text[len(self.text) :]
        wanted = self._tokenize()
        # 2) Ids from the first difference on are taken back and read anew
        shared = min(len(self.held), len(wanted))
        same = next((i for i in range(shared) if self.held[i] != wanted[i]), shared)
        removed, self.held = len(self.held) - same, wanted
        # 3) Of the receiver's ids, those are kept that the next characters may need
        self.ids = ids[-CONTEXT_TOKENS:]
        self.text = _decode(self.receiver, self.ids)
        return removed, wanted[same:]

    def _tokenize(self) -> list[int]:
        # A token over prompt and response would change what the sharer has read of the prompt
        before, both = self._encode(self.context, len(self.context)), self._encode(self.context + self.response)
        if both[: len(before)] == before:
            return both[len(before) :]
        return self._encode(self.response, 0)

    def _encode(self, text: str, start: int | None = None) -> list[int]:
        """Ids of a text that holds the response from ``start`` on, by default behind the prompt's last characters."""
        cuts = response_cuts(text, len(self.context) if start is None else start, self.sharer)
        return encode_cut(text, self.sharer, cuts, add_special_tokens=False)[0]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
