"""Views of an alignment: lines for the terminal, or one self-contained HTML page."""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment
from rich.cells import cell_len
from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.prompts.alignment import align
from kvfuse.prompts.message_axis import covered, locate
from kvfuse.prompts.messages import Message, Prompt, as_chat
from kvfuse.prompts.tokenized import TokenizedPrompt
from kvfuse.support.files import read_text

COLOURS = ("#77aadd", "#eedd88", "#ffaabb", "#44bb99", "#ee8866", "#99ddff", "#bbcc33")
"""Paul Tol's light scheme: distinct to colour-blind eyes, and dark text is legible on all of them."""
VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "→"})


@dataclass(frozen=True)
class TokenTexts:
    """One model's tokens, to be shown.

    Attributes:
        name: Folder or Hub id of the tokenizer.
        tokenized: The prompt.
        texts: The text of each token, white space made visible.
    """

    name: str
    tokenized: TokenizedPrompt
    texts: tuple[str, ...]

    def describe(self, position: int) -> str:
        """A token's text, position and id."""
        return f"{self.texts[position]!r} (position {position}, id {self.tokenized.ids[position]})"


@dataclass(frozen=True, kw_only=True)
class AlignmentView:
    """One prompt in both tokenizations.

    Attributes:
        token_alignment: One of :data:`kvfuse.prompts.alignment.TOKEN_ALIGNMENTS`.
        receiver: The receiver's tokens.
        sharer: The sharer's tokens.
        index: ``(n,)`` int64, the sharer position aligned with each receiver position, -1: none.
        fusable: ``(n,)`` bool, the receiver positions to fuse.
    """

    token_alignment: str
    receiver: TokenTexts
    sharer: TokenTexts
    index: np.ndarray
    fusable: np.ndarray

    @cached_property
    def reads(self) -> np.ndarray:
        """``(n,)`` int64: the sharer position fused into each receiver position, -1: none."""
        return np.where(self.fusable, self.index, -1)

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """The receiver positions into which each sharer position is fused."""
        readers: dict[int, list[int]] = defaultdict(list)
        for position, read in enumerate(self.reads.tolist()):
            readers[read].append(position)
        return readers

    @property
    def kept(self) -> np.ndarray:
        """``(c,)`` bool: the characters of the messages that tokens of both models stand for."""
        if self.token_alignment == "span":
            return covered(self.receiver.tokenized) & covered(self.sharer.tokenized)
        # one sharer token for each receiver token, with the same text or another
        partners = zip(self.receiver.texts, self.index, strict=True)
        same = [text == self.sharer.texts[position] for text, position in partners]
        return covered(self.receiver.tokenized, np.flatnonzero(same))


def view(
    prompt: Prompt,
    receiver: PreTrainedTokenizerBase,
    sharer: PreTrainedTokenizerBase,
    token_alignment: str,
    fuse: str = "all",
) -> AlignmentView:
    """Align a prompt, plain text as the message of a user, to be shown.

    Args:
        prompt: A text or a chat.
        receiver: The receiver's tokenizer.
        sharer: The sharer's.
        token_alignment: One of :data:`kvfuse.prompts.alignment.TOKEN_ALIGNMENTS`.
        fuse: ``all`` or ``messages``.

    Raises:
        PairError: An unknown ``token_alignment`` or ``fuse``.
        PromptError: See :func:`kvfuse.prompts.chat.render`.
    """
    aligned = align(as_chat(prompt), receiver, [(sharer, token_alignment)], fuse)
    ((read, index),) = aligned.sharers
    return AlignmentView(
        token_alignment=token_alignment,
        receiver=_texts(aligned.receiver, receiver),
        sharer=_texts(read, sharer),
        index=index,
        fusable=aligned.fusable,
    )


def load_chat(path: Path) -> list[Message]:
    """Read a chat from a JSON file.

    Raises:
        PromptError: The file is missing, no JSON, or no list of messages.
    """
    try:
        chat = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise PromptError(f"expected a chat in JSON at {path}, got: {error}; check the file") from error
    if not isinstance(chat, list) or not all(isinstance(message, dict) and "role" in message for message in chat):
        raise PromptError(
            f"expected {path} to hold a list of messages, got something else; write [{{'role': …, 'content': …}}, …]"
        )
    return chat


def summary(view: AlignmentView) -> str:
    """One line: how many tokens are fused, and which share of the messages' characters both models read."""
    fused, kept = view.reads >= 0, view.kept
    counts = f"{len(fused)} receiver tokens, {fused.sum()} fused ({fused.mean():.1%})"
    return (
        f"{view.token_alignment}: {counts}; {len(view.sharer.texts)} sharer tokens; "
        f"{kept.mean():.1%} of the message characters are read by both"
    )


def lines(view: AlignmentView) -> Iterator[str]:
    """Two columns in reading order: each receiver token, then ``<`` and the sharer token it reads, if any."""
    width = max(map(cell_len, [*view.receiver.texts, "receiver"]))
    yield f"{'receiver':{width}}   sharer"
    for position, read in _pairs(view):
        left = "" if position is None else view.receiver.texts[position]
        right = "" if read is None else view.sharer.texts[read]
        mark = " " if position is None or read is None else "<"
        yield f"{left}{' ' * (width - cell_len(left))} {mark} {right}".rstrip()
    yield summary(view)


def page(view: AlignmentView) -> str:
    """The HTML page: a receiver token and the sharer token it reads share a colour; the others have none."""
    # 1) Text, colour and title of each token; neighbours among the sharer's fused tokens differ in colour
    colours = {position: f"c{i % len(COLOURS)}" for i, position in enumerate(sorted(view.readers.keys() - {-1}))}
    boxes = [
        (text, colours.get(read, "off"), _receiver_title(view, position, read))
        for position, (text, read) in enumerate(zip(view.receiver.texts, view.reads.tolist(), strict=True))
    ]
    sharer_boxes = [
        (text, colours.get(position, "off"), _sharer_title(view, position))
        for position, text in enumerate(view.sharer.texts)
    ]
    # 2) A section for each message and each part of the template
    sections = [(kind, boxes[part], sharer_boxes[sharer_part]) for kind, part, sharer_part in _sections(view)]
    source = files("kvfuse.prompts").joinpath("view.html.jinja").read_text(encoding="utf-8")
    names = {"receiver": view.receiver.name, "sharer": view.sharer.name}
    template = Environment(autoescape=True).from_string(source)
    return template.render(**names, summary=summary(view), colours=COLOURS, sections=sections)


def _texts(tokenized: TokenizedPrompt, tokenizer: PreTrainedTokenizerBase) -> TokenTexts:
    """The text of each token; a piece of a character, which has none, as that character with dots."""
    texts = tokenizer.batch_decode([[token] for token in tokenized.ids], clean_up_tokenization_spaces=False)
    # a tokenizer decodes a piece of a character to U+FFFD
    covers = [tokenized.prompt.text[start:end] for start, end in tokenized.offsets]
    texts = [f"{part}…" if part and "\ufffd" in text else text for text, part in zip(texts, covers, strict=True)]
    return TokenTexts(tokenizer.name_or_path, tokenized, tuple(map(_visible, texts)))


def _visible(text: str) -> str:
    # an accent needs a letter to stand on
    carrier = "◌" if text and unicodedata.combining(text[0]) else ""
    return carrier + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text.translate(VISIBLE))


def _pairs(view: AlignmentView) -> Iterator[tuple[int | None, int | None]]:
    """Receiver and sharer positions in reading order; None instead of a partner for tokens that are not fused."""
    unread = [position for position in range(len(view.sharer.texts)) if position not in view.readers][::-1]
    for position, (aligned, read) in enumerate(zip(view.index.tolist(), view.reads.tolist(), strict=True)):
        # sharer tokens up to this one that nothing reads
        while unread and unread[-1] <= aligned:
            yield None, unread.pop()
        yield position, read if read >= 0 else None
    yield from ((None, position) for position in reversed(unread))


def _sections(view: AlignmentView) -> Iterator[tuple[str, slice, slice]]:
    """Template and messages by turns: receiver tokens, and sharer tokens up to the one that the last of them reads."""
    sections = locate(view.receiver.tokenized).sections
    ends = [*(np.flatnonzero(np.diff(sections)) + 1).tolist(), len(sections)]
    start = sharer_start = 0
    for end in ends:
        sharer_end = len(view.sharer.texts) if end == len(sections) else int(view.index[end - 1]) + 1
        yield ("template", "message")[sections[start] % 2], slice(start, end), slice(sharer_start, sharer_end)
        start, sharer_start = end, sharer_end


def _receiver_title(view: AlignmentView, position: int, read: int) -> str:
    partner = f"reads the sharer's {view.sharer.describe(read)}" if read >= 0 else "not fused"
    return f"{view.receiver.describe(position)}: {partner}"


def _sharer_title(view: AlignmentView, position: int) -> str:
    readers = ", ".join(map(view.receiver.describe, view.readers.get(position, [])))
    return f"{view.sharer.describe(position)}: " + (f"read by the receiver's {readers}" if readers else "not read")
