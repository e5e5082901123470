"""Where a tokenization stands in the messages, on one axis of characters that all models share.

On the axis stand the messages alone, one after the other, each with its own length, however much of it a template writes.

```
messages    "Oslo"  "is it"
text        [user]Oslo[assistant] is it           a template and its two messages
axis              0123            45678
section     0     1   2           3    4          even: the template before a message, odd: the message
```
"""

from dataclasses import replace

import numpy as np

from kvfuse.prompts.chat import RenderedPrompt
from kvfuse.prompts.tokenized import TokenizedPrompt


def message_order(prompt: RenderedPrompt) -> np.ndarray:
    """``(messages,)``: the rank of each message in the text; one that the template leaves out follows the one before it."""
    first = np.full(len(prompt.messages), -1)
    for span in reversed(prompt.spans):
        first[span.message] = span.start
    written = np.maximum.accumulate(np.where(first >= 0, np.arange(len(first)), 0))
    return np.argsort(np.argsort(first[written], kind="stable"))


def on_axis(prompt: RenderedPrompt, rank: np.ndarray) -> np.ndarray:
    """``(k, 4)``: start and end of each span, the rank of its message, and its start on an axis that all models share.

    On the axis stand the messages alone, by rank, each with its own length, however much of it the template writes.
    """
    spans = np.array(
        [(span.start, span.end, span.message, span.offset) for span in prompt.spans], dtype=np.int64
    ).reshape(-1, 4)
    lengths = np.zeros(len(rank) + 1, dtype=np.int64)
    lengths[rank + 1] = [len(content) for content in prompt.messages]
    spans[:, 2] = rank[spans[:, 2]]
    spans[:, 3] += np.cumsum(lengths)[spans[:, 2]]
    return spans


def own_spans(prompt: RenderedPrompt) -> np.ndarray:
    """:func:`on_axis` in the order of the prompt's own text."""
    return on_axis(prompt, message_order(prompt))


def drop_moved(spans: np.ndarray) -> np.ndarray:
    """The spans that stand in the text as on the axis. What this template writes elsewhere, or again, is left to it.

    Either the spans that go back are dropped or those that run ahead, whichever are shorter.
    """
    sizes = spans[:, 1] - spans[:, 0]
    starts, ends = spans[:, 3], spans[:, 3] + sizes
    reached = np.maximum.accumulate(np.append(0, ends))[:-1]
    ahead = np.minimum.accumulate(np.append(starts, ends.max(initial=0))[::-1])[::-1][1:]
    return spans[max(starts >= reached, ends <= ahead, key=lambda kept: sizes[kept].sum())]


def in_messages(reading: TokenizedPrompt, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token's first and last character on the axis of :func:`on_axis`. A token of the template covers nothing."""
    spans = np.vstack([np.zeros(4, dtype=np.int64), spans])  # before the first there is an empty one
    start, end, _, axis = spans[
        np.searchsorted(spans[:, 0], reading.offsets[:, 1]) - 1
    ].T  # the last that begins before
    first, last = np.clip(reading.offsets, start[:, None], end[:, None]).T
    inside = last > first
    return np.where(inside, first - start + axis, 0), np.where(inside, last - start + axis, 0)


def sections(reading: TokenizedPrompt, spans: np.ndarray) -> np.ndarray:
    """``(n,)``, never decreasing: 2k for a token of the template before the k-th message, 2k + 1 for all within that message."""
    section = np.append(np.column_stack([2 * spans[:, 2], 2 * spans[:, 2] + 1]), 2 * len(reading.prompt.messages))
    middles = reading.offsets.sum(axis=1)  # doubled; a token without characters belongs to what comes before it
    places = np.searchsorted(2 * spans[:, :2].reshape(-1), middles, side="left")
    return np.maximum.accumulate(section[places])  # what the template writes inside a message belongs to it


def places(reading: TokenizedPrompt, spans: np.ndarray) -> np.ndarray:
    """Where each token stands, ``(n,)`` int64, never decreasing: 2k in the template before message k, 2k + 1 in message k.

    A token that covers both is the message's, and so is what a template writes within a message.
    """
    starts, ends = reading.offsets.T
    section = sections(replace(reading, offsets=np.stack([starts, np.minimum(ends, starts + 1)], axis=1)), spans)
    first, last = in_messages(reading, spans)
    covers = last > first
    section = np.where(covers, section | 1, section)
    coming = np.minimum.accumulate(np.where(covers, section, section.max(initial=0) + 1)[::-1])[::-1]
    return np.where(
        (section % 2 == 1) & (coming != section), section + 1, section
    )  # a token without characters, behind a message


def covered(reading: TokenizedPrompt, tokens: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Which characters of the messages, in the order of the chat, the tokens cover, ``(characters,)`` bool."""
    size = sum(map(len, reading.prompt.messages)) + 1
    spans = on_axis(reading.prompt, np.arange(len(reading.prompt.messages)))
    starts, ends = (edges[tokens] for edges in in_messages(reading, spans))
    return np.cumsum(np.bincount(starts, minlength=size) - np.bincount(ends, minlength=size))[:-1] > 0
