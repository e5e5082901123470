"""One notion of the end of a response: learnt, scored and stopped at."""

from types import SimpleNamespace

import pytest
import torch
from templates import TEMPLATES, chat, real_tokenizer, tokenizer_like, tokenizer_with
from transformers import LogitsProcessorList

from kvfuse.methods import Fused, Single
from kvfuse.model import CacheToCache
from kvfuse.prompts.ends import end_id, end_ids
from kvfuse.testing import TEMPLATES as TINY
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example

TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
UNASKED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
REFUSED = "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}{{ messages[0].content }}"


def gemma_like(template=TURNS, eos="<eos>"):
    """A tokenizer whose template ends a turn with another token than its end-of-sequence token."""
    tokenizer = tokenizer_with(template)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>", "<eos>", "<another>"], special_tokens=True)
    tokenizer.eos_token = eos
    return tokenizer


def id_of(token, tokenizer):
    return tokenizer.convert_tokens_to_ids(token)


def test_a_chat_ends_as_the_template_ends_a_turn_and_plain_text_as_a_text():
    tokenizer = gemma_like()
    ids = [id_of(token, tokenizer) for token in ("<end_of_turn>", "<eos>", "<another>")]
    assert end_id(tokenizer) == ids[0]
    assert end_id(tokenizer, templated=False) == ids[1]
    assert end_ids(tokenizer) == ids[:2]
    listed = [SimpleNamespace(eos_token_id=ids[1:]), None, SimpleNamespace(eos_token_id=ids[2])]
    assert end_ids(tokenizer, *listed) == ids


@pytest.mark.parametrize(
    "template", [*(template for template, _ in TEMPLATES.values()), *TINY.values(), UNASKED, REFUSED, None]
)
def test_a_template_without_an_end_of_its_own_ends_with_the_end_of_sequence(template):
    tokenizer = tokenizer_with(template)
    assert end_ids(tokenizer) == [end_id(tokenizer)] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("model", ["gpt2", "llama-3.2", "mistral-v3", "phi-4", "qwen2.5", "qwen3"])
def test_real_chat_models_end_with_their_end_of_sequence(model, shared):
    tokenizer = real_tokenizer(shared, model)
    assert end_ids(tokenizer) == [end_id(tokenizer)] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("model", ["qwen2.5", "qwen3", "llama-3.2", "phi-4"])
def test_a_base_model_with_a_chat_template_ends_as_the_template_says(model, shared):
    turn_end = real_tokenizer(shared, model).eos_token_id
    tokenizer = type(real_tokenizer(shared, model)).from_pretrained(shared / "tokenizers" / model)
    tokenizer.eos_token = "<|end_of_text|>" if model == "llama-3.2" else "<|endoftext|>"
    assert end_ids(tokenizer) == [turn_end, tokenizer.eos_token_id]


def test_another_template_has_another_end():
    tokenizer = gemma_like()
    tokenizer.chat_template = TURNS.replace("<end_of_turn>", "<another>")
    assert end_id(tokenizer) == id_of("<another>", tokenizer)
    tokenizer.chat_template = None
    assert end_id(tokenizer) == tokenizer.eos_token_id


def pair_with(tokenizer):
    receiver, sharer = tiny_model(tokenizer=tokenizer), tiny_model("llama", tiny_tokenizer(300, "lines"), seed=4)
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, fuse_response=True)])


@pytest.mark.parametrize(
    ("prompt", "end"), [(chat("What is it?"), "<end_of_turn>"), ("What is it?", "<eos>")], ids=["chat", "text"]
)
def test_the_end_is_learnt_where_the_response_ends(prompt, end):
    encoder = Encoder.of(pair_with(gemma_like()))
    whole, part = (encoder.encode(Example(prompt, "Oslo.", ends=ends)).response for ends in (True, False))
    assert whole.ids.tolist() == [*part.ids.tolist(), id_of(end, encoder.receiver.tokenizer)]
    assert whole.sharers[0][0].tolist() == part.sharers[0][0].tolist(), "the sharer reads the text"


@pytest.mark.parametrize("template", ["tagged", None])
def test_without_an_end_none_is_learnt_and_answers_end_by_length(template):
    tokenizer = tiny_tokenizer(template=template and "lines")
    tokenizer.eos_token = tokenizer.pad_token = None
    pair = pair_with(tokenizer)
    pair.receiver.model.generation_config.eos_token_id = pair.receiver.model.generation_config.pad_token_id = None
    encoder = Encoder.of(pair)
    assert len({len(encoder.encode(Example("Q: ", "Oslo.", ends=ends)).response.ids) for ends in (True, False)}) == 1
    assert end_ids(tokenizer, pair.receiver.model.generation_config) == []
    for method in (Fused(pair), Single("receiver", pair.receiver)):
        replies = method.reply([chat("hi"), chat("and what is it?")], max_new_tokens=3, do_sample=False)
        assert [reply.tokens for reply in replies] == [3, 3]


def says(*ids):
    """Lets a model say these ids, whatever it would say."""
    said = iter(ids)

    def force(input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(said)] = 0
        return forced

    return LogitsProcessorList([force])


@pytest.mark.parametrize("end", ["<end_of_turn>", "<eos>", "<another>"])
@pytest.mark.parametrize("given", [True, False])
def test_each_of_them_stops_an_answer(end, given):
    tokenizer = gemma_like()
    pair = pair_with(tokenizer)
    listed = [tokenizer.pad_token_id, id_of("<another>", tokenizer)]
    pair.receiver.model.generation_config.eos_token_id = listed
    options = {"max_new_tokens": 6, "do_sample": False}
    config = {"generation_config": type(pair.receiver.model.generation_config)(**options)}
    for method in (Fused(pair), Single("receiver", pair.receiver)):
        said = says(*tokenizer("Oslo", add_special_tokens=False).input_ids[:2], id_of(end, tokenizer), *range(40, 50))
        (reply,) = method.reply([chat("What is it?")], logits_processor=said, **(config if given else options))
        assert reply.tokens == 3
        assert reply.text in ("O", "Os", "Osl", "Oslo")


def test_a_user_may_name_another_end():
    pair = pair_with(gemma_like())
    turn_end, other = (id_of(token, pair.receiver.tokenizer) for token in ("<end_of_turn>", "<another>"))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": other}
    ids = pair.generate([chat("hi")], logits_processor=says(turn_end, 40, other, 41, 42, 43), **options)
    assert ids[0, -3:].tolist() == [turn_end, 40, other]


def test_like_tokenizers_share_nothing():
    assert end_id(tokenizer_like("verbatim")) == end_id(tokenizer_like("channels")) != end_id(gemma_like())
