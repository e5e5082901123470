import pytest
import torch
from helpers import families

from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import has_state
from kvfuse.errors import PairError
from kvfuse.fusers.execution import by_group
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser, tiny_model
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.loop.batches import collate
from kvfuse.training.loop.loss import response_loss
from kvfuse.training.memory.recompute import recomputed_layers, require_recomputable

EXAMPLES = [
    Example([{"role": "user", "content": f"What is {i}?"}], f"It is number {i} of them"[: 10 + i]) for i in range(4)
]


def loss_and_gradients(pair, recompute):
    fuser = pair.fusers[0].train()
    fuser.recompute = recompute
    fuser.zero_grad()
    torch.manual_seed(0)  # of dropout and gates
    loss = response_loss(pair, collate(list(map(Encoder.of(pair).encode, EXAMPLES))), recompute=recompute)
    loss.backward()
    fuser.eval()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in fuser.named_parameters()}


@pytest.mark.parametrize("fuse_response", [False, True])
@pytest.mark.parametrize("family", families())
def test_loss_and_gradients_are_equal(family, fuse_response, sharer):
    receiver = tiny_model(family)
    if has_state(receiver.model.config):
        with pytest.raises(PairError, match="without linear attention"):
            require_recomputable(receiver.model)
        return
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, fuse_response=fuse_response)])
    (kept, expected), (again, got) = (loss_and_gradients(pair, recompute) for recompute in (False, True))
    torch.testing.assert_close(again, kept)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().sum() > 0, name


def test_the_model_is_left_as_it_was(receiver):
    before = [(module.training, {**vars(module)}.get("gradient_checkpointing")) for module in receiver.model.modules()]
    with recomputed_layers(receiver.model):
        assert any(module.training for module in receiver.model.modules())
    after = [
        (module.training, {**vars(module)}.get("gradient_checkpointing") or None) for module in receiver.model.modules()
    ]
    assert [training for training, _ in after] == [training for training, _ in before]
    assert not any(flag for _, flag in after)


@pytest.mark.parametrize(("recompute", "times"), [(False, 1), (True, 2)])
def test_every_layer_is_computed_again(pair, recompute, times):
    seen = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda *args: seen.append(1))
        for layer in pair.receiver.model.base_model.layers
    ]
    loss = response_loss(pair, collate(list(map(Encoder.of(pair).encode, EXAMPLES))), recompute=recompute)
    read = len(seen)
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert len(seen) - read == (times - 1) * len(hooks)


@pytest.mark.parametrize(
    "options", [{}, {"gate_noise": "gumbel"}, {"gate": "head"}, {"parts": "values"}, {"kind": "c2c-complex"}]
)
def test_gates_are_drawn_once_for_all_pieces(receiver, sharer, options, monkeypatch):
    """Token by token, the gates' draw is that of the whole; without dropout, whose draws are of each piece."""
    monkeypatch.setattr(by_group, "TOKENS_PER_PIECE", 1)
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, dropout=0.0, **options)])
    (kept, expected), (again, got) = (loss_and_gradients(pair, recompute) for recompute in (False, True))
    torch.testing.assert_close(again, kept)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_fusers_memory_does_not_grow_with_the_prompt(receiver, sharer, monkeypatch):
    """A further token keeps its keys and values, and what is made of them, for the backward pass; nothing else."""
    monkeypatch.setattr(by_group, "TOKENS_PER_PIECE", 4)
    fuser = tiny_fuser(receiver, sharer, hidden_dim=256, intermediate_dim=256).train()

    def kept(tokens, recompute):
        fuser.recompute, sizes = recompute, []
        receiver_kv, sharer_kv = (
            KV(*torch.randn(2, s.num_layers, 1, s.num_kv_heads, tokens, s.key_dim))
            for s in (receiver.kv_spec, sharer.kv_spec)
        )
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            fuser(receiver=receiver_kv, sharer=sharer_kv)
        return sum(sizes), receiver_kv.key.numel() * 2 // tokens

    (few, per_token), (many, _) = kept(8, True), kept(40, True)
    assert (many - few) / 32 <= 2 * per_token
    assert kept(40, False)[0] > 10 * many
