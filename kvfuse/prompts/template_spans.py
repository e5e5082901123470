"""Which characters of a rendered chat come from which message, for any chat template.

A template is a program: it may trim, split, drop, repeat or move the text of a message, so searching the output for the
messages is not enough. Instead the chat is rendered again with a mark, a code point that occurs nowhere else, in place
of every character. A mark in the output shows which character of which message stands there in the real text.

```
messages     user "hi"    assistant " yes"     [user]hi[assistant]yes        a template that trims
all marked   user "①②"    assistant "③④⑤⑥"     [user]①②[assistant]③④⑤⑥      another layout: ③ is no space
space left   user "①②"    assistant "␣④⑤⑥"     [user]①②[assistant]④⑤⑥       the same; ␣ is another kind of space
```

A template must find in the marked messages what it looks for in the real ones. So where the layouts differ, spaces and
then the template's own words (``</think>``) are left unmarked: as few as possible, and in all messages of a role alike.

A layout that marks alone have shown is worth keeping: the next chat of the same shape is rendered only once
(:class:`Layout`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from kvfuse.errors import PromptError

FIRST_MARK, LAST_MARK = 0x40000, 0x10FFFF  # unassigned and private planes: no letters, digits or spaces
SPACES = [code for code in range(0x3001) if chr(code).isspace()]
BREAKS = [code for code in SPACES if len(f"a{chr(code)}b".splitlines()) == 2]
ESCAPED = r"""[\s\x00-\x1f"'\\&<>]"""  # characters that JSON and HTML escape
NOT_A_WORD = r"[\W_]"


@dataclass(frozen=True)
class Span:
    """Characters of a text that come from a message: ``text[start:end] == messages[message][offset:][: end - start]``.

    Attributes:
        start: First character in the text.
        end: One past the last.
        message: The message's number.
        offset: First character in the message.
    """

    start: int
    end: int
    message: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """The text that a template writes around whole messages, for all chats of one shape.

    ```
    text        [user]hi[assistant]yes[user]
    literals    "[user]"  "[assistant]"  "[user]"
    order             0              1
    ```

    A shape is all that a template is given but the characters of the messages. What it makes of marks depends on
    nothing else, so every chat of the shape, marked, is ``literals`` with marks between them. :func:`find_spans`
    accepts that where the real text has the same literals at the same positions, and between them the messages.
    :meth:`find` makes the same test without rendering the marks: no separator is searched for, all positions follow
    from lengths. (The exception would be a template that depends on the length of a message, beyond whether it is
    empty.)

    Attributes:
        literals: What the template writes before, between and after the messages.
        order: Numbers of the messages in the order of the text, one fewer than literals.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]

    @classmethod
    def measured(cls, text: str, contents: Sequence[str], spans: Sequence[Span]) -> Self | None:
        """The layout of a measured text; None unless every span is a whole message, each at most once."""
        order = tuple(span.message for span in spans)
        if len(set(order)) < len(order) or any(span.end - span.start < len(contents[span.message]) for span in spans):
            return None
        starts, ends = [0, *(span.end for span in spans)], [*(span.start for span in spans), len(text)]
        return cls(tuple(text[start:end] for start, end in zip(starts, ends, strict=True)), order)

    def find(self, text: str, contents: Sequence[str]) -> tuple[Span, ...] | None:
        """Spans of the messages in a text of this layout; None where the text has another layout."""
        spans, expected = [], self.literals[0]
        for message, literal in zip(self.order, self.literals[1:], strict=True):
            spans.append(Span(len(expected), len(expected) + len(contents[message]), message, 0))
            expected += contents[message] + literal
        return tuple(spans) if text == expected else None


@dataclass(frozen=True)
class Rendering:
    """A rendered chat. Characters are code points; those of all messages stand in one row.

    Attributes:
        text: ``(n,)`` int64, what the template made of the messages.
        characters: ``(m,)`` int64, the characters of the messages.
        owner: ``(m,)`` int64, the number of the message that each of them belongs to.
        marks: Sorted code points that occur in neither.
        render: Renders the chat with as many other characters in place of ``characters``.
    """

    text: np.ndarray
    characters: np.ndarray
    owner: np.ndarray
    marks: np.ndarray
    render: Callable[[str], str]


@dataclass(frozen=True)
class Hint:
    """Characters of the messages that a template may see unmarked: ``codes (m,)`` where ``mask (m,)``."""

    mask: np.ndarray
    codes: np.ndarray


def find_spans(
    *, text: str, contents: Sequence[str], roles: Sequence[str], words: Iterable[str], render: Callable[[str], str]
) -> tuple[tuple[Span, ...], Layout | None]:
    """Find the messages in the text that a template made of them.

    Args:
        text: The rendered chat.
        contents: The text of each message.
        roles: The role of each message.
        words: Strings that the template may look for in a message.
        render: Renders the chat with as many other characters in place of ``"".join(contents)``.

    Returns:
        The spans in the order of the text: one of each message, several (the template leaves out its middle, or repeats
        it) or none. The layout, where marks alone have shown whole messages.

    Raises:
        PromptError: The template writes other characters than the messages have.
    """
    written, characters = _codes(text), _codes("".join(contents))
    owner = np.repeat(np.arange(len(contents)), [len(content) for content in contents])
    rendering = Rendering(
        written, characters, owner, _marks(np.concatenate([written, characters]), len(characters)), render
    )
    for hints in _hint_sets(rendering, roles, words):
        source = _trace(rendering, hints)
        if source is not None:
            spans = _spans(rendering, _drop_hints(rendering, hints, source))
            return spans, None if hints else Layout.measured(text, contents, spans)
    raise PromptError(
        "expected a chat template that keeps the characters of messages, got one that rewrites them; "
        "give plain strings, or use another"
    )


def _hint_sets(rendering: Rendering, roles: Sequence[str], words: Iterable[str]) -> Iterator[list[Hint]]:
    """Hints to try, from none to all that might matter."""
    yield []
    spaces = list(_hints(rendering, roles, [r"\s"], _swap_spaces(rendering.characters)))
    yield spaces
    longest_first = sorted(filter(None, words), key=len, reverse=True)
    patterns = [*map(re.escape, longest_first), ESCAPED, NOT_A_WORD]
    yield [*spaces, *_hints(rendering, roles, patterns, rendering.characters)]


def _hints(rendering: Rendering, roles: Sequence[str], patterns: Sequence[str], codes: np.ndarray) -> Iterator[Hint]:
    """One hint for every pattern and role in whose messages it is found."""
    characters = _text(rendering.characters)
    by_role = {role: np.array([other == role for other in roles])[rendering.owner] for role in roles}
    for pattern in dict.fromkeys(patterns):
        found = np.zeros(len(characters), dtype=bool)
        for match in re.finditer(pattern, characters, re.IGNORECASE):
            found[match.start() : match.end()] = True
        yield from (Hint(found & mask, codes) for mask in by_role.values() if (found & mask).any())


def _drop_hints(rendering: Rendering, hints: list[Hint], source: np.ndarray) -> np.ndarray:
    """The trace without the hints that the template does not need: marks are proof, the rest is inferred."""
    for hint in reversed(hints):
        fewer = [other for other in hints if other is not hint]
        found = _trace(rendering, fewer)
        if found is not None:
            hints, source = fewer, found
    return source


def _trace(rendering: Rendering, hints: Sequence[Hint]) -> np.ndarray | None:
    """Render the chat with marks, and see where they come out.

    Returns:
        ``(n,)`` int64, for each character of the text its index in ``characters``, or -1; None where the
        layout is another.
    """
    # 1) Marks in place of all characters but those that a hint shows
    text, characters = rendering.text, rendering.characters
    shown = rendering.marks[np.arange(len(characters)) % len(rendering.marks)]  # (m,)
    for hint in hints:
        shown = np.where(hint.mask, hint.codes, shown)
    try:
        marked = _codes(rendering.render(_text(shown)))
    except PromptError:  # the template refuses marked messages
        return None
    if len(marked) != len(text):
        return None
    # 2) The layout is the same where each mark stands for the character of the real text, and all else is equal
    source = _read_marks(rendering, marked)
    swapped = (marked != text) & (marked == _swap_spaces(text)) if hints else np.zeros(len(text), dtype=bool)
    if not np.where(source >= 0, characters[source] == text, (marked == text) | swapped).all():
        return None
    # 3) Unmarked characters of messages are inferred from their neighbours
    return _fill(rendering, source, swapped, shown == characters) if hints else source


def _read_marks(rendering: Rendering, marked: np.ndarray) -> np.ndarray:
    """``(n,)`` int64: the index in ``characters`` that each mark stands for, -1 for other characters.

    Messages longer than there are marks use them again; then the index nearest to the previous mark's is meant.
    """
    nearest = np.minimum(np.searchsorted(rendering.marks, marked), len(rendering.marks) - 1)
    is_mark = (rendering.marks[nearest] == marked) & (nearest < len(rendering.characters))
    source = np.full(len(marked), -1)
    if is_mark.any():
        indices = nearest[is_mark]
        if len(rendering.marks) < len(rendering.characters):
            indices = np.clip(np.unwrap(indices, period=len(rendering.marks)), 0, len(rendering.characters) - 1)
        source[is_mark] = indices
    return source


def _fill(rendering: Rendering, source: np.ndarray, swapped: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Add the unmarked characters of messages: those between two marks, and those that continue from one.

    Args:
        rendering: The chat.
        source: ``(n,)``, the index of each marked character in ``characters``, or -1.
        swapped: ``(n,)`` bool, spaces of the text that change with the messages.
        kept: ``(m,)`` bool, characters that are shown as they are.
    """
    text, characters, owner, last = rendering.text, rendering.characters, rendering.owner, len(rendering.characters) - 1
    sure = swapped | ~np.isin(text, SPACES)  # a space that did not change may be the template's
    mirrored = _mirror(source, last)
    # 1) The message read on from the mark before, and backwards from the mark behind
    after = _continue(text, characters, owner, source)
    before = _mirror(_continue(text[::-1], characters[::-1], owner[::-1], mirrored), last)
    # 2) Both agree between two marks of one message; beyond its outer marks, only an unbroken run is believed
    between = np.where(after == before, after, -1)
    following = _unbroken(after, source, swapped | kept[after], sure)
    leading = _mirror(_unbroken(_mirror(before, last), mirrored, (swapped | kept[before])[::-1], sure[::-1]), last)
    for found in (between, following):
        source = np.where(source >= 0, source, found)
    # 3) Characters that lead up to a mark must not be found a second time
    previous = source[_latest(source >= 0)]
    twice = (previous >= 0) & (owner[previous] == owner[leading]) & (previous >= leading)
    return np.where((source >= 0) | twice, source, leading)


def _continue(text: np.ndarray, characters: np.ndarray, owner: np.ndarray, source: np.ndarray) -> np.ndarray:
    """``(n,)``: the index in ``characters`` if the message went on from the mark before; -1 where the text differs."""
    mark = _latest(source >= 0)
    onward = source[mark] + np.arange(len(text)) - mark
    exists = (mark >= 0) & (onward < len(characters))
    onward = np.where(exists, onward, 0)
    return np.where(exists & (owner[onward] == owner[source[mark]]) & (characters[onward] == text), onward, -1)


def _unbroken(found: np.ndarray, source: np.ndarray, allowed: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """``found`` where all characters since the mark before are allowed, up to the last sure one; else -1."""
    good = (found >= 0) & allowed & (source < 0)
    good &= _latest(source >= 0) > _latest(~good & (source < 0))
    sure_from_end, break_from_end = _latest((good & sure)[::-1]), _latest(~good[::-1])
    return np.where(good & (sure_from_end > break_from_end)[::-1], found, -1)


def _latest(condition: np.ndarray) -> np.ndarray:
    """For each index the last one up to it where the condition holds, or -1."""
    return np.maximum.accumulate(np.where(condition, np.arange(len(condition)), -1))


def _mirror(source: np.ndarray, last: int) -> np.ndarray:
    """The same trace with text and messages read backwards."""
    return np.where(source >= 0, last - source, -1)[::-1]


def _spans(rendering: Rendering, source: np.ndarray) -> tuple[Span, ...]:
    """Runs of characters that follow each other in the text and in one message."""
    owner, inside = rendering.owner[source], source >= 0
    goes_on = inside[1:] & inside[:-1] & (np.diff(source) == 1) & (np.diff(owner) == 0)
    starts = np.flatnonzero(inside & ~np.insert(goes_on, 0, False))
    ends = np.flatnonzero(inside & ~np.append(goes_on, False)) + 1
    origins = np.searchsorted(rendering.owner, owner[starts])
    return tuple(map(Span, starts.tolist(), ends.tolist(), owner[starts].tolist(), (source[starts] - origins).tolist()))


def _marks(used: np.ndarray, count: int) -> np.ndarray:
    """Unused code points, twice ``count`` where there are as many: then a jump cannot be mistaken for one back."""
    taken = np.unique(used[used >= FIRST_MARK])
    most = np.arange(FIRST_MARK, min(FIRST_MARK + 2 * count + len(taken), LAST_MARK + 1))
    return np.setdiff1d(most, taken, assume_unique=True)


def _swap_spaces(codes: np.ndarray) -> np.ndarray:
    """Every space as another space and every line break as another line break."""
    space = np.where(codes == 0x2003, 0x2002, 0x2003)
    line_break = np.where(codes == 0x2028, 0x2029, 0x2028)
    return np.where(np.isin(codes, BREAKS), line_break, np.where(np.isin(codes, SPACES), space, codes))


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)


def _text(codes: np.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
