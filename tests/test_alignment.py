import unicodedata
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import chat
from transformers import AutoTokenizer

from kvfuse.errors import PairError
from kvfuse.prompts import message_axis
from kvfuse.prompts.alignment import align, align_spans, stack
from kvfuse.prompts.chat import render
from kvfuse.prompts.tokenized import tokenize
from kvfuse.testing import tiny_tokenizer

FINE, COARSE, PLAIN = tiny_tokenizer(265), tiny_tokenizer(340, "lines"), tiny_tokenizer(300, None)
texts = st.text(min_size=1, max_size=60).filter(str.strip)
pairs = st.permutations([FINE, COARSE, PLAIN])


def covered(reading, token):
    """The characters of the messages that a token covers."""
    start, end = reading.offsets[token]
    spans = reading.prompt.spans
    return {
        (s.message, s.offset + place - s.start) for s in spans for place in range(max(start, s.start), min(end, s.end))
    }


@settings(deadline=None)
@given(contents=st.lists(texts, min_size=1, max_size=3), tokenizers=pairs)
def test_each_token_reads_the_one_that_overlaps_it_most(contents, tokenizers):
    receiver, sharer = (
        tokenize(chat(*contents), tokenizer) for tokenizer in tokenizers[:2]
    )  # always two different ones
    index = align_spans(receiver=receiver, sharer=sharer)
    theirs = [covered(sharer, token) for token in range(len(sharer.ids))]
    for token, position in enumerate(index):
        mine = covered(receiver, token)
        overlaps = [len(mine & other) for other in theirs]
        if mine and max(overlaps):
            assert overlaps[position] == max(overlaps)
            assert max(overlaps) not in overlaps[position + 1 :], "ties go to the later token, which has read more"


@settings(deadline=None)
@given(contents=st.lists(texts, min_size=1, max_size=3), tokenizers=pairs)
def test_alignment_never_goes_back(contents, tokenizers):
    receiver, sharer = (tokenize(chat(*contents), tokenizer) for tokenizer in tokenizers[:2])
    index = align_spans(receiver=receiver, sharer=sharer)
    assert (np.diff(index) >= 0).all()
    assert (index >= -1).all()
    assert (index < len(sharer.ids)).all()


@settings(deadline=None)
@given(contents=st.lists(texts, min_size=1, max_size=3), tokenizer=st.sampled_from([FINE, COARSE, PLAIN]))
def test_identical_tokenizers_align_by_identity(contents, tokenizer):
    reading = tokenize(chat(*contents), tokenizer)
    assert align_spans(receiver=reading, sharer=tokenize(chat(*contents), tokenizer)).tolist() == list(
        range(len(reading.ids))
    )
    identity = align(chat(*contents), tokenizer, [(COARSE, "identity")])
    assert identity.sharers[0][0] is identity.receiver, "the sharer reads the receiver's ids"
    assert identity.sharers[0][1].tolist() == list(range(len(reading.ids)))


def test_template_reads_the_end_of_the_sharers_template():
    receiver, sharer = tokenize(chat("What is it?"), FINE), tokenize(chat("What is it?"), COARSE)
    index = align_spans(receiver=receiver, sharer=sharer)
    assert index[-1] == len(sharer.ids) - 1
    assert sharer.offsets[index[0]][1] == sharer.prompt.spans[0].start


ORDERS = {
    "in order": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
    "system late": "{% for m in messages if m.role != 'system' %}"
    "{% if loop.last %}<|system|>{{ messages[0].content }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
    "no system": "{% for m in messages if m.role != 'system' %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
    "thoughts dropped": "{% for m in messages %}"
    "[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}[assistant]",
    "twice": "{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}again{{ messages[-1].content }}<|assistant|>",
}
LONG = [
    {"role": "system", "content": "Be brief."},
    *chat(
        "What is the capital of Norway?",
        "<think>Norway, so Oslo.</think>It is Oslo.",
        "And the language they speak there?",
    ),
]


def read_like(order, tokenizer):
    tokenizer.chat_template = ORDERS[order]
    return tokenize(LONG, tokenizer)


@pytest.mark.parametrize("theirs", ORDERS)
@pytest.mark.parametrize("mine", ORDERS)
def test_templates_may_move_repeat_or_leave_out_messages(mine, theirs):
    receiver, sharer = read_like(mine, tiny_tokenizer(265)), read_like(theirs, tiny_tokenizer(340))
    index = align_spans(receiver=receiver, sharer=sharer)
    assert (np.diff(index) >= 0).all()
    assert index[-1] == len(sharer.ids) - 1
    met = [token for token in range(len(index)) if covered(receiver, token) & covered(sharer, index[token])]
    read_there = set().union(*(covered(receiver, token) for token in met))
    assert {number for number in (0, 1, 3) if characters_of(number) <= read_there} >= {1, 3}, (
        "all that both write in one order"
    )
    if mine == theirs:
        assert characters_of(0) <= read_there or mine == "no system"


def characters_of(number):
    return {(number, place) for place in range(len(LONG[number]["content"]))}


def test_template_inside_a_message_reads_on_from_the_message():
    tokenizer = tiny_tokenizer(265)
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>{{ m.content.split('#') | join('<|end|>') }}{% endfor %}<|assistant|>"
    )
    receiver, sharer = tokenize(chat("one#two"), tokenizer), tokenize(chat("one#two"), COARSE)
    index = align_spans(receiver=receiver, sharer=sharer)
    inside = receiver.prompt.text.index("<|end|>")
    token = receiver.offsets[:, 0].tolist().index(inside)
    assert index[token] == index[token - 1]
    assert (0, 4) in covered(sharer, index[token + 1])


def test_what_the_sharers_template_trims_reads_the_token_before_it():
    receiver, sharer = tokenize(chat(" \n Oslo"), PLAIN), tokenize(chat(" \n Oslo"), COARSE)
    index = align_spans(receiver=receiver, sharer=sharer)
    assert sharer.offsets[index[0]][1] == sharer.prompt.spans[0].start, (
        "not nothing, though the receiver has no template"
    )


def test_the_last_token_is_never_fused():
    row = align("Oslo is the capital", FINE, [(COARSE, "span")])
    assert row.fusable.tolist() == [True] * (len(row.fusable) - 1) + [False]


def test_only_tokens_of_messages_are_fusable():
    row = align(chat("Oslo"), FINE, [(COARSE, "span")], fuse="messages")
    span = render(chat("Oslo"), FINE).spans[0]
    fused = [row.receiver.offsets[token].tolist() for token in np.flatnonzero(row.fusable)]
    inside = [token for token in row.receiver.offsets.tolist() if span.start <= token[0] < token[1] <= span.end]
    assert fused == inside != []


def test_stacking_pads_left_and_shifts_the_index():
    rows = [align(chat(text), FINE, [(COARSE, "span")]) for text in ("hi", "a much longer question about Norway?")]
    batch = stack(rows)
    for i, row in enumerate(rows):
        length, their_length = len(row.receiver.ids), len(row.sharers[0][0].ids)
        mine, theirs = batch.ids[i, -length:], batch.sharers[0].ids[i, -their_length:]
        assert mine.tolist() == row.receiver.ids.tolist()
        assert theirs.tolist() == row.sharers[0][0].ids.tolist()
        assert batch.mask[i].tolist() == [0] * (batch.ids.shape[1] - length) + [1] * length
        shifted = batch.sharers[0].index[i, -length:] - (batch.sharers[0].ids.shape[1] - their_length)
        assert shifted.tolist() == row.sharers[0][1].tolist()
        assert not batch.fuse_mask[i, :-length].any()


def test_unknown_alignment_is_refused():
    with pytest.raises(PairError, match="token_alignment"):
        align("text", FINE, [(COARSE, "spam")])


REAL = ("gpt2", "llama-3.2", "mistral-v3", "phi-4", "qwen2.5", "qwen3")
PIECES = (
    *(
        " ",
        "  ",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\x00",
    ),  # white space, and what looks like none
    *(
        "é",
        "e\u0301",
        "a\u0323\u0301",
        "a\u0301\u0323",
        "한",
        "\u1112\u1161\u11ab",
        "\u212b",
        "\u0958",
        "ﬁ",
        "नमस्ते",
    ),  # (de)composed
    *("你", "好，", "世界", "𠮷", "👩‍👩‍👧", "👍🏽", "🇳🇴", "❤️", "𒀀", "\U0001d15e"),  # several bytes, several code points
    *("Hello", " world", "1234", "'s", "def f(x):\n    return x", "▁", "<0xE4>", "<|im_end", "[INST", "\\", "`{}`"),
)
mixed = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=8).map("".join).filter(str.strip)


class Tokenizers(dict):
    def __repr__(self):
        return "the real tokenizers"  # hypothesis prints arguments


@pytest.fixture(scope="module")
def real(shared):
    return Tokenizers((name, AutoTokenizer.from_pretrained(shared / "tokenizers" / name)) for name in REAL)


def check_pair(receiver, sharer):
    """What holds for every alignment: best overlap, ties to the later, nothing left out, never back."""
    index = align_spans(receiver=receiver, sharer=sharer)
    assert (np.diff(index) >= 0).all()
    theirs = [covered(sharer, token) for token in range(len(sharer.ids))]
    same = receiver.prompt == sharer.prompt and receiver.ids.tolist() == sharer.ids.tolist()
    for token, position in enumerate(index):
        mine = covered(receiver, token)
        overlaps = [len(mine & other) for other in theirs]
        assert not mine or position >= 0
        if mine and max(overlaps):
            assert overlaps[position] == max(overlaps)
            assert same or max(overlaps) not in overlaps[position + 1 :], (
                "pieces of one character read the last of its pieces"
            )


def simple(text, name):
    """Up to what a tokenizer normalises."""
    return text.replace("▁", " ").replace(" ", "") if name == "mistral-v3" else unicodedata.normalize("NFC", text)


@settings(deadline=None, max_examples=40)
@given(text=mixed)
def test_real_tokenizers_align_plain_text(real, text):
    readings = {name: tokenize(text, tokenizer) for name, tokenizer in real.items()}
    for name, reading in readings.items():
        inside = reading.offsets[:, 1] > reading.offsets[:, 0]
        assert simple(real[name].decode(reading.ids[inside]), name) == simple(text, name)
        assert message_axis.covered(reading).all(), f"{name}: every character is some token's"
        assert (np.diff(reading.offsets[inside], axis=0) >= 0).all(), "in reading order"
        assert align_spans(receiver=reading, sharer=tokenize(text, real[name])).tolist() == list(
            range(len(reading.ids))
        )
    for one, other in product(readings.values(), repeat=2):
        check_pair(one, other)


@settings(deadline=None, max_examples=20)
@given(first=mixed, second=mixed)
def test_real_tokenizers_align_chats(real, first, second):
    readings = {name: tokenize(chat(first, "Yes. ", second), tokenizer) for name, tokenizer in real.items()}
    for one, other in product(readings.values(), repeat=2):
        check_pair(one, other)
        if one.prompt.templated and other.prompt.templated:
            assert align_spans(receiver=one, sharer=other)[-1] == len(other.ids) - 1


@pytest.mark.parametrize("character", ["你", "𠮷", "👩", "é", "𒀀"])
def test_pieces_of_a_character_read_its_last_piece(real, character):
    readings = [tokenize(f"a{character}b", tokenizer) for tokenizer in real.values()]
    for receiver, sharer in product(readings, repeat=2):
        if receiver.ids.tolist() != sharer.ids.tolist():
            mine, theirs = (np.flatnonzero((one.offsets == [1, 2]).all(axis=1)) for one in (receiver, sharer))
            assert set(align_spans(receiver=receiver, sharer=sharer)[mine]) <= {theirs[-1]} if len(theirs) else True


def test_composed_accents_belong_to_their_letter(real):
    reading = tokenize("cafe\u0301s a\u0323\u0301", real["qwen3"])
    words = [reading.prompt.text[start:end] for start, end in reading.offsets]
    assert "".join(words) == reading.prompt.text
    assert all(not unicodedata.combining(word[0]) for word in words[:-1])


def test_special_tokens_that_swallow_white_space_are_no_message(real):
    row = align(chat(" Oslo "), real["phi-4"], [(real["qwen3"], "span")], fuse="messages")
    assert [real["phi-4"].decode([token]) for token in row.receiver.ids[row.fusable]] == ["Os", "lo"]


def test_a_token_over_two_messages_covers_both():
    """Of a template that writes nothing between two messages."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}<|assistant|>"
    chat = [{"role": "user", "content": "What is the cap"}, {"role": "user", "content": "ital of Norway?"}]
    tokenized = tokenize(chat, tokenizer)
    border = len(chat[0]["content"])
    over = [i for i, (low, high) in enumerate(tokenized.offsets.tolist()) if low < border < high]
    assert over, "the words of the test must be one token"
    assert message_axis.covered(tokenized).all()
    located = message_axis.locate(tokenized).characters[over[0]]
    assert located.tolist() == tokenized.offsets[over[0]].tolist()
