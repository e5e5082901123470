"""What a model's own generation_config says, what a user asks, and what a filled cache decides."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from kvfuse.cache.transformers_cache import CACHE
from kvfuse.errors import PromptError
from kvfuse.model import CacheToCache
from kvfuse.stages.decode import decode
from kvfuse.stages.generate_options import DECIDED_BY_CACHE, effective, requested, total_length
from kvfuse.testing import tiny_fuser, tiny_model

PROMPT = "What is the capital of Norway?"
CONTRARY = {
    "use_cache": False,
    "cache_config": {"nbits": 4},
    "prefill_chunk_size": 4,
    "token_healing": True,
    "use_mtp": True,
    "is_assistant": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "constraints": [[1]],
    "force_words_ids": [[1]],
    "num_beam_groups": 2,
    "low_memory": True,
}


def answer(receiver, sharer, **options):
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
    return pair.generate(PROMPT, max_new_tokens=8, **options)


@pytest.fixture
def own():
    """A receiver of the test's own, whose configuration it may change."""
    return tiny_model("qwen3")


def test_every_field_that_the_cache_decides_is_tested():
    assert CONTRARY.keys() == DECIDED_BY_CACHE.keys() <= vars(GenerationConfig()).keys()


@pytest.mark.parametrize("name", CONTRARY)
def test_a_models_own_contrary_field_changes_nothing(receiver, sharer, own, name):
    setattr(own.model.generation_config, name, CONTRARY[name])
    assert torch.equal(answer(own, sharer), answer(receiver, sharer))


@pytest.mark.parametrize("name", CONTRARY)
def test_a_users_contrary_field_is_refused(receiver, sharer, name):
    with pytest.raises(PromptError, match=f"expected no {name}, "):
        answer(receiver, sharer, **{name: CONTRARY[name]})


def test_a_model_that_says_it_uses_no_cache_uses_the_one_it_is_given(own, pair):
    """Trainers leave ``use_cache: false`` behind."""
    prompt = pair.align(PROMPT)
    expected = pair.decode(prompt, pair.prefill(prompt), max_new_tokens=8)
    own.model.config.use_cache = own.model.generation_config.use_cache = False
    other = CacheToCache(own, pair.sharers, pair.fusers)
    fed = []
    hook = own.model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(other.decode(prompt, other.prefill(prompt), max_new_tokens=8), expected)
    hook.remove()
    assert set(fed) == {1}  # no token is fed twice


@pytest.mark.parametrize(
    ("own_value", "options", "copies"),
    [
        (3, {}, 3),
        (3, {"num_beams": 2}, 2),
        (3, {"generation_config": GenerationConfig(max_new_tokens=8)}, 3),
        (3, {"generation_config": GenerationConfig(num_beams=2)}, 2),
    ],
)
def test_a_users_value_comes_before_the_models_own(own, own_value, options, copies):
    own.model.generation_config.num_beams = own_value
    assert effective(own.model, options)["num_beams"] == copies


def test_the_models_own_beams_are_honoured(sharer, own):
    expected = answer(own, sharer, num_beams=3)
    own.model.generation_config.num_beams = 3
    assert torch.equal(answer(own, sharer), expected)


def test_a_copy_of_the_models_own_configuration_is_no_request(own):
    own.model.generation_config.use_cache = False
    copied = copy.deepcopy(own.model.generation_config)
    assert "use_cache" not in requested(own.model, {"generation_config": copied})


def test_ids_come_back_unless_an_object_is_asked_for(sharer, own):
    own.model.generation_config.return_dict_in_generate = True
    assert isinstance(answer(own, sharer), torch.Tensor)
    assert answer(own, sharer, return_dict_in_generate=True).sequences.shape[0] == 1


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize(
    ("options", "total"), [({"max_new_tokens": 7}, 17), ({"max_length": 12}, 12), ({}, 30)], ids=str
)
def test_the_longest_answer_is_that_of_transformers(receiver, options, total):
    ids = torch.full((1, 10), 7)
    output = receiver.model.generate(ids, eos_token_id=None, pad_token_id=0, **options)
    assert output.shape[1] == total == total_length(10, effective(receiver.model, options))


def test_a_model_that_leaves_its_cache_is_refused(own, pair, monkeypatch):
    """Whatever the family's reason is."""
    prompt = pair.align(PROMPT)
    prepare = own.model.prepare_inputs_for_generation

    def forget(input_ids, **kwargs):
        if input_ids.shape[1] == len(prompt.receiver.ids) + 4:
            kwargs |= {CACHE: None, "next_sequence_length": None}
        return prepare(input_ids, **kwargs)

    monkeypatch.setattr(own.model, "prepare_inputs_for_generation", forget)
    length = len(prompt.receiver.ids)
    with pytest.raises(PromptError, match=f"left it after {length + 3} of {length + 8} tokens"):
        decode(
            own.model,
            torch.tensor([prompt.receiver.ids.tolist()]),
            torch.ones(1, length, dtype=torch.long),
            pair.prefill(prompt),
            max_new_tokens=8,
            eos_token_id=None,
            pad_token_id=0,
        )


def test_gemma_answers_with_the_configuration_that_it_is_shipped_with(sharer):
    """A hybrid cache, sampling, and two tokens that end an answer."""
    plain, shipped = tiny_model("gemma3_text"), tiny_model("gemma3_text")
    config = shipped.model.generation_config
    config.cache_implementation, config.do_sample, config.top_k, config.top_p = "hybrid", True, 64, 0.95
    config.eos_token_id = [1, 106]
    expected = answer(plain, sharer, do_sample=False, eos_token_id=[1, 106])
    assert torch.equal(answer(shipped, sharer, do_sample=False), expected)
    torch.manual_seed(0)
    sampled = answer(shipped, sharer)
    torch.manual_seed(0)
    wanted = answer(plain, sharer, do_sample=True, top_k=64, top_p=0.95, eos_token_id=[1, 106])
    assert torch.equal(sampled, wanted)
