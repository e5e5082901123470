import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import chat
from transformers import AutoTokenizer

from kvfuse.cache.transformers_cache import read_cache
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import align, stack
from kvfuse.prompts.message_axis import locate
from kvfuse.prompts.reencode import REENCODINGS, common_positions, reencoding, splice
from kvfuse.prompts.tokenized import tokenize
from kvfuse.testing import tiny_fuser, tiny_tokenizer

FINE, COARSE = tiny_tokenizer(265), tiny_tokenizer(340, "lines")
texts = st.text(min_size=1, max_size=40).filter(str.strip)


def one_by_one(token, receiver, sharer, how):
    """The definition, for a token without a role."""
    pieces = sharer.encode(receiver.decode([token]), add_special_tokens=False)
    lengths = [len(sharer.decode([piece])) for piece in pieces]
    return pieces[lengths.index(max(lengths)) if how == "reencode-longest" else 0]


@pytest.mark.parametrize("how", REENCODINGS)
@pytest.mark.parametrize(("receiver", "sharer"), [(FINE, COARSE), (COARSE, FINE)])
def test_the_table_is_decoding_and_encoding_one_by_one(receiver, sharer, how):
    table = reencoding(receiver=receiver, sharer=sharer, strategy=how)
    ordinary = sorted(set(range(len(receiver))) - set(receiver.all_special_ids))
    assert table[ordinary].tolist() == [one_by_one(token, receiver, sharer, how) for token in ordinary]


def test_first_and_longest_differ_where_they_should():
    sharer = tiny_tokenizer(340)
    sharer.add_tokens(["resx"])
    receiver = tiny_tokenizer(265)
    receiver.add_tokens(["qresx"])
    token = receiver.convert_tokens_to_ids("qresx")
    tables = [reencoding(receiver=receiver, sharer=sharer, strategy=how) for how in REENCODINGS]
    first, longest = (sharer.decode([table[token]]) for table in tables)
    assert (first, longest) == ("q", "resx")


def test_special_tokens_keep_their_role_else_their_name():
    receiver, sharer = tiny_tokenizer(300), tiny_tokenizer(320)
    receiver.add_special_tokens(
        {"bos_token": "<|user|>", "unk_token": "<unknown>", "extra_special_tokens": ["<|system|>", "<nowhere>"]}
    )
    sharer.add_special_tokens({"bos_token": "<|assistant|>", "pad_token": "<|system|>"})
    table = reencoding(receiver=receiver, sharer=sharer, strategy="reencode-first")
    expected = {"<pad>": "<|system|>", "<|end|>": "<|end|>", "<|user|>": "<|assistant|>", "<|system|>": "<|system|>"}
    read_as = {
        name: sharer.convert_ids_to_tokens(int(table[receiver.convert_tokens_to_ids(name)])) for name in expected
    }
    assert read_as == expected
    assert table[receiver.convert_tokens_to_ids("<nowhere>")] == 0, "the sharer has no unknown token"


def test_the_table_is_built_once_and_again_for_new_tokens():
    receiver = tiny_tokenizer(265)
    table = reencoding(receiver=receiver, sharer=COARSE, strategy="reencode-first")
    assert reencoding(receiver=receiver, sharer=COARSE, strategy="reencode-first") is table
    assert not table.flags.writeable
    receiver.add_tokens(["<new>"])
    assert len(reencoding(receiver=receiver, sharer=COARSE, strategy="reencode-first")) == len(table) + 1


def test_the_table_goes_with_its_tokenizers():
    receiver = tiny_tokenizer(265)
    table = weakref.ref(reencoding(receiver=receiver, sharer=receiver, strategy="reencode-first"))
    del receiver
    gc.collect()
    assert table() is None


def test_padding_left_over_from_another_call_does_not_matter():
    padding = tiny_tokenizer(340)
    padding(["a", "longer"], padding="max_length", max_length=9, truncation=True)
    expected = reencoding(receiver=FINE, sharer=tiny_tokenizer(340), strategy="reencode-longest")
    assert reencoding(receiver=FINE, sharer=padding, strategy="reencode-longest").tolist() == expected.tolist()


def test_splice_keeps_both_orders():
    table = np.arange(100) + 100
    ids, sections, index = splice(
        receiver_ids=np.array([1, 2, 3, 4, 5]),
        receiver_sections=np.array([0, 1, 1, 2, 3]),
        sharer_ids=np.array([7, 8, 9]),
        sharer_sections=np.array([0, 0, 1]),
        table=table,
    )
    assert ids.tolist() == [7, 8, 102, 103, 105]
    assert sections.tolist() == [0, 0, 1, 1, 3]
    assert index.tolist() == [1, 2, 3, 3, 4], "no template between the messages: the last token before"


def test_messages_have_the_same_positions_in_both_models():
    """A shorter template section is followed by a hole, as if it were padded to the longer one's length."""
    receiver, sharer = common_positions(
        receiver_sections=np.array([0, 1, 1, 2, 2, 2, 3, 4]), sharer_sections=np.array([0, 0, 0, 1, 1, 2, 3, 4, 4])
    )
    assert receiver.tolist() == [0, 3, 4, 5, 6, 7, 8, 9]
    assert sharer.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]


@pytest.mark.parametrize(("receiver", "sharer"), [(FINE, COARSE), (COARSE, FINE)])
def test_both_models_get_the_same_positions_for_messages(receiver, sharer):
    row = align(chat("What is it?", "No.", "Oslo"), receiver, [(sharer, "reencode-first")], fuse="messages")
    (theirs, index), message = row.sharers[0], locate(row.receiver).sections % 2 == 1
    assert row.receiver.positions[message].tolist() == theirs.positions[index[message]].tolist()
    assert max(np.diff(row.receiver.positions).max(), np.diff(theirs.positions).max()) > 1, (
        "the templates are of unlike length"
    )
    plain = align("one two", receiver, [(sharer, "reencode-first")])
    assert plain.receiver.positions.tolist() == list(range(len(plain.receiver.ids))), (
        "nothing to skip without templates"
    )


@settings(deadline=None)
@given(
    contents=st.lists(texts, min_size=1, max_size=3),
    tokenizers=st.permutations([FINE, COARSE]),
    how=st.sampled_from(REENCODINGS),
)
def test_the_sharer_reads_its_template_around_the_receivers_messages(contents, tokenizers, how):
    receiver, sharer = tokenizers
    row = align(chat(*contents), receiver, [(sharer, how)], fuse="messages")
    (theirs, index), own, turns = row.sharers[0], tokenize(chat(*contents), sharer), locate(row.receiver).sections
    message = turns % 2 == 1
    table = reencoding(receiver=receiver, sharer=sharer, strategy=how)
    assert theirs.ids[index[message]].tolist() == table[row.receiver.ids[message]].tolist()
    assert (np.diff(index[message]) > 0).all(), "one to one"
    template = np.setdiff1d(np.arange(len(theirs.ids)), index[message])
    assert theirs.ids[template].tolist() == own.ids[locate(own).sections % 2 == 0].tolist()
    assert (np.diff(index) >= 0).all()
    assert index[-1] == len(theirs.ids) - 1, "the end of the prompt reads the end of the prompt"
    assert (message[row.fusable]).all()


def test_fusing_messages_changes_no_other_token(receiver, sharer):
    fuser = tiny_fuser(receiver, sharer, token_alignment="reencode-longest", fuse="messages")
    pair = CacheToCache(receiver, [sharer], [fuser])
    row = pair.align(chat("What is the capital of Norway?"))
    fused, clean = (read_cache(pair.prefill(stack([row]), fusers=fusers)) for fusers in (None, []))
    changed = (fused.value != clean.value).any(-1).any(2).any(0)[0]  # (T - 1,): the last token is read by decoding
    assert changed.tolist() == row.fusable[: len(changed)].tolist()
    assert changed.any()


def test_skipped_positions_reach_both_models_and_what_is_generated(receiver, sharer):
    """The keys are those of a prefill at these positions, and generating goes on from the last of them."""
    pair = CacheToCache(
        receiver,
        [sharer],
        [tiny_fuser(receiver, sharer, token_alignment="reencode-first", fuse="messages", gate_init=-1.0)],
    )
    prompt = stack([pair.align(chat("What is it?", "No.", "Oslo")), pair.align(chat("hi"))])
    skipped = prompt.positions[:, -1] + 1 - prompt.mask.sum(-1)
    assert (skipped > 0).all()
    tokens = pair.decode(prompt, pair.prefill(prompt), max_new_tokens=4, do_sample=False)
    for row in range(2):
        real = prompt.mask[row] == 1
        ids, places = prompt.ids[row][real][None], prompt.positions[row][real][None]
        for _ in range(4):
            logits = receiver.model(ids, position_ids=places).logits
            ids, places = torch.cat([ids, logits[:, -1:].argmax(-1)], 1), torch.cat([places, places[:, -1:] + 1], 1)
        assert tokens[row, -4:].tolist() == ids[0, -4:].tolist()


def test_real_tokenizers(shared):
    receiver, sharer = (AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in ("gpt2", "mistral-v3"))
    table = reencoding(receiver=receiver, sharer=sharer, strategy="reencode-longest")
    for token in range(0, 50_000, 997):
        assert table[token] == one_by_one(token, receiver, sharer, "reencode-longest")
    assert table[receiver.eos_token_id] == sharer.eos_token_id
    row = align("Oslo, the capital of Norway", receiver, [(sharer, "reencode-longest")])
    assert sharer.decode(row.sharers[0][0].ids) == "<s> Os lo , the capital of Norway", "alone, each begins a word"
