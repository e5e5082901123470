import json
import re
from itertools import pairwise

import numpy as np
import pytest
from helpers import CheckedHTML

from kvfuse.errors import PairError, PromptError
from kvfuse.prompts.alignment import TOKEN_ALIGNMENTS
from kvfuse.prompts.view import COLOURS, lines, load_chat, page, summary, view
from kvfuse.testing import tiny_tokenizer

FINE, COARSE = tiny_tokenizer(265), tiny_tokenizer(340, "lines")
CHAT = [
    {"role": "user", "content": 'What is <b>Oslo</b> & "the\tcapital"?\n$cost 你好 e\u0301 \x1b[31m'},
    {"role": "assistant", "content": "A city. "},
    {"role": "user", "content": "Where? 👩‍👩‍👧"},
]


class Page(CheckedHTML):
    """Every token box as (text, class, title)."""

    def __init__(self, text):
        self.boxes, self.tags = [], []
        super().__init__(text)

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        self.tags.append((tag, dict(attributes)))
        if tag == "span":
            self.boxes.append(["", *(dict(attributes).get(key) for key in ("class", "title"))])

    def handle_data(self, data):
        if self.open and self.open[-1] == "span":
            self.boxes[-1][0] += data

    @property
    def tokens(self):
        return [box for box in self.boxes if box[2]]


@pytest.mark.parametrize("how", TOKEN_ALIGNMENTS)
def test_lines_show_every_token_in_order(how):
    seen = view(CHAT, FINE, COARSE, how, "messages")
    shown = list(lines(seen))
    assert shown[0].split() == ["receiver", "sharer"]
    fused = [line for line in shown[1:-1] if re.search(r" < \S", line)]
    assert len(fused) == (seen.reads >= 0).sum()
    unread = len(seen.sharer.texts) - len(set(seen.reads.tolist()) - {-1})
    assert len(shown) == len(seen.receiver.texts) + unread + 2
    assert shown[-1] == summary(seen)
    assert not any("\x1b" in line for line in shown), "what could steer a terminal is escaped"


def test_summary_counts():
    seen = view("Oslo", FINE, FINE, "identity")
    count = len(seen.receiver.texts)
    shares = f"{count} receiver tokens, {count - 1} fused ({1 - 1 / count:.1%}); {count} sharer tokens"
    assert summary(seen) == f"identity: {shares}; 100.0% of the message characters are read by both"


def test_what_a_template_trims_is_not_read():
    assert view("ab  ", FINE, COARSE, "span").kept.tolist() == [True, True, False, False]


def test_what_reencoding_loses_is_not_read():
    kept = view([{"role": "user", "content": "ab 你"}], FINE, COARSE, "reencode-first").kept
    assert kept.tolist() == [True, True, True, False]


@pytest.mark.parametrize("how", TOKEN_ALIGNMENTS)
@pytest.mark.parametrize("fuse", ["all", "messages"])
def test_the_page_colours_partners_alike(how, fuse):
    seen = view(CHAT, FINE, COARSE, how, fuse)
    tokens = Page(page(seen)).tokens
    assert sorted(text for text, *_ in tokens) == sorted(seen.receiver.texts + seen.sharer.texts)
    mine = [token for token in tokens if re.search(r": (reads the sharer|not fused)", token[2])]
    theirs = [token for token in tokens if token not in mine]
    assert tuple(text for text, *_ in mine) == seen.receiver.texts
    assert tuple(text for text, *_ in theirs) == seen.sharer.texts
    for (_, colour, title), position in zip(mine, seen.reads, strict=True):
        assert colour == ("off" if position < 0 else theirs[position][1])
        assert title.endswith("not fused" if position < 0 else f"id {seen.sharer.tokenized.ids[position]})")
    unread = np.setdiff1d(np.arange(len(theirs)), seen.reads)
    assert {theirs[position][1] for position in unread} <= {"off"}


def test_neighbours_differ_in_colour():
    seen = view("Oslo is the capital of Norway, people say", FINE, COARSE, "span", "messages")
    colours = [colour for _, colour, title in Page(page(seen)).tokens if ": read by" in title]
    assert len(set(COLOURS)) == len(COLOURS)
    assert len(colours) > len(COLOURS)
    assert all(one != other for one, other in pairwise(colours))


def test_the_page_needs_nothing_else():
    text = page(view(CHAT, FINE, COARSE, "span"))
    parsed = Page(text)
    assert not {"script", "link", "img", "b", "iframe"} & {tag for tag, _ in parsed.tags}
    assert not any(
        key in ("src", "href", "style") or key.startswith("on") for _, attributes in parsed.tags for key in attributes
    )
    assert not re.search(r"https?:|url\(|@import", text)
    assert summary(view(CHAT, FINE, COARSE, "span")) in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "expected a chat in JSON"),
        ('{"role": "user"}', "list of messages"),
        ('["hi"]', "list of messages"),
    ],
)
def test_unreadable_chats_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "chat.json").write_text(content)
    with pytest.raises(PromptError, match=message):
        load_chat(tmp_path / "chat.json")


def test_a_chat_is_read_from_a_file(tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps(CHAT))
    assert load_chat(tmp_path / "chat.json") == CHAT


def test_unknown_choices_are_named():
    with pytest.raises(PairError, match="identity, span, reencode-first, reencode-longest, got 'spam'"):
        view("text", FINE, COARSE, "spam")
    with pytest.raises(PairError, match="all, messages, got 'none'"):
        view("text", FINE, COARSE, "span", "none")
