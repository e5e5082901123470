"""An alignment to look at: lines for the terminal, or one self-contained HTML page."""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from rich.cells import cell_len
from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.prompts.alignment import AlignedRow, align
from kvfuse.prompts.chat import Message, Prompt, as_chat
from kvfuse.prompts.message_axis import covered, own_spans, places
from kvfuse.prompts.tokenized import TokenizedPrompt

COLOURS = ("#77aadd", "#eedd88", "#ffaabb", "#44bb99", "#ee8866", "#99ddff", "#bbcc33")
"""Paul Tol's light scheme: distinct to colour-blind eyes, and dark text is legible on all of them."""
VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "→"})


@dataclass(frozen=True, kw_only=True)
class AlignmentView:
    """One prompt in both tokenizations.

    Attributes:
        how: One of :data:`kvfuse.prompts.alignment.TOKEN_ALIGNMENTS`.
        names: What receiver and sharer were loaded as.
        aligned: The prompt as both read it.
        receiver: The text of each of the receiver's tokens, white space made visible.
        sharer: Likewise the sharer's.
    """

    how: str
    names: tuple[str, str]
    aligned: AlignedRow
    receiver: tuple[str, ...]
    sharer: tuple[str, ...]

    @cached_property
    def reads(self) -> np.ndarray:
        """``(n,)`` int64: the sharer position fused into each receiver position, -1: none."""
        return np.where(self.aligned.fusable, self.aligned.sharers[0][1], -1)

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """The receiver positions into which each sharer position is fused."""
        readers: dict[int, list[int]] = defaultdict(list)
        for mine, theirs in enumerate(self.reads.tolist()):
            readers[theirs].append(mine)
        return readers

    @property
    def kept(self) -> np.ndarray:
        """``(c,)`` bool: the characters of the messages that tokens of both models stand for."""
        mine, theirs = self.aligned.receiver, self.aligned.sharers[0][0]
        if self.how == "span":
            return covered(mine) & covered(theirs)
        # one sharer token for each of the receiver's, which says the same or something else
        same = [
            text == self.sharer[position]
            for text, position in zip(self.receiver, self.aligned.sharers[0][1], strict=True)
        ]
        return covered(mine, np.flatnonzero(same))


def view(
    prompt: Prompt, receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, how: str, fuse: str = "all"
) -> AlignmentView:
    """Align a prompt, plain text being what a user says, for a look at it.

    Args:
        prompt: A text or a chat.
        receiver: The receiver's tokenizer.
        sharer: The sharer's.
        how: One of :data:`kvfuse.prompts.alignment.TOKEN_ALIGNMENTS`.
        fuse: ``all`` or ``messages``.

    Raises:
        PairError: An unknown ``how`` or ``fuse``.
        PromptError: See :func:`kvfuse.prompts.chat.render`.
    """
    aligned = align(as_chat(prompt), receiver, [(sharer, how)], fuse)
    reading = aligned.sharers[0][0]
    return AlignmentView(
        how=how,
        names=(receiver.name_or_path, sharer.name_or_path),
        aligned=aligned,
        receiver=_texts(aligned.receiver, receiver),
        sharer=_texts(reading, sharer),
    )


def load_chat(path: Path) -> list[Message]:
    """Read a chat from a JSON file.

    Raises:
        PromptError: The file is missing, no JSON, or no list of messages.
    """
    try:
        chat = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PromptError(f"expected a chat in JSON at {path}, got: {error}; check the file") from error
    if not isinstance(chat, list) or not all(isinstance(message, dict) and "role" in message for message in chat):
        raise PromptError(
            f"expected {path} to hold a list of messages, got something else; write [{{'role': …, 'content': …}}, …]"
        )
    return chat


def summary(view: AlignmentView) -> str:
    """How much is fused, and how much of the messages reaches both models, in one line."""
    fused, kept = view.reads >= 0, view.kept
    counts = f"{len(fused)} receiver tokens, {fused.sum()} fused ({fused.mean():.1%}); {len(view.sharer)} sharer tokens"
    return f"{view.how}: {counts}; {kept.mean():.1%} of the message characters are read by both"


def lines(view: AlignmentView) -> Iterator[str]:
    """Two columns in reading order: each receiver token with ``<`` and the sharer token it reads; alone, what is not fused."""
    width = max(map(cell_len, [*view.receiver, "receiver"]))
    yield f"{'receiver':{width}}   sharer"
    for mine, theirs in _rows(view):
        left = "" if mine is None else view.receiver[mine]
        right = "" if theirs is None else view.sharer[theirs]
        mark = " " if mine is None or theirs is None else "<"
        yield f"{left}{' ' * (width - cell_len(left))} {mark} {right}".rstrip()
    yield summary(view)


def page(view: AlignmentView) -> str:
    """The HTML page: a receiver token and the sharer token it reads share a colour, what is not fused has none."""
    reads = view.reads.tolist()
    colours = {position: f"c{i % len(COLOURS)}" for i, position in enumerate(sorted(view.readers.keys() - {-1}))}
    mine = [_box(text, colours.get(reads[i], "off"), _receiver_title(view, i)) for i, text in enumerate(view.receiver)]
    theirs = [_box(text, colours.get(i, "off"), _sharer_title(view, i)) for i, text in enumerate(view.sharer)]
    blocks = [
        f"<section class={kind}><h2>{kind}</h2><div>{''.join(mine[ours])}</div><div>{''.join(theirs[others])}</div></section>"
        for kind, ours, others in _blocks(view)
    ]
    return PAGE.substitute(
        receiver=escape(view.names[0]),
        sharer=escape(view.names[1]),
        summary=escape(summary(view)),
        colours="".join(f".c{i}{{background:{colour}}}" for i, colour in enumerate(COLOURS)),
        blocks="\n".join(blocks),
    )


def _texts(reading: TokenizedPrompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What each token says; a piece of a character, which says nothing alone, as that character with dots."""
    texts = tokenizer.batch_decode([[token] for token in reading.ids], clean_up_tokenization_spaces=False)
    covers = [reading.prompt.text[start:end] for start, end in reading.offsets]
    texts = [f"{part}…" if part and "\ufffd" in text else text for text, part in zip(texts, covers, strict=True)]
    return tuple(_visible(text) for text in texts)


def _visible(text: str) -> str:
    carrier = "◌" if text and unicodedata.combining(text[0]) else ""
    return carrier + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text.translate(VISIBLE))


def _rows(view: AlignmentView) -> Iterator[tuple[int | None, int | None]]:
    """Pairs of positions in reading order; None beside what is not fused."""
    unread = [position for position in range(len(view.sharer)) if position not in view.readers][::-1]
    for mine, (beside, read) in enumerate(zip(view.aligned.sharers[0][1].tolist(), view.reads.tolist(), strict=True)):
        while unread and unread[-1] <= beside:
            yield None, unread.pop()
        yield mine, read if read >= 0 else None
    yield from ((None, theirs) for theirs in reversed(unread))


def _blocks(view: AlignmentView) -> Iterator[tuple[str, slice, slice]]:
    """The template and the messages by turns: the receiver's tokens, and the sharer's up to the one that the last of them reads."""
    turns = places(view.aligned.receiver, own_spans(view.aligned.receiver.prompt))
    ends = [*(np.flatnonzero(np.diff(turns)) + 1).tolist(), len(turns)]
    start = their_start = 0
    for end in ends:
        their_end = len(view.sharer) if end == len(turns) else int(view.aligned.sharers[0][1][end - 1]) + 1
        yield ("template", "message")[turns[start] % 2], slice(start, end), slice(their_start, their_end)
        start, their_start = end, their_end


def _box(text: str, colour: str, title: str) -> str:
    return f'<span class={colour} title="{escape(title)}">{escape(text)}</span>' + "<br>" * text.endswith("⏎")


def _receiver_title(view: AlignmentView, position: int) -> str:
    read = int(view.reads[position])
    partner = (
        f"reads the sharer's {_name(view.sharer[read], read, view.aligned.sharers[0][0])}" if read >= 0 else "not fused"
    )
    return f"{_name(view.receiver[position], position, view.aligned.receiver)}: {partner}"


def _sharer_title(view: AlignmentView, position: int) -> str:
    readers = ", ".join(
        _name(view.receiver[reader], reader, view.aligned.receiver) for reader in view.readers.get(position, [])
    )
    own = _name(view.sharer[position], position, view.aligned.sharers[0][0])
    return f"{own}: read by the receiver's {readers}" if readers else f"{own}: not read"


def _name(text: str, position: int, reading: TokenizedPrompt) -> str:
    return f"{text!r} (position {position}, id {reading.ids[position]})"


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$receiver reads $sharer</title>
<style>
body { font: 15px/1.9 ui-monospace, "DejaVu Sans Mono", monospace; color: #111; background: #fff; margin: 2rem; }
p, h1, h2 { font-family: system-ui, sans-serif; line-height: 1.4; margin: 0 0 .6rem; }
h1 { font-size: 1.2rem; }
h2 { font-size: .8rem; font-weight: normal; color: #555; margin: .4rem 0 0; }
section { display: grid; grid-template-columns: 5rem 1fr 1fr; gap: 1.5rem; border-top: 1px solid #ddd; padding: .3rem 0; }
span { border: 1px solid transparent; border-radius: 3px; padding: 1px 2px; margin: 0 1px; overflow-wrap: anywhere;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.off { color: #666; border-color: #bbb; }
$colours
@media (max-width: 50rem) { section { grid-template-columns: 1fr; gap: .2rem; } }
</style>
</head>
<body>
<h1>$receiver (left) reads $sharer (right)</h1>
<p>$summary</p>
<p><span class=c0>same</span><span class=c0>colour</span> the receiver's token reads the sharer's;
<span class=off>outlined</span> not fused, or not read;
· space, ⏎ line break, → tab, … a piece of a character. Point at a token for its id and its partner.</p>
$blocks
</body>
</html>
""")
