import pytest
import torch
from helpers import assert_kv_equal

from kvfuse.cache.transformers_cache import CACHE, read_cache
from kvfuse.errors import PairError
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.stages.prefill import prefill
from kvfuse.stages.rope import measure_rope
from kvfuse.testing import FAMILIES, tiny_fuser, tiny_model

IDS = torch.arange(5, 45).view(2, 20)
SCALED = {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
}
# RoPE by other rules than in the families of the matrix: interleaved, split before the call, only in windowed layers,
# scaled
OTHERS = {
    "phi": {},
    "stablelm": {},
    "glm": {"head_dim": 8},
    "cohere": {},
    "cohere2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": SCALED,
}
QUESTION = [{"role": "user", "content": "What is the capital of Norway?"}]


def turned_back(model, rope, positions):
    kv = read_cache(prefill(model, IDS, torch.ones_like(IDS), positions))
    rows, columns = (index.flatten() for index in torch.meshgrid(torch.arange(2), torch.arange(20), indexing="ij"))
    turn = rope.at(positions, rows, columns, kv.key.dtype)
    picked = kv.tokens(rows, columns)
    back = turn.remove(picked)
    torch.testing.assert_close(turn.apply(back).key, picked.key, rtol=1e-4, atol=1e-4)
    assert torch.equal(back.value, picked.value)
    return picked, back


def assert_positions_are_gone(model):
    rope = measure_rope(model)
    positions = torch.arange(20).expand(2, -1)
    here, back = turned_back(model, rope, positions)
    there, moved = turned_back(model, rope, positions + torch.tensor([[17], [3]]))
    torch.testing.assert_close(back.key, moved.key, rtol=1e-3, atol=1e-3)
    assert (here.key - there.key).abs().max() > 0.1, "or there was nothing to remove"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gpt2", "mpt")])
def test_keys_turned_back_are_the_same_at_any_position(family):
    assert_positions_are_gone(tiny_model(family).model)


@pytest.mark.parametrize("family", OTHERS)
def test_keys_are_rotated_back_for_other_kinds_of_rope(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, OTHERS[family])
    assert_positions_are_gone(tiny_model(family).model)


def test_layers_without_rope_are_left_alone():
    assert measure_rope(tiny_model("smollm3").model).layers == {"": [0, 2]}
    assert measure_rope(tiny_model("gemma3_text").model).layers == {"full_attention": [1], "sliding_attention": [0, 2]}


def test_a_half_precision_model_is_measured_too():
    model = tiny_model("qwen3").model.to(torch.bfloat16)
    assert measure_rope(model).layers == {"": [0, 1, 2]}


def test_a_model_without_rope_is_refused_when_the_pair_is_built(sharer):
    receiver = tiny_model("gpt2")
    with pytest.raises(PairError, match=r"rope=removed needs, got GPT2LMHeadModel; use fuser\.rope=kept"):
        CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, rope="removed")])
    CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])


def test_keys_that_the_embedding_does_not_explain_are_refused(monkeypatch):
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    monkeypatch.setitem(FAMILIES, "deepseek_v3", {**sizes, **experts, "num_key_value_heads": 4})
    with pytest.raises(PairError, match="got DeepseekV3ForCausalLM"):
        measure_rope(tiny_model("deepseek_v3").model)


@pytest.fixture
def removed(receiver, sharer):
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, rope="removed")])


def test_closed_gates_leave_the_cache_as_it_is_bit_for_bit(receiver, sharer):
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, rope="removed", gate_init=-1.0)])
    prompt = stack([pair.align(QUESTION), pair.align("hi")])
    fused, alone = (read_cache(pair.prefill(prompt, fusers=fusers)) for fusers in (None, []))
    assert_kv_equal(fused, alone)


def test_the_fuser_sees_and_changes_keys_at_position_zero(removed):
    """A prompt read further on gives the same fuser the same keys, and the same answer."""
    seen = []
    fuser = removed.fusers[0]
    fuser.register_forward_pre_hook(lambda _, args, kvs: seen.append(kvs), with_kwargs=True)
    prompt = stack([removed.align(QUESTION)])
    later = stack([removed.align(QUESTION)])
    later.positions.add_(7)
    later.sharers[0].positions.add_(11)
    logits = []
    for one in (prompt, later):
        cache = removed.prefill(one)
        logits.append(
            removed.receiver.model(one.ids[:, -1:], position_ids=one.positions[:, -1:], **{CACHE: cache}).logits
        )
    before, after = seen
    assert before.keys() == after.keys() == {"receiver", "sharer"}
    for name in before:
        torch.testing.assert_close(before[name].key, after[name].key, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
