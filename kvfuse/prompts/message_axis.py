"""Positions of tokens in the messages of a chat, on one axis of characters that all models share.

The messages alone stand on the axis, one after the other, each with its full length, however much of it a template
writes.

```
messages    "Oslo"  "is it"
text        [user]Oslo[assistant] is it           a template and its two messages
axis              0123            45678
section     0     1   2           3    4          even: the template before a message, odd: the message
```
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from kvfuse.prompts.chat import RenderedPrompt
from kvfuse.prompts.tokenized import TokenizedPrompt


class AxisSpan(NamedTuple):
    """A span of a text, its position on the axis, and the rank of its message there."""

    start: int
    end: int
    axis_start: int
    axis_end: int
    rank: int


@dataclass(frozen=True)
class TokensOnAxis:
    """The tokens of one prompt on the axis.

    Attributes:
        tokenized: The prompt.
        spans: Its spans, in the order of its text.
        characters: ``(n, 2)`` int64, the first character that each token covers and one past the last; zeros for a
            token of the template.
    """

    tokenized: TokenizedPrompt
    spans: Sequence[AxisSpan]
    characters: np.ndarray

    @property
    def in_message(self) -> np.ndarray:
        """``(n,)`` bool: the token covers characters of a message."""
        starts, ends = self.characters.T
        return ends > starts

    @property
    def middle_sections(self) -> np.ndarray:
        """``(n,)`` int64, never decreasing: the section in which each token's middle stands."""
        first, last = self.tokenized.offsets.T
        return self._sections(first + last)

    @cached_property
    def sections(self) -> np.ndarray:
        """``(n,)`` int64, never decreasing: the section of each token; the message's if it covers both."""
        # 1) The section of the first character, or of the message that a token covers
        first, last = self.tokenized.offsets.T
        section = self._sections(first + np.minimum(last, first + 1))
        section = np.where(self.in_message, section | 1, section)
        # 2) A token without characters, behind a message's last token, belongs to the template behind it
        following = np.where(self.in_message, section, section.max(initial=0) + 1)[::-1]
        ended = np.minimum.accumulate(following)[::-1] != section
        return np.where((section % 2 == 1) & ended, section + 1, section)

    def _sections(self, doubled: np.ndarray) -> np.ndarray:
        """Sections of points of the text, given doubled; a point on an edge belongs to what comes before it."""
        edges = [2 * edge for span in self.spans for edge in (span.start, span.end)]
        sections = [2 * span.rank + inside for span in self.spans for inside in (0, 1)]
        sections.append(2 * len(self.tokenized.prompt.messages))
        found = np.array(sections)[np.array(edges, dtype=np.int64).searchsorted(doubled)]  # (n,)
        return np.maximum.accumulate(found)  # what a template writes within a message belongs to the message


def message_order(prompt: RenderedPrompt) -> list[int]:
    """Numbers of the messages in the order of the text; one that the template leaves out follows the one before it."""
    first = {span.message: span.start for span in reversed(prompt.spans)}
    starts = [-1]
    for message in range(len(prompt.messages)):
        starts.append(first.get(message, starts[-1]))
    return sorted(range(len(prompt.messages)), key=starts[1:].__getitem__)


def locate(tokenized: TokenizedPrompt, order: Sequence[int] | None = None, drop_moved: bool = False) -> TokensOnAxis:
    """Find the tokens of a prompt on the axis.

    Args:
        tokenized: The prompt.
        order: Numbers of the messages in the order of the axis; by default that of the prompt's own text.
        drop_moved: Leave to the template what it writes in another order than that of the axis, or again.
    """
    spans = _axis_spans(tokenized.prompt, message_order(tokenized.prompt) if order is None else order)
    if drop_moved:
        spans = _drop_moved(spans)
    # 1) The last span that begins before the end of each token; before the first there is an empty one
    table = np.array([(0, 0, 0), *((span.start, span.end, span.axis_start - span.start) for span in spans)])
    first, last = tokenized.offsets.T
    start, end, shift = table[table[1:, 0].searchsorted(last)].T  # (n,) each
    # 2) The part of the token within it
    begins, ends = np.maximum(first, start) + shift, np.minimum(last, end) + shift
    covers = ends > begins
    # 3) A token that begins in an earlier span covers both, where nothing else stands between them on the axis
    _, earlier_end, earlier_shift = table[table[1:, 0].searchsorted(first, side="right")].T
    earlier = first + earlier_shift
    touches_both = covers & (first < start) & (first < earlier_end)
    begins = np.where(touches_both & (earlier < begins) & (ends - earlier <= last - first), earlier, begins)
    return TokensOnAxis(tokenized, spans, np.array([begins * covers, ends * covers]).T)


def covered(tokenized: TokenizedPrompt, tokens: np.ndarray | slice = slice(None)) -> np.ndarray:
    """``(characters,)`` bool: the characters of the messages, in the order of the chat, that the tokens cover."""
    starts, ends = locate(tokenized, range(len(tokenized.prompt.messages))).characters[tokens].T
    size = sum(map(len, tokenized.prompt.messages)) + 1
    opened, closed = (np.bincount(edges, minlength=size) for edges in (starts, ends))
    return np.cumsum(opened - closed)[:-1] > 0


def _axis_spans(prompt: RenderedPrompt, order: Sequence[int]) -> list[AxisSpan]:
    """The spans of a prompt on an axis where its messages stand in this order."""
    lengths = [len(prompt.messages[message]) for message in order]
    ranks = {message: rank for rank, message in enumerate(order)}
    origins = dict(zip(order, accumulate(lengths, initial=0), strict=False))
    spans = []
    for span in prompt.spans:
        axis_start = origins[span.message] + span.offset
        axis_end = axis_start + span.end - span.start
        spans.append(AxisSpan(span.start, span.end, axis_start, axis_end, ranks[span.message]))
    return spans


def _drop_moved(spans: Sequence[AxisSpan]) -> list[AxisSpan]:
    """The spans without those that go back on the axis, or those that run ahead, whichever are shorter."""
    reached = accumulate((span.axis_end for span in spans), max, initial=0)
    forward = [span for span, limit in zip(spans, reached, strict=False) if span.axis_start >= limit]
    # the same from the end
    ahead = accumulate((span.axis_start for span in reversed(spans)), min, initial=math.inf)
    waiting = [span for span, limit in zip(reversed(spans), ahead, strict=False) if span.axis_end <= limit][::-1]
    return max(forward, waiting, key=lambda kept: sum(span.end - span.start for span in kept))
