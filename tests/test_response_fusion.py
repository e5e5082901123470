"""What is generated is fused too: token by token or all at once, the same."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import families

from kvfuse.cache.transformers_cache import CACHE, read_cache
from kvfuse.errors import PairError, PromptError
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import count_positions, pad_left, stack
from kvfuse.stages.prefill import prefill
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.loop.batches import collate
from kvfuse.training.loop.trainer import response_loss

QUESTION = [{"role": "user", "content": "What is the capital of Norway, and what do people speak there?"}]
PROMPTS = [QUESTION, [{"role": "user", "content": "hi"}], "Two models read the same question"]
GREEDY = {"max_new_tokens": 8, "do_sample": False}
SHARERS = {
    "same tokenizer": {"seed": 4},
    "other tokenizer": {"tokenizer": tiny_tokenizer(300, "lines"), "num_hidden_layers": 4},
}


def pair_of(receiver, sharer, **options):
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, fuse_response=True, **options)])


@pytest.fixture(params=SHARERS)
def followed(request, receiver):
    return pair_of(receiver, tiny_model("llama", **SHARERS[request.param]))


@pytest.fixture(params=families())
def any_followed(request, sharer):
    return pair_of(tiny_model(request.param), sharer)


def alone(pair, prompt, **options):
    ids = torch.from_numpy(pair.align(prompt).receiver.ids)[None]
    return pair.receiver.model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=["greedy", "beams", "two"]
)
def test_closed_gates_answer_as_the_receiver_alone(any_followed, options):
    closed = pair_of(any_followed.receiver, any_followed.sharers[0], gate_init=-1.0)
    assert torch.equal(closed.generate([QUESTION], **GREEDY, **options), alone(closed, QUESTION, **GREEDY, **options))


def test_a_batch_equals_its_prompts_one_by_one(followed):
    pad = followed.receiver.tokenizer.pad_token_id
    batch = followed.generate(PROMPTS, **GREEDY)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        single = followed.generate([prompt], **GREEDY)[0, len(followed.align(prompt).receiver.ids) :].tolist()
        together = row[-GREEDY["max_new_tokens"] :].tolist()
        assert [token for token in together if token != pad] == [token for token in single if token != pad]


def test_samples_and_static_caches_work_as_ever(followed):
    torch.manual_seed(3)
    assert len(followed.generate([QUESTION], max_new_tokens=4, do_sample=True, num_return_sequences=3)) == 3
    static = followed.generate([QUESTION], cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(static, followed.generate([QUESTION], **GREEDY))


def test_the_response_makes_a_difference(followed):
    prompt_only = CacheToCache(
        followed.receiver, followed.sharers, [tiny_fuser(followed.receiver, followed.sharers[0])]
    )
    assert not torch.equal(followed.generate([QUESTION], **GREEDY), prompt_only.generate([QUESTION], **GREEDY))


def losses_token_by_token(pair, example):
    """The loss of a response that is fed to the follower and the receiver one token at a time."""
    encoded = Encoder.of(pair).encode(example)
    prompt, ids = stack([encoded.prompt]), collate([encoded]).tail.ids
    fused = pair.fuse(prompt)
    cache, follower = fused.cache, fused.response_fuser
    losses = []
    for place in range(ids.shape[1] - 1):
        token = ids[:, place : place + 1]
        mask = torch.ones(1, prompt.ids.shape[1] + place, dtype=torch.long)
        follower.feed(cache, token, mask)
        position = prompt.positions[:, -1:] + place
        logits = pair.receiver.model(token, attention_mask=mask, position_ids=position, **{CACHE: cache}).logits[:, -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[:, place + 1]))
    return torch.stack(losses)


@torch.no_grad()
@pytest.mark.parametrize("family", families())
def test_token_by_token_equals_all_at_once(family, receiver):
    """With one tokenizer, decoding and training compute the same, for every family as receiver."""
    pair = pair_of(tiny_model(family), tiny_model("llama", seed=4))
    example = Example(QUESTION, "The capital is Oslo, they speak Norwegian.")
    at_once = response_loss(pair, collate([Encoder.of(pair).encode(example)]))
    torch.testing.assert_close(at_once, losses_token_by_token(pair, example).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rope", ["kept", "removed"])
def test_reencoded_tokens_are_read_one_by_one_as_all_at_once(receiver, sharer, rope):
    pair = pair_of(receiver, sharer, token_alignment="reencode-longest", fuse="messages", rope=rope)
    example = Example(QUESTION, "The capital is Oslo, they speak Norwegian.")
    at_once = response_loss(pair, collate([Encoder.of(pair).encode(example)]))
    torch.testing.assert_close(at_once, losses_token_by_token(pair, example).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_between_tokenizers_they_agree_where_words_end_together(receiver):
    """A sharer may have read half a word that it will read as another token later; what is whole is read alike."""
    pair = pair_of(receiver, tiny_model("llama", tiny_tokenizer(320, "lines"), seed=4))
    example = Example(QUESTION, "a b c d e")  # letters and spaces are the same pieces for both
    at_once = response_loss(pair, collate([Encoder.of(pair).encode(example)]))
    torch.testing.assert_close(at_once, losses_token_by_token(pair, example).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batch_loss_is_the_token_weighted_mean_of_single_losses(followed):
    encoded = [Encoder.of(followed).encode(Example(QUESTION, "It is Oslo." * length)) for length in (1, 2, 3)]
    counts = [len(one.response.ids) for one in encoded]
    mean = sum(
        float(response_loss(followed, collate([one]))) * count for one, count in zip(encoded, counts, strict=True)
    ) / sum(counts)
    assert float(response_loss(followed, collate(encoded))) == pytest.approx(mean, rel=1e-5)


TEXTS = [
    "The capital of Norway is Oslo.",
    "naïve café — Übermut",
    "東京は日本の首都です",
    "👩‍👩‍👧 family\n\tdef fuse(x): return x + 1",
]


@torch.no_grad()
@pytest.mark.parametrize("text", TEXTS)
def test_a_sharer_has_read_its_own_tokens_of_the_text_so_far(receiver, text):
    """Whatever the receiver's pieces were, half characters included, in rows of unlike length."""
    sharer = tiny_model("llama", tiny_tokenizer(300, "lines"), num_hidden_layers=4)
    pair = pair_of(receiver, sharer)
    prompt = stack([pair.align(prompt) for prompt in PROMPTS])
    streams = pair.read(prompt)
    follower = pair.fuse(prompt, caches=streams).response_fuser
    texts = [text, text[::-1], text[: len(text) // 2]]
    rows = [receiver.tokenizer(one, add_special_tokens=False).input_ids for one in texts]
    length = max(map(len, rows))
    fed = torch.tensor([row + [receiver.tokenizer.eos_token_id] * (length - len(row)) for row in rows])
    for place in range(-1, length):
        token = prompt.ids[:, -1:] if place < 0 else fed[:, place : place + 1]
        follower.step(token, torch.cat([prompt.mask, torch.ones(3, place + 1, dtype=torch.long)], dim=1))
    rows = follower.sharers[0].rows
    for read, (reading, _), said in zip(
        rows, (pair.align(prompt).sharers[0] for prompt in PROMPTS), texts, strict=True
    ):
        assert _text(sharer, read) == _text(sharer, reading.ids) + said
    ids, mask = pad_left([np.array(row) for row in rows], 0)
    at_once, followed = (
        read_cache(prefill(sharer.model, ids, mask, count_positions(mask))),
        read_cache(streams.sharers[0]),
    )
    seen = mask.bool()[None, :, None, :, None]
    torch.testing.assert_close(followed.key * seen, at_once.key * seen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(followed.value * seen, at_once.value * seen, rtol=1e-4, atol=1e-4)


def _text(model, ids):
    return model.tokenizer.decode(ids, skip_special_tokens=True)


def test_gradients_reach_every_fuser_parameter(followed):
    followed.fusers[0].train()
    response_loss(followed, collate([Encoder.of(followed).encode(Example(QUESTION, "It is Oslo."))])).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in followed.fusers[0].parameters())


def test_what_cannot_work_is_refused_by_name(receiver, followed):
    hybrid = tiny_model("qwen3_next", tiny_tokenizer(300, "lines"))
    with pytest.raises(PairError, match="linear attention"):
        pair_of(receiver, hybrid)
    same_tokenizer = pair_of(receiver, tiny_model("qwen3_next", seed=4), gate_init=-1.0)
    assert torch.equal(same_tokenizer.generate([QUESTION], **GREEDY), alone(same_tokenizer, QUESTION, **GREEDY))
    with pytest.raises(PromptError, match="prompt_lookup_num_tokens"):
        followed.generate([QUESTION], prompt_lookup_num_tokens=2, **GREEDY)


@pytest.mark.parametrize("fuse_response", [True, False])
def test_threads_answer_beside_one_another_as_one_after_another(receiver, fuse_response):
    """What a request needs is in its own caches and in a copy of the model, never on the model."""
    other = tiny_model("llama", **SHARERS["other tokenizer"])
    pair = CacheToCache(receiver, [other], [tiny_fuser(receiver, other, fuse_response=fuse_response)])
    before = set(vars(receiver.model))
    expected = [pair.generate([prompt], **GREEDY).tolist() for prompt in PROMPTS * 4]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda prompt: pair.generate([prompt], **GREEDY).tolist(), PROMPTS * 4))
    assert got == expected
    assert set(vars(receiver.model)) == before
