"""A prefix store saves prefill and changes no answer, also when several pairs share it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile

import pytest
import torch
from helpers import assert_kv_close, assert_kv_equal, families

from kvfuse.cache.kv import KV
from kvfuse.cache.prefix_cache import MIN_REUSED_TOKENS
from kvfuse.cache.transformers_cache import read_cache, supports_prefix_reuse
from kvfuse.checkpoint import save_fuser
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Fused, Mismatched, ProjectedOnly, RandomFuser, Shuffled, Zeroed
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.stages.prefix_store import PrefixStore
from kvfuse.testing import FAMILIES, tiny_fuser, tiny_model, tiny_tokenizer

QUESTIONS = ("What is the capital of Norway?", "Which language do people speak there?", "And in Rotterdam?")
BRIEF = {"role": "system", "content": "Answer the question in one word."}
PROMPTS = [[BRIEF, {"role": "user", "content": text}] for text in QUESTIONS]
CHAT = PROMPTS[0]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
STATEFUL = ("qwen3_next", "falcon_h1")
PLAIN = [family for family in FAMILIES if family not in STATEFUL]
SAME = {"seed": 4}
OTHER = {"tokenizer": tiny_tokenizer(300, "lines")}


def pair_of(receiver="qwen3", sharer="llama", theirs=OTHER, num_sharers=1, fusion="parallel", **options):
    mine = tiny_model(receiver)
    sharers = [tiny_model(sharer, **{"seed": 2 + place, **theirs}) for place in range(num_sharers)]
    return CacheToCache(
        mine, sharers, [tiny_fuser(mine, one, seed=i, **options) for i, one in enumerate(sharers)], fusion
    )


def with_store(pair, store=None):
    return CacheToCache(pair.receiver, pair.sharers, pair.fusers, pair.fusion, store or PrefixStore())


def conversation(pair, questions=QUESTIONS):
    """The prompts of a conversation, turn by turn, as somebody without a store has it."""
    messages = [BRIEF]
    for question in questions:
        messages.append({"role": "user", "content": question})
        yield list(messages)
        messages.append({"role": "assistant", "content": pair.chat(messages, **GREEDY)})


@contextmanager
def counted(pair):
    """For each model, how many tokens each of its runs was fed."""
    fed = [[] for _ in (pair.receiver, *pair.sharers)]

    def hook(runs):
        return lambda module, args: runs.append(args[0].shape[1])

    models = [one.model for one in (pair.receiver, *pair.sharers)]
    handles = [
        model.get_input_embeddings().register_forward_pre_hook(hook(runs))
        for model, runs in zip(models, fed, strict=True)
    ]
    try:
        yield fed
    finally:
        for handle in handles:
            handle.remove()


def new_tokens(ids, known):
    """How many of the ids come after the longest beginning that one of the known has, too."""
    common = [
        sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ids, before, strict=False))) for before in known
    ]
    return len(ids) - max(common, default=0)


def assert_each_turn_reads_only_what_is_new(pair):
    kept, known = with_store(pair), [[] for _ in (pair.receiver, *pair.sharers)]
    for turn, messages in enumerate(conversation(pair)):
        aligned = kept.align(messages)
        read = [aligned.receiver.ids[:-1].tolist(), *(theirs.ids.tolist() for theirs, _ in aligned.sharers)]
        with counted(kept) as fed:
            ids = kept.generate(messages, **GREEDY)
        assert torch.equal(ids, pair.generate(messages, **GREEDY))
        decoded = ids.shape[1] - len(aligned.receiver.ids)
        runs = [sum(fed[0][:-decoded]), *map(sum, fed[1:])]
        assert runs == [new_tokens(one, before) for one, before in zip(read, known, strict=True)]
        assert turn == 0 or all(run < len(one) for run, one in zip(runs, read, strict=True))
        for before, one in zip(known, read, strict=True):
            before.append(one)


@pytest.mark.parametrize("family", families(*STATEFUL))
def test_a_receiver_of_each_family(family):
    assert_each_turn_reads_only_what_is_new(pair_of(receiver=family))


@pytest.mark.parametrize("family", families(*STATEFUL))
def test_a_sharer_of_each_family(family):
    assert_each_turn_reads_only_what_is_new(pair_of(sharer=family))


PAIRS = {
    "identity": {"theirs": SAME},
    "identity, rope removed": {"theirs": SAME, "rope": "removed"},
    "rope removed": {"rope": "removed"},
    "re-encoded": {"token_alignment": "reencode-longest"},
    "re-encoded, rope removed": {"token_alignment": "reencode-first", "rope": "removed"},
    "messages": {"fuse": "messages"},
    "two": {"num_sharers": 2},
    "two in sequence": {"num_sharers": 2, "fusion": "sequential", "rope": "removed"},
    "two re-encoded": {"num_sharers": 2, "token_alignment": "reencode-longest"},
    "closed": {"gate_init": -1.0},
    "low rank": {"kind": "low-rank"},
}


@pytest.mark.parametrize("options", PAIRS.values(), ids=list(PAIRS))
def test_pairs_of_each_kind(options):
    assert_each_turn_reads_only_what_is_new(pair_of(**options))


@pytest.mark.parametrize("options", PAIRS.values(), ids=list(PAIRS))
@torch.no_grad()
def test_the_fused_cache_is_the_same(options):
    pair = pair_of(**options)
    kept = with_store(pair)
    for turn, messages in enumerate(conversation(pair)):
        prompt = stack([pair.align(messages)])
        assert_kv_close(read_cache(kept.prefill(prompt)), read_cache(pair.prefill(prompt)))
        assert (kept.store.stats.positions_saved > 0) == (turn > 0)


@pytest.mark.parametrize(
    "options", [{"theirs": SAME}, {}, {"token_alignment": "reencode-longest"}], ids=["identity", "span", "re-encoded"]
)
def test_where_the_response_is_fused_too(options):
    pair = pair_of(fuse_response=True, **options)
    kept = with_store(pair)
    for turn, messages in enumerate(conversation(pair)):
        assert kept.chat(messages, **GREEDY) == pair.chat(messages, **GREEDY)
        assert kept.chat(messages, **GREEDY) == pair.chat(messages, **GREEDY), (
            "what follows a response leaves its prompt alone"
        )
        assert kept.store.stats.tokens_saved > turn


@torch.no_grad()
def test_a_prompt_that_is_known_is_not_read(pair):
    kept, prompt = with_store(pair), stack([pair.align(CHAT)])
    expected = [read_cache(kept.prefill(prompt)).clone(), read_cache(kept.prefill(prompt, fusers=[])).clone()]
    with counted(kept) as fed:
        assert_kv_equal(read_cache(kept.prefill(prompt)), expected[0])
        assert_kv_equal(read_cache(kept.prefill(prompt, fusers=[])), expected[1])
    assert fed == [[], []]
    assert not torch.equal(expected[0].key, expected[1].key)
    assert_kv_close(expected[1], read_cache(pair.prefill(prompt, fusers=[])))


def test_models_are_read_once_whatever_they_are_in_another_pair(pair):
    store, prompt = PrefixStore(), stack([pair.align(CHAT)])
    first, second = (
        CacheToCache(pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], seed=s)]) for s in (1, 2)
    )
    with torch.no_grad():
        with_store(first, store).prefill(prompt)
        with counted(second) as fed:
            assert_kv_close(read_cache(with_store(second, store).prefill(prompt)), read_cache(second.prefill(prompt)))
    assert [len(runs) for runs in fed] == [1, 1], "those without a store"


CONTROLS = [Fused, Zeroed, lambda pair: Mismatched(pair, lambda _: PROMPTS[1]), Shuffled, RandomFuser, ProjectedOnly]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("options", [{}, {"theirs": SAME}], ids=["span", "identity"])
@torch.no_grad()
def test_controls_and_the_pair_never_get_each_others_caches(options, order):
    pair = pair_of(**options)
    kept = with_store(pair)
    for _ in range(2):
        for control in CONTROLS[::order]:
            for prompt in (PROMPTS[0], PROMPTS[2]):
                own, known = control(pair), control(kept)
                batch = stack([own.align(prompt)])
                assert_kv_close(
                    read_cache(kept.prefill(batch, fusers=known.fusers)),
                    read_cache(pair.prefill(batch, fusers=own.fusers)),
                )
    assert kept.store.stats.positions_saved > 0


CHANGES = {
    "weights, unseen by autograd": lambda fuser: fuser.projection_out.weight.data.mul_(2.0),
    "gates": lambda fuser: [torch.nn.init.constant_(one, -1.0) for one in fuser.gate_parameters()],
    "weights": lambda fuser: fuser.projection_out.weight.mul_(2.0),
    "precision": lambda fuser: fuser.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@torch.no_grad()
def test_a_fuser_that_was_changed_is_another(change):
    pair = pair_of()
    kept, prompt = with_store(pair), stack([pair.align(CHAT)])
    before = read_cache(kept.prefill(prompt)).clone()
    change(pair.fusers[0])
    after = read_cache(kept.prefill(prompt))
    assert kept.store.stats.positions_saved == 0
    assert_kv_close(after, read_cache(pair.prefill(prompt)))
    assert not torch.equal(after.key, before.key)


@torch.no_grad()
def test_a_fuser_in_training_or_with_hooks_is_run_again(pair):
    kept, prompt, seen = with_store(pair), stack([pair.align(CHAT)]), []
    kept.prefill(prompt)
    with pair.fusers[0].register_forward_hook(lambda *_: seen.append(1)):
        kept.prefill(prompt)
    assert seen
    pair.fusers[0].train()
    kept.prefill(prompt)
    assert kept.store.stats.positions_saved == 0


@torch.no_grad()
def test_two_precisions_of_a_model_share_no_cache(pair, saved_models):
    store, prompt = PrefixStore(), stack([pair.align(CHAT)])
    for dtype in (torch.bfloat16, torch.float32):
        loaded = [LanguageModel.from_pretrained(saved_models / name, dtype=dtype) for name in ("receiver", "sharer")]
        one = CacheToCache(loaded[0], loaded[1:], pair.fusers)
        for _ in range(2):
            assert_kv_equal(read_cache(with_store(one, store).prefill(prompt)), read_cache(one.prefill(prompt)))
    one.receiver.model.to(torch.bfloat16)
    unfused = [read_cache(each.prefill(prompt, fusers=[])) for each in (with_store(one, store), one)]
    assert_kv_equal(*unfused)


@torch.no_grad()
def test_a_changed_model_reuses_no_cache():
    pair = pair_of()
    kept, prompt = with_store(pair), stack([pair.align(CHAT)])
    kept.prefill(prompt)
    pair.receiver.model.get_input_embeddings().weight.mul_(1.5)
    assert_kv_close(read_cache(kept.prefill(prompt)), read_cache(pair.prefill(prompt)))


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


def held(store):
    return [part for entry in store._cache.entries() for layer in entry.layers for part in layer]


@pytest.mark.parametrize("fuse_response", [False, True])
@pytest.mark.parametrize("options", WAYS.values(), ids=list(WAYS))
def test_stored_caches_are_never_written_to(options, fuse_response):
    if fuse_response and "prompt_lookup_num_tokens" in options:
        pytest.skip("not both")
    pair = pair_of(fuse_response=fuse_response)
    kept = with_store(pair)
    kept.generate(CHAT, **GREEDY, **options)
    copies = [part.clone() for part in held(kept.store)]
    for _ in range(2):
        assert torch.equal(kept.generate(CHAT, **GREEDY, **options), pair.generate(CHAT, **GREEDY, **options))
    assert all(torch.equal(part, copy) for part, copy in zip(held(kept.store), copies, strict=True))


@torch.no_grad()
def test_caches_changed_by_the_caller_are_not_stored(pair):
    kept, prompt = with_store(pair), stack([pair.align(CHAT)])
    streams = kept.read(prompt)
    for layer in streams.sharers[0].layers:
        layer.keys.zero_()
    kept.fuse(prompt, caches=streams)
    assert_kv_close(read_cache(kept.prefill(prompt)), read_cache(pair.prefill(prompt)))


def test_batches_gradients_and_states_are_read_as_ever(pair):
    kept = with_store(pair)
    kept.generate([CHAT, CHAT], **GREEDY)
    assert read_cache(kept.prefill(stack([pair.align(CHAT)]))).key.requires_grad
    for options in ({"receiver": "qwen3_next"}, {"sharer": "falcon_h1"}):
        stateful = pair_of(**options)
        after = with_store(stateful, kept.store)
        for messages in conversation(stateful):
            assert after.chat(messages, **GREEDY) == stateful.chat(messages, **GREEDY)
        assert kept.store.stats.positions_saved == 0
    assert not any(supports_prefix_reuse(tiny_model(family).model) for family in STATEFUL)


def test_keys_that_the_length_of_a_prompt_turns_are_not_kept():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not supports_prefix_reuse(tiny_model("llama", rope_parameters=rope).model)
    assert supports_prefix_reuse(tiny_model("llama").model)


@torch.no_grad()
def test_the_least_recently_used_leave(pair):
    texts = (
        "What is the capital of Norway?",
        "Two models read the same question",
        "Answer in Dutch, or in English, please",
    )
    prompts, sizes = [stack([pair.align(text)]) for text in texts], []
    for prompt in prompts:
        one = with_store(pair)
        one.prefill(prompt)
        sizes.append(one.store.stats.nbytes)
        assert (one.store.stats.entries, sizes[-1]) == (3, sum(part.nbytes for part in held(one.store)))
    most = max(sizes[0] + sizes[1], sizes[0] + sizes[2])
    kept = with_store(pair, PrefixStore(max_bytes=most))
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        kept.prefill(prompt)
        assert kept.store.stats.nbytes <= most
    with counted(kept) as fed:
        kept.prefill(prompts[0])
        assert fed == [[], []], "it was asked for in between"
        kept.prefill(prompts[1])
        assert all(fed)
    kept.store.clear()
    assert (kept.store.stats.entries, kept.store.stats.nbytes) == (0, 0)


def test_what_is_too_long_is_read_as_ever(pair):
    kept = with_store(pair, PrefixStore(max_bytes=10))
    assert kept.chat(CHAT, **GREEDY) == pair.chat(CHAT, **GREEDY)
    assert kept.store.stats.entries == 0


def test_a_conversation_is_held_once(pair):
    kept = with_store(pair)
    for messages in conversation(pair):
        kept.chat(messages, **GREEDY)
    length = len(pair.align(messages).receiver.ids) - 1
    assert max(part.shape[2] for part in held(kept.store)) >= length
    assert sum(entry.text.own.shape[1] == length for entry in kept.store._cache.entries()) >= 2


def test_threads_share_a_store(pair):
    kept = with_store(pair)
    prompts = [
        messages for question in QUESTIONS for messages in ([BRIEF, {"role": "user", "content": question}], CHAT)
    ] * 2
    expected = [pair.chat(prompt, **GREEDY) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        caches = list(pool.map(lambda prompt: _prefilled(kept, prompt), prompts))
    for prompt, cache in zip(prompts, caches, strict=True):
        assert_kv_close(cache, _prefilled(pair, prompt))
    assert ["".join(kept.stream(prompt, **GREEDY)) for prompt in prompts] == expected


@torch.no_grad()
def _prefilled(pair, messages) -> KV:
    return read_cache(pair.prefill(stack([pair.align(messages)])))


def test_a_store_stays_with_its_pair(pair, saved_models, tmp_path):
    save_fuser(pair.fusers[0], tmp_path / "fuser")
    names = {"receiver": saved_models / "receiver", "sharer": saved_models / "sharer", "fuser": tmp_path / "fuser"}
    store = PrefixStore()
    loaded = CacheToCache.from_pretrained(**names, store=store)
    assert loaded.select(0).store is store
    assert pair.store is None
    loaded.chat(CHAT, **GREEDY)
    loaded.chat(CHAT, **GREEDY)
    stats, aligned = store.stats, loaded.align(CHAT)
    length = len(aligned.receiver.ids) - 1
    assert (stats.prompts, stats.hits, stats.positions_saved) == (4, 2, length)
    assert stats.tokens == 2 * stats.tokens_saved == 2 * (length + len(aligned.sharers[0][0].ids))


@pytest.mark.parametrize("place", [5, 30])
@torch.no_grad()
def test_a_sharer_that_reads_something_else_in_the_same_places(place):
    pair = pair_of(theirs=SAME)
    kept, prompt = with_store(pair), stack([pair.align(CHAT)])
    kept.prefill(prompt)
    ids = prompt.sharers[0].ids.clone()
    ids[0, place] += 1
    other = replace(prompt, sharers=(replace(prompt.sharers[0], ids=ids),))
    assert_kv_close(read_cache(kept.prefill(other)), read_cache(pair.prefill(other)))
    assert kept.store.stats.positions_saved == (place if place > MIN_REUSED_TOKENS else 0)


@torch.no_grad()
def test_fusers_of_the_same_weights_that_read_other_layers(pair):
    store, prompt = PrefixStore(), stack([pair.align(CHAT)])
    for layers in ("terminal", [0, 0, 0]):
        fuser = tiny_fuser(pair.receiver, pair.sharers[0], layer_alignment=layers)
        one = CacheToCache(pair.receiver, pair.sharers, [fuser])
        assert_kv_close(read_cache(with_store(one, store).prefill(prompt)), read_cache(one.prefill(prompt)))
