import copy
import threading
from dataclasses import replace

import pytest
import torch
from helpers import assert_kv_close, assert_kv_equal, families
from transformers import StaticCache, StoppingCriteria, TextStreamer

from kvfuse.cache.transformers_cache import CACHE, is_filled, read_cache
from kvfuse.checkpoint import save_fuser
from kvfuse.errors import PairError, PromptError
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Single
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, count_positions, stack
from kvfuse.stages.fuse import fuse
from kvfuse.stages.prefill import prefill
from kvfuse.testing import FAMILIES, tiny_fuser, tiny_model, tiny_tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of Norway, and what do people speak there?"}]
PROMPTS = [QUESTION, [{"role": "user", "content": "hi"}], "Two models read the same question", "a"]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


# Hybrids whose mixers forget their state when they are given several tokens on a filled cache
UNFIT = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 64,
        "block_types": ["recurrent", "recurrent", "attention"],
        "head_dim": 8,
    },
}


@pytest.fixture(params=families())
def any_pair(request, sharer):
    receiver = tiny_model(request.param)
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])


def closed(pair):
    fusers = [tiny_fuser(pair.receiver, sharer, gate_init=-1.0) for sharer in pair.sharers]
    return CacheToCache(pair.receiver, pair.sharers, fusers)


def receiver_alone(pair, prompt, **options):
    aligned = stack([pair.align(prompt)])
    return pair.receiver.model.generate(aligned.ids, attention_mask=aligned.mask, **options)


def new_tokens(pair, prompt, **options):
    return pair.generate([prompt], **options)[0, len(pair.align(prompt).receiver.ids) :].tolist()


def test_closed_gates_leave_the_cache_as_it_is_bit_for_bit(any_pair):
    pair, prompt = closed(any_pair), stack([any_pair.align(prompt) for prompt in PROMPTS])
    fused, alone = pair.prefill(prompt), pair.prefill(prompt, fusers=[])
    for mine, theirs in zip(fused.layers, alone.layers, strict=True):
        assert is_filled(mine) == is_filled(theirs)
        if not is_filled(mine):
            continue  # linear attention: its state is the receiver's own
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_closed_gates_answer_as_the_receiver_alone(any_pair, prompt):
    assert torch.equal(closed(any_pair).generate([prompt], **GREEDY), receiver_alone(any_pair, prompt, **GREEDY))


def test_open_gates_change_the_answer(any_pair):
    assert not torch.equal(any_pair.generate([QUESTION], **GREEDY), receiver_alone(any_pair, QUESTION, **GREEDY))


def test_fused_generate_equals_full_forwards_over_the_fused_cache(any_pair):
    """Greedy, one forward over the whole tail for every new token, with a fresh copy of the fused cache each time."""
    model, prompt = any_pair.receiver.model, stack([any_pair.align(QUESTION)])
    tail = prompt.ids[:, -1:]
    while tail.shape[1] <= GREEDY["max_new_tokens"] and (
        tail.shape[1] == 1 or tail[0, -1] != any_pair.receiver.tokenizer.eos_token_id
    ):
        cache = any_pair.prefill(prompt)
        logits = model(tail, **{CACHE: cache}).logits
        tail = torch.cat([tail, logits[:, -1:].argmax(-1)], dim=1)
    generated = any_pair.generate([QUESTION], **GREEDY)
    assert generated[0, prompt.ids.shape[1] - 1 :].tolist() == tail[0].tolist()


def assert_rows_are_single_runs(pair, batch, prompts):
    pad = pair.receiver.tokenizer.pad_token_id
    width = max(len(pair.align(prompt).receiver.ids) for prompt in prompts)
    for row, prompt in zip(batch, prompts, strict=True):
        together = [token for token in row[width:].tolist() if token != pad]
        assert together == [token for token in new_tokens(pair, prompt, **GREEDY) if token != pad]


def test_a_left_padded_batch_equals_its_prompts_one_by_one(any_pair):
    assert_rows_are_single_runs(any_pair, any_pair.generate(PROMPTS, **GREEDY), PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("receiver_family", FAMILIES)
@pytest.mark.parametrize("sharer_family", FAMILIES)
def test_every_family_reads_for_every_other(receiver_family, sharer_family):
    receiver, reader = tiny_model(receiver_family), tiny_model(sharer_family, tiny_tokenizer(300, "lines"), seed=2)
    pair = CacheToCache(receiver, [reader], [tiny_fuser(receiver, reader)])
    batch = pair.generate(PROMPTS[:2], **GREEDY)
    assert_rows_are_single_runs(pair, batch, PROMPTS[:2])


def test_fused_keys_and_values_do_not_depend_on_the_batch(any_pair):
    if getattr(any_pair.receiver.model.config, "sliding_window", None) is not None:
        pytest.skip("a windowed layer keeps its last positions only; the tokens are compared above")
    together = read_cache(any_pair.prefill(stack([any_pair.align(prompt) for prompt in PROMPTS[:3]])))
    for row, prompt in enumerate(PROMPTS[:3]):
        alone = read_cache(any_pair.prefill(stack([any_pair.align(prompt)])))
        length = alone.key.shape[3]
        torch.testing.assert_close(together.key[:, row, :, -length:], alone.key[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.value[:, row, :, -length:], alone.value[:, 0], rtol=1e-4, atol=1e-5)


OPTIONS = {
    "sampling": {"do_sample": True, "top_k": 20},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "do_sample": False},
    "best beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False, "disable_compile": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_every_way_to_generate_equals_the_receivers_own_when_gates_are_closed(any_pair, options):
    options = {"max_new_tokens": 6, **options}
    reference = {
        name: value for name, value in options.items() if name not in ("cache_implementation", "disable_compile")
    }
    without_sharer = closed(any_pair)
    torch.manual_seed(7)
    expected = receiver_alone(any_pair, QUESTION, **reference)
    torch.manual_seed(7)
    assert torch.equal(without_sharer.generate([QUESTION], **options), expected)


def test_a_static_cache_holds_what_a_growing_one_holds(any_pair):
    static = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(any_pair.generate(PROMPTS[:2], **static), any_pair.generate(PROMPTS[:2], **GREEDY))
    prompt = stack([any_pair.align(QUESTION)])
    assert isinstance(any_pair.prefill(prompt, max_cache_len=64), StaticCache)


def test_a_static_cache_is_as_long_as_transformers_own(pair):
    """Or longer, by ``max_cache_len``: a compiled receiver serves one length alone."""
    static = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    prompt, lengths = stack([pair.align(QUESTION)]), {}
    for name, run in (
        ("ours", pair.answer),
        ("theirs", lambda _, **options: receiver_alone(pair, QUESTION, **options)),
    ):
        for longer in ({}, {"max_cache_len": 100}):
            said = run(prompt, **static, **longer, return_dict_in_generate=True)
            lengths.setdefault(name, []).append(said[CACHE].layers[0].max_cache_len)
    assert lengths["ours"] == lengths["theirs"]


def test_a_cache_that_cannot_be_written_into_is_refused(pair):
    with pytest.raises(PromptError, match="dynamic or static, got 'quantized'"):
        pair.generate([QUESTION], cache_implementation="quantized", **GREEDY)


@pytest.mark.parametrize("kind", ["hybrid", "sliding_window", "quantized", "offloaded", "dynamic"])
@pytest.mark.parametrize("prompt", [QUESTION, "a"])
def test_a_cache_that_the_models_publisher_recommends_is_no_request(sharer, kind, prompt):
    receiver = tiny_model("qwen3")
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
    expected = pair.generate([prompt], **GREEDY)
    receiver.model.generation_config.cache_implementation = kind
    assert torch.equal(pair.generate([prompt], **GREEDY), expected)
    own = copy.deepcopy(receiver.model.generation_config)
    assert torch.equal(pair.generate([prompt], generation_config=own, **GREEDY), expected)
    if kind != "dynamic":
        with pytest.raises(PromptError, match=f"dynamic or static, got '{kind}'"):
            pair.generate([prompt], cache_implementation=kind, **GREEDY)


def test_prompt_lookup_equals_greedy_on_a_fused_cache(pair):
    assert torch.equal(
        pair.generate([QUESTION], prompt_lookup_num_tokens=2, **GREEDY), pair.generate([QUESTION], **GREEDY)
    )


def test_an_assistant_equals_greedy_on_a_fused_cache(pair):
    assistant = tiny_model("qwen3", seed=5).model
    assert torch.equal(
        pair.generate([QUESTION], assistant_model=assistant, **GREEDY), pair.generate([QUESTION], **GREEDY)
    )


def test_decoding_leaves_no_trace_on_the_model(pair):
    before = dict(vars(pair.receiver.model))
    pair.generate([QUESTION], **GREEDY)
    with pytest.raises(ValueError, match="max_new_tokens"):
        pair.generate([QUESTION], max_new_tokens=-1)
    assert vars(pair.receiver.model).keys() == before.keys()


def test_streamer_and_stopping_criteria_are_transformers_own(pair, capsys):
    class AfterTwo(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= len(pair.align(QUESTION).receiver.ids) + 2)

    streamer = TextStreamer(pair.receiver.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = pair.generate([QUESTION], streamer=streamer, stopping_criteria=[AfterTwo()], **GREEDY)
    assert ids.shape[1] == len(pair.align(QUESTION).receiver.ids) + 2
    assert capsys.readouterr().out.strip() == pair.chat(QUESTION, stopping_criteria=[AfterTwo()], **GREEDY).strip()


def test_stream_gives_the_pieces_of_chat(pair):
    assert "".join(pair.stream(QUESTION, **GREEDY)) == pair.chat(QUESTION, **GREEDY)


class Steps(StoppingCriteria):
    """Counts the steps; after a few, waits until the consumer is about to leave."""

    def __init__(self):
        self.taken, self.leaving = 0, threading.Event()

    def __call__(self, ids, scores, **kwargs):
        self.taken += 1
        if self.taken == 5:
            assert self.leaving.wait(30)
        return torch.zeros(len(ids), dtype=torch.bool)


def leave(how, pieces, steps, cancel):
    first = next(pieces)
    steps.leaving.set()
    if how == "cancel":
        cancel.set()
        return first + "".join(pieces)
    if how == "close":
        pieces.close()
    elif how == "throw":
        with pytest.raises(KeyError):
            pieces.throw(KeyError)
    return first


LONG = {"min_new_tokens": 150, "max_new_tokens": 150, "do_sample": False}


@pytest.mark.parametrize("fuse_response", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["close", "throw", "cancel", "drop"])
def test_leaving_a_stream_stops_the_generation(receiver, sharer, how, fuse_response):
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, fuse_response=fuse_response)])
    steps, cancel, before = Steps(), threading.Event(), threading.active_count()
    text = leave(how, pair.stream(QUESTION, cancel=cancel, stopping_criteria=[steps], **LONG), steps, cancel)
    assert threading.active_count() == before
    assert steps.taken < 50, "the run may go on for as long as it takes to leave"
    assert pair.chat(QUESTION, **LONG).startswith(text)


def test_an_exception_in_the_consumer_stops_the_generation(pair):
    steps, before = Steps(), threading.active_count()

    def consume():
        for _ in pair.stream(QUESTION, stopping_criteria=[steps], **LONG):
            steps.leaving.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert threading.active_count() == before
    assert steps.taken < 50


def test_a_cancelled_stream_begins_nothing(pair):
    cancel = threading.Event()
    cancel.set()
    assert not "".join(pair.stream(QUESTION, cancel=cancel, **GREEDY))


def test_stream_passes_errors_on(pair):
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(pair.stream(QUESTION, max_new_tokens=-1))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "got NoneType;"),
        (5, "got int;"),
        (b"x", "got bytes;"),
        ({"role": "user", "content": "x"}, "got dict;"),
        ((prompt for prompt in ("a", "b")), "got generator;"),
        ([], "an empty list"),
        (["a", None], "got NoneType;"),
        ([b"x"], "got bytes;"),
        ([5], "got int;"),
        ([[5]], "got int;"),
        ([QUESTION[0], "text"], "got str;"),
        ([[]], "got an empty one"),
        ("", "got an empty one"),
        ("half \ud83d of it", r"the lone surrogate '\\ud83d' at character \d+"),
        ([{"role": "user", "content": "half \udcff"}], r"the lone surrogate '\\udcff'"),
    ],
)
def test_what_is_no_prompt_is_refused(pair, prompts, message):
    for ask in (pair.generate, pair.chat):
        with pytest.raises(PromptError, match=message):
            ask(prompts, **GREEDY)


@pytest.mark.parametrize("prompt", [None, 5, b"x", [], ["text"], (word for word in "ab")])
def test_what_is_no_chat_is_not_streamed(pair, prompt):
    with pytest.raises(PromptError, match="expected"):
        list(pair.stream(prompt, **GREEDY))


@pytest.mark.parametrize("name", ["cache", "past_key_values", "inputs_embeds", "input_ids", "inputs", "attention_mask"])
@pytest.mark.parametrize("value", [1, None])
def test_inputs_in_place_of_the_prompt_are_refused(pair, name, value):
    options = {**GREEDY, name: value}
    alone = Single("receiver", pair.receiver)
    for ask in (
        pair.generate,
        pair.chat,
        lambda prompt, **options: list(pair.stream(prompt, **options)),
        lambda prompt, **options: alone.reply([prompt], **options),
    ):
        with pytest.raises(PromptError, match=f"got {name}, which the prompt and its cache decide; leave it out"):
            ask("What is it?", **options)


@pytest.mark.parametrize(
    "options", [{name: value} for name in ("max_new_tokens", "num_beams") for value in (0, -1, 1.5, "5")]
)
def test_counts_below_one_are_refused(pair, options):
    ((name, value),) = options.items()
    options = {**GREEDY, **options}
    for ask in (pair.generate, pair.chat, lambda prompt, **options: list(pair.stream(prompt, **options))):
        with pytest.raises(PromptError, match=f"expected {name} to be a whole number of at least 1, got {value!r}"):
            ask(QUESTION, **options)


def test_a_text_for_chat_is_the_one_message_of_a_user(pair):
    assert pair.chat(QUESTION[0]["content"], **GREEDY) == pair.chat(QUESTION, **GREEDY)


def test_two_sharers_add_up(receiver, sharer):
    """Every fuser reads the clean receiver cache, so the order does not matter and a closed one changes nothing."""
    other = tiny_model("qwen2", tiny_tokenizer(340), seed=3)
    fusers = tiny_fuser(receiver, sharer), tiny_fuser(receiver, other, seed=1)
    both = CacheToCache(receiver, [sharer, other], fusers)
    swapped = CacheToCache(receiver, [other, sharer], fusers[::-1])
    assert torch.equal(both.generate(PROMPTS, **GREEDY), swapped.generate(PROMPTS, **GREEDY))
    one_open = CacheToCache(receiver, [sharer, other], [fusers[0], tiny_fuser(receiver, other, gate_init=-1.0)])
    assert torch.equal(
        one_open.generate(PROMPTS, **GREEDY), CacheToCache(receiver, [sharer], fusers[:1]).generate(PROMPTS, **GREEDY)
    )


def test_in_sequence_each_fuser_reads_what_those_before_have_made(receiver, sharer):
    """Fusing one after the other by hand: the first fused cache stands where the second fuser reads the receiver."""
    fusers = [tiny_fuser(receiver, sharer, seed=seed) for seed in (0, 1)]
    pair = CacheToCache(receiver, [sharer, sharer], fusers, fusion="sequential")
    prompt = stack([pair.align(QUESTION)])
    first = read_cache(pair.select(0).prefill(stack([pair.select(0).align(QUESTION)])))
    theirs = read_cache(
        prefill(sharer.model, prompt.sharers[1].ids, prompt.sharers[1].mask, prompt.sharers[1].positions)
    )
    one = replace(prompt, sharers=prompt.sharers[1:])
    expected = fuse(receiver=first, sharers=[theirs], fusers=fusers[1:], prompt=one)
    torch.testing.assert_close(read_cache(pair.prefill(prompt)).key, expected.key)
    swapped = CacheToCache(receiver, [sharer, sharer], fusers[::-1], fusion="sequential")
    assert not torch.allclose(read_cache(swapped.prefill(prompt)).key, expected.key)
    with pytest.raises(PairError, match="fusion"):
        CacheToCache(receiver, [sharer], fusers[:1], fusion="both")


def test_a_request_may_choose_its_sharers(receiver, sharer):
    other = tiny_model("qwen2", tiny_tokenizer(340), seed=3)
    fusers = tiny_fuser(receiver, sharer), tiny_fuser(receiver, other, seed=1)
    both = CacheToCache(receiver, [sharer, other], fusers)
    alone = CacheToCache(receiver, [other], fusers[1:])
    assert torch.equal(both.select(1).generate(PROMPTS, **GREEDY), alone.generate(PROMPTS, **GREEDY))
    assert torch.equal(both.select(0, 1).generate(PROMPTS, **GREEDY), both.generate(PROMPTS, **GREEDY))
    for places in ((), (2,), (-1,)):
        with pytest.raises(PairError, match="indices of sharers from 0 to 1"):
            both.select(*places)


def test_identical_tokenizers_share_their_ids(receiver):
    twin = tiny_model("llama", seed=4)
    pair = CacheToCache(receiver, [twin], [tiny_fuser(receiver, twin)])
    aligned = pair.align(QUESTION)
    assert pair.fusers[0].config.token_alignment == "identity"
    assert aligned.sharers[0][0] is aligned.receiver
    assert aligned.sharers[0][1].tolist() == list(range(len(aligned.receiver.ids)))


def test_gradients_reach_every_fuser_parameter_and_no_other(pair):
    fuser = pair.fusers[0].train()
    model, prompt = pair.receiver.model, stack([pair.align(prompt) for prompt in PROMPTS])
    mask = torch.cat([prompt.mask, torch.ones(len(PROMPTS), 1, dtype=torch.long)], 1)
    tail = prompt.ids[:, -1:].repeat(1, 2)
    output = model(
        tail, attention_mask=mask, position_ids=count_positions(mask)[:, -2:], **{CACHE: pair.prefill(prompt)}
    )
    output.logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in fuser.parameters())
    assert all(parameter.grad is None for one in (pair.receiver, *pair.sharers) for parameter in one.model.parameters())


def test_a_prompt_longer_than_a_context_is_refused(pair):
    with pytest.raises(PromptError, match="at most 256 tokens"):
        pair.generate("word " * 400)


OTHERS = {"shape": {"num_key_value_heads": 1}, "weights": {"seed": 9}, "tokenizer": {"tokenizer": tiny_tokenizer(330)}}


@pytest.mark.parametrize("changed", OTHERS)
@pytest.mark.parametrize("whose", ["receiver", "sharer"])
def test_a_fuser_of_another_pair_is_refused(receiver, whose, changed):
    twin = tiny_model("llama", seed=4)
    fuser = tiny_fuser(receiver, twin)
    family = {"receiver": "qwen3", "sharer": "llama"}[whose]
    other = tiny_model(family, **{"seed": {"receiver": 0, "sharer": 4}[whose], **OTHERS[changed]})
    models = {"receiver": receiver, "sharer": twin, whose: other}
    with pytest.raises(PairError, match=f"{whose} with 3 layers" if changed == "shape" else changed):
        CacheToCache(models["receiver"], [models["sharer"]], [fuser])


def test_weights_loaded_in_another_dtype_are_the_same_model(receiver, sharer, saved_models):
    fuser = tiny_fuser(receiver, sharer)
    coarse = LanguageModel.from_pretrained(saved_models / "receiver", dtype=torch.bfloat16)
    pair = CacheToCache(coarse, [LanguageModel.from_pretrained(saved_models / "sharer")], [fuser])
    full = CacheToCache(receiver, [sharer], [fuser])
    got, expected = (read_cache(one.prefill(stack([one.align(QUESTION)]))) for one in (pair, full))
    assert got.key.dtype == torch.bfloat16
    assert_kv_close(got.to("cpu", torch.float32), expected, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("theirs", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mine", ["float32", "bfloat16", "float16"])
def test_models_of_unlike_precision_talk(pair, saved_models, tmp_path, mine, theirs):
    save_fuser(pair.fusers[0], tmp_path / "fuser")
    names = {"receiver": saved_models / "receiver", "sharer": saved_models / "sharer", "fuser": tmp_path / "fuser"}
    mixed = CacheToCache.from_pretrained(**names, dtype=mine, device_map="auto", sharer_options={"dtype": theirs})
    assert [str(model.model.dtype) for model in (mixed.receiver, *mixed.sharers)] == [
        f"torch.{mine}",
        f"torch.{theirs}",
    ]
    prompt = stack([mixed.align(QUESTION)])
    fused, expected = read_cache(mixed.prefill(prompt)), read_cache(pair.prefill(prompt))
    assert str(fused.key.dtype) == f"torch.{mine}"
    assert_kv_close(fused.to("cpu", torch.float32), expected, rtol=0.1, atol=0.15)
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    got, expected = (one.answer(prompt, **options).logits[0].float() for one in (mixed, pair))
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("family", UNFIT)
def test_a_receiver_that_loses_its_state_is_refused(sharer, monkeypatch, family):
    """Several tokens at once on a filled cache: its scores and losses would not be those of generating."""
    monkeypatch.setitem(FAMILIES, family, UNFIT[family])
    receiver = tiny_model(family)
    with pytest.raises(
        PairError, match=f"expected a receiver that reads several tokens .* got {type(receiver.model).__name__}"
    ):
        CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])


@pytest.mark.parametrize("fuse_response", [False, True])
def test_a_sharer_that_loses_its_state_reads_prompts_alone(receiver, monkeypatch, fuse_response):
    monkeypatch.setitem(FAMILIES, "jamba", UNFIT["jamba"])
    sharer = tiny_model("jamba")
    fuser = tiny_fuser(receiver, sharer, fuse_response=fuse_response)
    if fuse_response:
        with pytest.raises(PairError, match="expected a sharer for fusers of responses that reads several tokens"):
            CacheToCache(receiver, [sharer], [fuser])
    else:
        assert CacheToCache(receiver, [sharer], [fuser]).chat(QUESTION, max_new_tokens=2) is not None


def test_one_fuser_per_sharer(receiver, sharer):
    with pytest.raises(PairError, match="one fuser per sharer"):
        CacheToCache(receiver, [sharer, sharer], [tiny_fuser(receiver, sharer)])


def test_chat_answers_one_prompt_or_many(pair):
    questions = ["What is Oslo?", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]]
    chats = [questions[0], [*questions[1], {"role": "user", "content": "Which language?"}]]
    assert pair.chat(chats, **GREEDY) == [pair.chat(chat, **GREEDY) for chat in chats]
    assert pair.chat(chats[:1], **GREEDY) == [pair.chat(chats[0], **GREEDY)]


def test_prefill_takes_what_align_gives(pair):
    rows = [pair.align(prompt) for prompt in ("What is Oslo?", "Two models read the same question")]
    for prompt in (rows[0], rows, stack(rows)):
        batch = prompt if isinstance(prompt, AlignedPrompt) else stack(rows[:1] if prompt is rows[0] else prompt)
        with torch.no_grad():
            assert_kv_equal(read_cache(pair.prefill(prompt)), read_cache(pair.prefill(batch)))
            assert torch.equal(
                pair.decode(prompt, pair.prefill(prompt), **GREEDY), pair.decode(batch, pair.prefill(batch), **GREEDY)
            )


def test_a_pair_moves_and_casts_as_a_module_does(receiver, sharer):
    pair = CacheToCache(copy.deepcopy(receiver), [copy.deepcopy(sharer)], [tiny_fuser(receiver, sharer)])
    assert (pair.device, pair.dtype) == (torch.device("cpu"), torch.float32)
    answer = pair.chat("What is Oslo?", **GREEDY)
    assert pair.to(torch.float64) is pair
    assert pair.dtype == torch.float64
    models = (pair.receiver.model, pair.sharers[0].model, pair.fusers[0])
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.float64}
    assert pair.chat("What is Oslo?", **GREEDY) == answer


def test_swapped_arguments_do_not_run(pair):
    fuser = pair.fusers[0]
    caches = pair.read(stack([pair.align("What is Oslo?")]))
    kv = read_cache(caches.receiver), read_cache(caches.sharers[0])
    with pytest.raises(TypeError, match="positional"):
        fuser(*kv)
    with pytest.raises(TypeError, match="positional"):
        fuse(*kv, [fuser])


@pytest.mark.parametrize(("old", "new"), [("fold", "fold_norms"), ("capture", "use_cuda_graphs")])
def test_old_names_work_and_name_the_new(pair, old, new):
    with pytest.warns(DeprecationWarning, match=new):
        assert getattr(pair, old)() is pair
