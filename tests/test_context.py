import pytest
from transformers import AutoConfig

from kvfuse.errors import PromptError
from kvfuse.methods import Single
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.stages.context import context_length, rope_switch
from kvfuse.testing import LLAMA_3_ROPE, tiny_fuser, tiny_model
from kvfuse.training.data.encoding import Encoder, TooLongError
from kvfuse.training.data.examples import Example

SWITCH = 64
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
LONGROPE = {
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": SWITCH,
        **FACTORS,
    },
}
SENTENCE = "What is the capital of Norway? "


def scaled(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


@pytest.fixture(scope="module")
def pair(sharer):
    receiver = tiny_model("phi3", **LONGROPE)
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])


@pytest.mark.parametrize(
    ("limit", "rope", "context"),
    [
        (40, {}, 40),
        (40, scaled("yarn", factor=4.0, original_max_position_embeddings=40), 160),  # as Qwen writes it
        (160, scaled("yarn", factor=4.0, original_max_position_embeddings=40), 160),  # as DeepSeek writes it
        (40, scaled("yarn", factor=4.0), 160),
        (40, scaled("linear", factor=2.0), 80),
        (40, scaled("dynamic", factor=2.0), 80),
        (64, LLAMA_3_ROPE, 64),
    ],
)
def test_the_context_is_what_the_rotary_embedding_reaches(limit, rope, context):
    assert context_length(tiny_model("qwen2", max_position_embeddings=limit, **rope).model.config) == context


def test_one_embedding_for_each_type_of_layer_leaves_the_context_as_it_is():
    config = tiny_model("gemma3_text").model.config
    config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": 8.0}  # as Gemma 3 ships it
    assert context_length(config) == config.max_position_embeddings


def test_families_with_other_names_have_a_context():
    assert context_length(AutoConfig.for_model("mpt", max_seq_len=48)) == 48


def test_yarn_reads_prompts_beyond_the_original_length(sharer):
    receiver = tiny_model("qwen2", max_position_embeddings=40, **scaled("yarn", factor=4.0))
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
    prompt = pair.align(SENTENCE * 5)
    assert 40 < len(prompt.receiver.ids) < 160
    assert pair.prefill(prompt).get_seq_length() == len(prompt.receiver.ids) - 1


def test_a_context_that_is_set_counts(sharer):
    receiver = tiny_model("qwen2", max_position_embeddings=40)
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
    with pytest.raises(PromptError, match="at most 40 tokens"):
        pair.align(SENTENCE * 5)
    receiver.context = 100
    assert len(pair.align(SENTENCE * 5).receiver.ids) > 40


@pytest.mark.parametrize("sentences", [3, 9])
def test_longrope_answers_on_either_side_of_its_length(pair, sentences):
    row = pair.align(SENTENCE * sentences)
    tokens = len(row.receiver.ids)
    room = SWITCH + 1 - tokens if tokens < SWITCH else 8
    answered = pair.answer(stack([row]), max_new_tokens=room, eos_token_id=None)
    assert answered.shape[1] == tokens + room


def test_longrope_refuses_to_go_across_its_length(pair):
    row = pair.align(SENTENCE * 3)
    room = SWITCH + 1 - len(row.receiver.ids)
    with pytest.raises(PromptError, match=f"at most {SWITCH + 1} tokens together"):
        pair.answer(stack([row]), max_new_tokens=room + 1)
    with pytest.raises(PromptError, match=f"at most {SWITCH + 1} tokens together"):
        pair.chat(SENTENCE * 3, max_new_tokens=200)


def test_longrope_scores_only_what_it_reads_as_it_writes(pair):
    method = Single("receiver", pair.receiver)
    assert method.score([SENTENCE * 3], [["Oslo"]])[0][0].tokens > 0
    with pytest.raises(PromptError, match=f"at most {SWITCH + 1} tokens together"):
        method.score([SENTENCE * 3], [["Oslo " * 30]])


def test_only_longrope_has_such_a_length(receiver):
    assert rope_switch(receiver.model.config) is None
    assert rope_switch(tiny_model("phi3", **LONGROPE).model.config) == SWITCH


def test_longrope_learns_no_response_across_its_length(pair):
    encoder = Encoder.of(pair)
    question = [{"role": "user", "content": SENTENCE}]
    assert len(encoder.encode(Example(question, "Oslo")).response.ids) > 0
    with pytest.raises(TooLongError, match=f"fit {SWITCH} tokens of .* rotates its keys otherwise"):
        encoder.encode(Example(question, "Oslo " * 30))
