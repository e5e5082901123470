import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfuse.chat import render
from kvfuse.errors import PairError
from kvfuse.testing import tiny_tokenizer
from kvfuse.token_alignment import align, align_spans, describe, read, stack

FINE, COARSE, PLAIN = tiny_tokenizer(265), tiny_tokenizer(340, "lines"), tiny_tokenizer(300, None)
texts = st.text(min_size=1, max_size=60).filter(str.strip)
pairs = st.permutations([FINE, COARSE, PLAIN])


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def covered(reading, token):
    """The characters of the messages that a token covers."""
    start, end = reading.offsets[token]
    spans = reading.prompt.spans
    return {(s.message, s.offset + place - s.start) for s in spans for place in range(max(start, s.start), min(end, s.end))}


@settings(deadline=None)
@given(contents=st.lists(texts, min_size=1, max_size=3), tokenizers=pairs)
def test_each_token_reads_the_one_that_overlaps_it_most(contents, tokenizers):
    receiver, sharer = (read(chat(*contents), tokenizer) for tokenizer in tokenizers[:2])  # always two different ones
    index = align_spans(receiver, sharer)
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
    receiver, sharer = (read(chat(*contents), tokenizer) for tokenizer in tokenizers[:2])
    index = align_spans(receiver, sharer)
    assert (np.diff(index) >= 0).all()
    assert (index >= -1).all()
    assert (index < len(sharer.ids)).all()


@settings(deadline=None)
@given(contents=st.lists(texts, min_size=1, max_size=3), tokenizer=st.sampled_from([FINE, COARSE, PLAIN]))
def test_identical_tokenizers_align_by_identity(contents, tokenizer):
    reading = read(chat(*contents), tokenizer)
    assert align_spans(reading, read(chat(*contents), tokenizer)).tolist() == list(range(len(reading.ids)))
    identity = align(chat(*contents), tokenizer, [(COARSE, "identity")])
    assert identity.sharers[0][0] is identity.receiver, "the sharer reads the receiver's ids"
    assert identity.sharers[0][1].tolist() == list(range(len(reading.ids)))


def test_template_reads_the_end_of_the_sharers_template():
    receiver, sharer = read(chat("What is it?"), FINE), read(chat("What is it?"), COARSE)
    index = align_spans(receiver, sharer)
    assert index[-1] == len(sharer.ids) - 1
    assert sharer.offsets[index[0]][1] == sharer.prompt.spans[0].start


ORDERS = {
    "in order": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
    "system late": "{% for m in messages if m.role != 'system' %}{% if loop.last %}<|system|>{{ messages[0].content }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
    "no system": "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
    "thoughts dropped": "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}[assistant]",
    "twice": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}again{{ messages[-1].content }}<|assistant|>",
}
LONG = [
    {"role": "system", "content": "Be brief."},
    *chat("What is the capital of Norway?", "<think>Norway, so Oslo.</think>It is Oslo.", "And the language they speak there?"),
]


def read_like(order, tokenizer):
    tokenizer.chat_template = ORDERS[order]
    return read(LONG, tokenizer)


@pytest.mark.parametrize("theirs", ORDERS)
@pytest.mark.parametrize("mine", ORDERS)
def test_templates_may_move_repeat_or_leave_out_messages(mine, theirs):
    receiver, sharer = read_like(mine, tiny_tokenizer(265)), read_like(theirs, tiny_tokenizer(340))
    index = align_spans(receiver, sharer)
    assert (np.diff(index) >= 0).all()
    assert index[-1] == len(sharer.ids) - 1
    met = [token for token in range(len(index)) if covered(receiver, token) & covered(sharer, index[token])]
    read_there = set().union(*(covered(receiver, token) for token in met))
    assert {number for number in (0, 1, 3) if characters_of(number) <= read_there} >= {1, 3}, "all that both write in one order"
    if mine == theirs:
        assert characters_of(0) <= read_there or mine == "no system"


def characters_of(number):
    return {(number, place) for place in range(len(LONG[number]["content"]))}


def test_template_inside_a_message_reads_on_from_the_message():
    tokenizer = tiny_tokenizer(265)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content.split('#') | join('<|end|>') }}{% endfor %}<|assistant|>"
    receiver, sharer = read(chat("one#two"), tokenizer), read(chat("one#two"), COARSE)
    index = align_spans(receiver, sharer)
    inside = receiver.prompt.text.index("<|end|>")
    token = receiver.offsets[:, 0].tolist().index(inside)
    assert index[token] == index[token - 1]
    assert (0, 4) in covered(sharer, index[token + 1])


def test_the_last_token_is_never_fused():
    row = align("Oslo is the capital", FINE, [(COARSE, "span")])
    assert row.fusable.tolist() == [True] * (len(row.fusable) - 1) + [False]


def test_messages_alone_can_be_fused():
    row = align(chat("Oslo"), FINE, [(COARSE, "span")], fuse="messages")
    span = render(chat("Oslo"), FINE).spans[0]
    fused = [row.receiver.offsets[token].tolist() for token in np.flatnonzero(row.fusable)]
    assert fused
    assert all(span.start <= start < end <= span.end for start, end in fused)


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


def test_describe_shows_every_receiver_token():
    lines = list(describe("Oslo?", FINE, COARSE, "span"))
    assert len(lines) == len(read(chat("Oslo?"), FINE).ids) + 2
    assert lines[-2].endswith("-")
