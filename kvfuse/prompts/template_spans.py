"""Which characters of a rendered chat come from which message, for any chat template.

A template is a program: it may trim, split, drop, repeat or move what a message says, so a message's own words are never
looked for in the text. Instead the chat is rendered again with a mark, a code point that stands nowhere else, in place of
every character; wherever it comes out, that character of that message stands in the real text.

```
messages     user "hi"    assistant " yes"     [user]hi[assistant]yes        a template that trims
all marked   user "①②"    assistant "③④⑤⑥"     [user]①②[assistant]③④⑤⑥      another layout: ③ is no space
space left   user "①②"    assistant "␣④⑤⑥"     [user]①②[assistant]④⑤⑥       the same; ␣ is another kind of space
```

What a template looks for in a message, it must find in the marked one too. So where the layouts differ, spaces and then the
template's own words (``</think>``) are left for it to see: no more of them than it takes, in all messages of a role alike.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvfuse.errors import PromptError

FIRST_MARK, LAST_MARK = 0x40000, 0x10FFFF  # unassigned and private planes: no letters, digits or spaces
SPACES = [code for code in range(0x3001) if chr(code).isspace()]
BREAKS = [code for code in SPACES if len(f"a{chr(code)}b".splitlines()) == 2]
ESCAPED = r"""[\s\x00-\x1f"'\\&<>]"""  # what JSON and HTML write differently
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
class Rendering:
    """A rendered chat. Characters are code points, those of all messages in one row.

    Attributes:
        text: ``(n,)``, what the template made of the messages.
        said: ``(m,)``, what the messages say.
        owner: ``(m,)``, the message that each character of ``said`` belongs to.
        marks: Sorted code points that are in neither.
        again: Renders the chat with other characters, as many, in place of ``said``.
    """

    text: np.ndarray
    said: np.ndarray
    owner: np.ndarray
    marks: np.ndarray
    again: Callable[[str], str]


@dataclass(frozen=True)
class Aid:
    """What a template may see of marked messages: ``codes (m,)`` instead of marks where ``mask (m,)``."""

    mask: np.ndarray
    codes: np.ndarray


def find_spans(
    text: str, contents: Sequence[str], roles: Sequence[str], words: Iterable[str], again: Callable[[str], str]
) -> tuple[Span, ...]:
    """Find the messages in the text that a template made of them, in the order of the text.

    A message has one span, several (the template leaves out its middle, or repeats it) or none.

    Args:
        text: The rendered chat.
        contents: What each message says.
        roles: Who says it.
        words: What the template may look for in a message.
        again: Renders the chat with other characters, as many, in place of ``"".join(contents)``.

    Raises:
        PromptError: The template writes other characters than the messages have, or leaves all messages out.
    """
    written, said = _codes(text), _codes("".join(contents))
    owner = np.repeat(np.arange(len(contents)), [len(content) for content in contents])
    rendering = Rendering(written, said, owner, _marks(np.concatenate([written, said]), len(said)), again)
    for aids in _choices(rendering, roles, words):
        source = _trace(rendering, aids)
        if source is not None:
            return _spans(rendering, _with_fewer(rendering, aids, source))
    raise PromptError(
        "expected a chat template that keeps the characters of messages, got one that rewrites them; give plain strings, or use another"
    )


def _choices(rendering: Rendering, roles: Sequence[str], words: Iterable[str]) -> Iterator[list[Aid]]:
    """What to leave for a template to see, from nothing to all that might matter."""
    yield []
    spaces = list(_aids(rendering, roles, [r"\s"], _swap_spaces(rendering.said)))
    yield spaces
    longest_first = sorted(filter(None, words), key=len, reverse=True)
    yield [*spaces, *_aids(rendering, roles, [*map(re.escape, longest_first), ESCAPED, NOT_A_WORD], rendering.said)]


def _aids(rendering: Rendering, roles: Sequence[str], patterns: Sequence[str], codes: np.ndarray) -> Iterator[Aid]:
    """One for every role and every pattern that is found in its messages."""
    said = _text(rendering.said)
    spoken = {role: np.array([other == role for other in roles])[rendering.owner] for role in roles}
    for pattern in dict.fromkeys(patterns):
        found = np.zeros(len(said), dtype=bool)
        for match in re.finditer(pattern, said, re.IGNORECASE):
            found[match.start() : match.end()] = True
        yield from (Aid(found & mask, codes) for mask in spoken.values() if (found & mask).any())


def _with_fewer(rendering: Rendering, aids: list[Aid], source: np.ndarray) -> np.ndarray:
    """The trace without the aids that the template does not need: what is marked is known, the rest is inferred."""
    needed = aids
    for aid in reversed(aids):
        fewer = [other for other in needed if other is not aid]
        found = _trace(rendering, fewer)
        if found is not None:
            needed, source = fewer, found
    return source


def _trace(rendering: Rendering, aids: Sequence[Aid]) -> np.ndarray | None:
    """``(n,)``, for each character of the text its place in ``said``, -1: the template's; None: the layout is another."""
    text, said = rendering.text, rendering.said
    shown = rendering.marks[np.arange(len(said)) % len(rendering.marks)]
    for aid in aids:
        shown = np.where(aid.mask, aid.codes, shown)
    try:
        marked = _codes(rendering.again(_text(shown)))
    except PromptError:  # the template refuses marked messages
        return None
    if len(marked) != len(text):
        return None
    source = _read_marks(rendering, marked)
    swapped = (marked != text) & (marked == _swap_spaces(text)) if aids else np.zeros(len(text), dtype=bool)
    if not np.where(source >= 0, said[source] == text, (marked == text) | swapped).all():
        return None
    return _fill(rendering, source, swapped, shown == said) if aids else source


def _read_marks(rendering: Rendering, marked: np.ndarray) -> np.ndarray:
    """``(n,)``: the place that each mark stands for, -1 for other characters.

    Messages longer than there are marks use them again; then the place nearest to the previous mark's is meant.
    """
    nearest = np.minimum(np.searchsorted(rendering.marks, marked), len(rendering.marks) - 1)
    is_mark = (rendering.marks[nearest] == marked) & (nearest < len(rendering.said))
    source = np.full(len(marked), -1)
    if is_mark.any():
        places = nearest[is_mark]
        if len(rendering.marks) < len(rendering.said):
            places = np.clip(np.unwrap(places, period=len(rendering.marks)), 0, len(rendering.said) - 1)
        source[is_mark] = places
    return source


def _fill(rendering: Rendering, source: np.ndarray, swapped: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Add the unmarked characters of messages: those between two marks, and those that go on from one.

    Args:
        rendering: The chat.
        source: ``(n,)``, the place of each marked character, or -1.
        swapped: ``(n,)`` bool, spaces that change with the messages.
        kept: ``(m,)`` bool, characters that stayed as they are.
    """
    text, said, owner, last = rendering.text, rendering.said, rendering.owner, len(rendering.said) - 1
    sure = swapped | ~np.isin(text, SPACES)  # a space that stayed may as well be the template's
    mirrored = _mirror(source, last)
    after = _continue(text, said, owner, source)
    before = _mirror(_continue(text[::-1], said[::-1], owner[::-1], mirrored), last)
    between = np.where(after == before, after, -1)
    following = _unbroken(after, source, swapped | kept[after], sure)
    leading = _mirror(_unbroken(_mirror(before, last), mirrored, (swapped | kept[before])[::-1], sure[::-1]), last)
    for found in (between, following):
        source = np.where(source >= 0, source, found)
    previous = source[_latest(source >= 0)]
    twice = (previous >= 0) & (owner[previous] == owner[leading]) & (previous >= leading)
    return np.where((source >= 0) | twice, source, leading)


def _continue(text: np.ndarray, said: np.ndarray, owner: np.ndarray, source: np.ndarray) -> np.ndarray:
    """``(n,)``: the place in ``said`` if the message went on from the mark before; -1 where it says something else."""
    mark = _latest(source >= 0)
    onward = source[mark] + np.arange(len(text)) - mark
    exists = (mark >= 0) & (onward < len(said))
    onward = np.where(exists, onward, 0)
    return np.where(exists & (owner[onward] == owner[source[mark]]) & (said[onward] == text), onward, -1)


def _unbroken(found: np.ndarray, source: np.ndarray, allowed: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """``found`` where all from the mark before is allowed, up to the last that is sure; else -1."""
    good = (found >= 0) & allowed & (source < 0)
    good &= _latest(source >= 0) > _latest(~good & (source < 0))
    sure_from_end, break_from_end = _latest((good & sure)[::-1]), _latest(~good[::-1])
    return np.where(good & (sure_from_end > break_from_end)[::-1], found, -1)


def _latest(condition: np.ndarray) -> np.ndarray:
    """For each place the last one up to it where the condition holds, or -1."""
    return np.maximum.accumulate(np.where(condition, np.arange(len(condition)), -1))


def _mirror(source: np.ndarray, last: int) -> np.ndarray:
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
    """Unused code points, twice as many as asked for where there are so many: a jump then cannot be read as one back."""
    if used.max(initial=0) < FIRST_MARK:
        return np.arange(FIRST_MARK, min(FIRST_MARK + 2 * count, LAST_MARK + 1))
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
