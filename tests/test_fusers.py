"""One matrix over all fusers: a new kind is tested by being registered."""

import pytest
import torch
from helpers import assert_gradients_reach_everything, assert_kv_close, inputs_of, random_kv

from kvfuse.cache.kv import KV
from kvfuse.checkpoint import load_fuser
from kvfuse.errors import PairError
from kvfuse.fusers import FUSERS, make_fuser, register_fuser
from kvfuse.fusers.base import describe_gates
from kvfuse.fusers.gate import Gate
from kvfuse.fusers.layer_alignment import align_layers
from kvfuse.fusers.layers import GroupedFFN, GroupedLayerNorm, GroupedLinear, GroupedRMSNorm, GroupedSwiGLU
from kvfuse.testing import tiny_fuser

KINDS = list(FUSERS)


@pytest.fixture(params=KINDS)
def fuser(request, receiver, sharer):
    return tiny_fuser(receiver, sharer, request.param)


@pytest.fixture
def inputs(fuser):
    return inputs_of(fuser)


def test_residual_has_the_receivers_shape(fuser, inputs):
    assert fuser(receiver=inputs[0], sharer=inputs[1]).spec == fuser.config.receiver_kv
    assert fuser(receiver=inputs[0], sharer=inputs[1]).key.shape == inputs[0].key.shape


def test_residual_of_a_token_depends_on_that_token_alone(fuser, inputs):
    rows, places = torch.tensor([1, 0]), torch.tensor([3, 2])
    receiver_kv, sharer_kv = (kv.tokens(rows, places) for kv in inputs)
    alone = fuser(receiver=receiver_kv, sharer=sharer_kv)
    together = fuser(receiver=inputs[0], sharer=inputs[1]).tokens(rows, places)
    assert_kv_close(alone, together, atol=1e-6)


def test_it_reads_both_caches(fuser, inputs):
    base = fuser(receiver=inputs[0], sharer=inputs[1])
    assert not torch.equal(fuser(receiver=inputs[0].zeros_like(), sharer=inputs[1]).key, base.key)
    assert not torch.equal(fuser(receiver=inputs[0], sharer=inputs[1].zeros_like()).value, base.value)


def test_gradients_reach_every_parameter(fuser, inputs):
    assert_gradients_reach_everything(fuser, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_give_exactly_zero(receiver, sharer, kind):
    closed = tiny_fuser(receiver, sharer, kind, gate_init=-1.0)
    inputs = random_kv(closed.config.receiver_kv), random_kv(closed.config.sharer_kv)
    residual = closed(receiver=inputs[0], sharer=inputs[1])
    assert not residual.key.any()
    assert not residual.value.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_start_gives_exactly_zero(receiver, sharer, kind):
    zero = tiny_fuser(receiver, sharer, kind, zero_init=True)
    residual = zero(receiver=random_kv(zero.config.receiver_kv), sharer=random_kv(zero.config.sharer_kv))
    assert not residual.key.any()
    assert not residual.value.any()


def test_c2c_equals_the_paper_layer_by_layer(receiver, sharer):
    """The paper's section 3.3.2, written out for one layer's keys and another's values."""
    fuser = tiny_fuser(receiver, sharer, "c2c", num_layers=4)
    mine, theirs = random_kv(fuser.config.receiver_kv), random_kv(fuser.config.sharer_kv)
    layers, total = fuser.config.receiver_kv.num_layers, align_layers(3, 4)
    residual = fuser(receiver=mine, sharer=theirs)

    def linear(block, group, x):
        return x @ block.weight[group] + (0 if block.bias is None else block.bias[group])

    def ffn(block, group, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * block.norm.weight[group]
        return x + linear(block.w2, group, torch.nn.functional.gelu(linear(block.w1, group, normed)))

    for layer in range(layers):
        for part, group in (("key", layer), ("value", layers + layer)):
            receiver_part, sharer_part = getattr(mine, part)[layer], getattr(theirs, part)[total[layer]]
            flat = [x.transpose(1, 2).flatten(2) for x in (sharer_part, receiver_part)]
            hidden = ffn(fuser.fusion, group, linear(fuser.fusion_in, group, torch.cat(flat, -1)))
            weight = torch.sigmoid(linear(fuser.weighting_out, group, ffn(fuser.weighting, group, hidden)))
            for block in fuser.projection:
                hidden = ffn(block, group, hidden)
            projected = linear(fuser.projection_out, group, hidden).unflatten(-1, (2, -1))
            expected = (projected * weight.unsqueeze(-1)).transpose(1, 2)
            torch.testing.assert_close(getattr(residual, part)[layer], expected, rtol=1e-5, atol=1e-6)


def parameters_at(cls, receiver, sharer):
    """How many a fuser has for models of these layers, KV heads and head sizes."""
    specs = {
        whose: {"kv": {"num_layers": layers, "num_kv_heads": heads, "key_dim": dim, "value_dim": dim}}
        for whose, (layers, heads, dim) in (("receiver", receiver), ("sharer", sharer))
    }
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in cls(cls.config_class(**specs)).parameters())


@pytest.mark.parametrize(
    ("receiver", "sharer", "per_layer"),
    [
        ((28, 8, 128), (24, 2, 64), 17_066_002),
        ((28, 8, 128), (16, 8, 64), 17_852_434),
        ((36, 8, 128), (28, 4, 128), 17_852_434),
    ],
)
def test_c2c_has_as_many_parameters_as_the_published_fusers(receiver, sharer, per_layer):
    assert parameters_at(FUSERS["c2c"], receiver, sharer) == receiver[0] * per_layer


def test_low_rank_takes_ten_megabytes_where_the_papers_takes_956():
    assert 2 * parameters_at(FUSERS["low-rank"], (28, 8, 128), (24, 2, 64)) == pytest.approx(10e6, rel=0.05)


def test_gate_is_binary_at_inference_and_sharpens_while_training():
    gate = Gate(2, 1.0, 0.001)
    gate.logit.data[:] = torch.tensor([0.5, -0.5]).view(2, 1, 1)
    assert gate.eval()().flatten().tolist() == [1.0, 0.0]
    gate.train()
    torch.manual_seed(0)
    draws = torch.cat([gate().detach() for _ in range(4000)], dim=2)
    assert ((draws > 0) & (draws < 1)).all()
    opened = (draws > 0.5).float().mean(dim=(1, 2))  # P(logit + logistic noise > 0) = sigmoid(logit)
    torch.testing.assert_close(opened, torch.sigmoid(gate.logit.flatten()), atol=0.03, rtol=0)
    gate.anneal(1.0)
    assert gate.temperature == pytest.approx(0.001)
    assert all(draw in (0.0, 1.0) or not 0.01 < draw < 0.99 for draw in gate().flatten().tolist())


def test_open_gates_are_described(fuser):
    total = sum(opened.numel() for opened in fuser.open_gates().values())
    assert all(opened.all() for opened in fuser.open_gates().values())
    fuser.gate.logit.data[1] = -1.0
    assert sum(int(opened.sum()) for opened in fuser.open_gates().values()) == total - 1
    assert "2 of 3" in describe_gates(fuser)
    assert describe_gates(fuser).endswith(f"Closed layers: {next(iter(fuser.open_gates()))} 1.")


def test_grouped_blocks_equal_one_network_per_group():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    linear, norm, ffn = GroupedLinear(3, 4, 6), GroupedRMSNorm(3, 4), GroupedFFN(3, 4, 8, dropout=0.0)
    layer_norm, swiglu = GroupedLayerNorm(3, 4), GroupedSwiGLU(3, 4, 6)
    for block in (linear, norm, ffn, layer_norm, swiglu):
        block.reset_parameters()
    for parameter in (*norm.parameters(), *layer_norm.parameters()):
        torch.nn.init.normal_(parameter)
    for group in range(3):
        expected = torch.nn.functional.linear(x[group], linear.weight[group].T, linear.bias[group, 0])
        torch.testing.assert_close(linear(x)[group], expected)
        torch.testing.assert_close(
            norm(x)[group], torch.nn.functional.rms_norm(x[group], (4,), norm.weight[group, 0], eps=1e-6)
        )
        expected = torch.nn.functional.layer_norm(
            x[group], (4,), layer_norm.weight[group, 0], layer_norm.bias[group, 0]
        )
        torch.testing.assert_close(layer_norm(x)[group], expected)
        gate, up = (x[group] @ part.weight[group] + part.bias[group] for part in (swiglu.gate, swiglu.up))
        torch.testing.assert_close(swiglu(x)[group], torch.nn.functional.silu(gate) * up)
        inner = torch.nn.functional.gelu(ffn.norm(x)[group] @ ffn.w1.weight[group])
        torch.testing.assert_close(ffn(x)[group], x[group] + inner @ ffn.w2.weight[group])


def test_a_model_with_keys_and_values_of_unlike_size_is_refused(receiver, sharer):
    odd = sharer.identity.to_dict() | {"kv": {"num_layers": 2, "num_kv_heads": 1, "key_dim": 16, "value_dim": 8}}
    with pytest.raises(PairError, match="one size"):
        make_fuser("c2c", receiver=receiver.identity.to_dict(), sharer=odd)


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(PairError, match=r"fuser\.kind .* did you mean 'c2c'"):
        make_fuser("c3c")


def test_what_cannot_be_registered_is_refused():
    c2c = FUSERS["c2c"]
    with pytest.raises(PairError, match="subclass both"):
        register_fuser("mine", torch.nn.Linear)
    with pytest.raises(PairError, match="model_type to be 'kvfuse-mine', got 'kvfuse-c2c'"):
        register_fuser("mine", c2c)
    with pytest.raises(PairError, match="choose another name"):
        register_fuser("c2c", type("Other", (c2c,), {}))
    assert "mine" not in FUSERS
    assert FUSERS["c2c"] is c2c


def test_standardized_inputs_have_no_mean_and_unit_scale(receiver, sharer, tmp_path):
    fuser = tiny_fuser(receiver, sharer, "low-rank", standardize=True)
    # Keys with large means that hardly vary, as a bias makes them, and one channel that never does
    torch.manual_seed(0)
    batches = [(random_kv(fuser.config.receiver_kv), random_kv(fuser.config.sharer_kv)) for _ in range(2)]
    moved = [(one, KV(1000 + 0.1 * other.key, other.value)) for one, other in batches]
    for _, other in moved:
        other.value[..., 0] = 3.0
    fuser.prepare(iter(moved))
    seen = []
    with fuser.down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        for one, other in moved:
            fuser(receiver=one, sharer=other)
    channels = torch.cat(seen, dim=1)  # (G, N, C)
    assert channels.mean(1).abs().max() < 2e-3
    std = channels.std(1, correction=0)
    assert bool(((std - 1).abs() < 2e-3).logical_or(std < 1e-6).all())
    assert (std < 1e-6).sum() == len(std) // 2 * fuser.config.sharer_kv.num_kv_heads
    # The statistics are saved with the weights
    fuser.save_pretrained(tmp_path / "fuser")
    assert_kv_close(
        *(each(receiver=moved[0][0], sharer=moved[0][1]) for each in (fuser, load_fuser(tmp_path / "fuser")))
    )


def test_a_kind_that_needs_no_statistics_reads_nothing(fuser):
    fuser.prepare(pytest.fail(f"read {each}") for each in range(1))
