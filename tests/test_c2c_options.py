"""What can be left out of the paper's fuser, one option at a time and in the combinations of its ablation table."""

import pytest
import torch
from helpers import assert_gradients_reach_everything, assert_kv_equal, inputs_of, random_kv

from kvfuse.errors import CheckpointError, PairError
from kvfuse.fusers.base import describe_gates
from kvfuse.fusers.gate import Gate
from kvfuse.published.writer import write_published
from kvfuse.testing import tiny_fuser

PROJECT = {"replace": True, "receiver_input": False, "feature_fusion": False, "weighting": False, "gate": "none"}
VARIANTS = [
    PROJECT,
    {"gate": "none"},
    {"gate": "head"},
    {"gate_noise": "gumbel"},
    {"weighting": False},
    {"feature_fusion": False},
    {"receiver_input": False},
    {"replace": True},
    {"parts": "keys"},
    {"parts": "values", "gate": "head", "weighting": False},
]


@pytest.fixture(params=VARIANTS, ids=str)
def fuser(request, receiver, sharer):
    return tiny_fuser(receiver, sharer, **request.param)


@pytest.fixture
def inputs(fuser):
    return inputs_of(fuser)


def test_residual_has_the_receivers_shape_and_a_token_its_own(fuser, inputs):
    rows, places = torch.tensor([1, 0]), torch.tensor([3, 2])
    together = fuser(receiver=inputs[0], sharer=inputs[1])
    assert (together.spec, together.key.shape) == (fuser.config.receiver_kv, inputs[0].key.shape)
    receiver_kv, sharer_kv = (kv.tokens(rows, places) for kv in inputs)
    alone = fuser(receiver=receiver_kv, sharer=sharer_kv)
    torch.testing.assert_close(alone.value, together.tokens(rows, places).value, rtol=1e-5, atol=1e-6)


def test_closed_gates_give_exactly_zero(fuser, inputs):
    if fuser.gate is None:
        assert fuser.gate_parameters() == []
        return
    fuser.gate.reset_parameters(-1.0)
    assert not any(
        part.any()
        for part in (fuser(receiver=inputs[0], sharer=inputs[1]).key, fuser(receiver=inputs[0], sharer=inputs[1]).value)
    )


def test_gradients_reach_every_parameter(fuser, inputs):
    assert_gradients_reach_everything(fuser, inputs)


def test_the_receivers_cache_is_read_only_where_asked(receiver, sharer):
    blind = tiny_fuser(receiver, sharer, receiver_input=False)
    mine, theirs = random_kv(blind.config.receiver_kv), random_kv(blind.config.sharer_kv)
    assert_kv_equal(blind(receiver=mine, sharer=theirs), blind(receiver=mine.zeros_like(), sharer=theirs))
    assert not torch.equal(
        blind(receiver=mine, sharer=theirs).key, blind(receiver=mine, sharer=theirs.zeros_like()).key
    )


def test_projection_only_replaces_the_receivers_cache(receiver, sharer):
    project = tiny_fuser(receiver, sharer, **PROJECT)
    theirs = random_kv(project.config.sharer_kv)
    first, second = (random_kv(project.config.receiver_kv) for _ in range(2))
    torch.testing.assert_close(
        first.value + project(receiver=first, sharer=theirs).value,
        second.value + project(receiver=second, sharer=theirs).value,
    )


@pytest.mark.parametrize(("parts", "zero", "other"), [("keys", "value", "key"), ("values", "key", "value")])
def test_one_part_alone_leaves_the_other_as_it_is(receiver, sharer, parts, zero, other):
    fuser = tiny_fuser(receiver, sharer, parts=parts)
    residual = fuser(receiver=random_kv(fuser.config.receiver_kv), sharer=random_kv(fuser.config.sharer_kv))
    assert not getattr(residual, zero).any()
    assert getattr(residual, other).any()


def test_without_weighting_a_head_is_its_projection(receiver, sharer):
    plain, weighted = (tiny_fuser(receiver, sharer, weighting=weighting) for weighting in (False, True))
    weighted.load_state_dict(plain.state_dict(), strict=False)
    weighted.weighting_out.reset_parameters(zero=True)  # sigmoid(0) = 1/2
    mine, theirs = random_kv(plain.config.receiver_kv), random_kv(plain.config.sharer_kv)
    torch.testing.assert_close(plain(receiver=mine, sharer=theirs).key, 2 * weighted(receiver=mine, sharer=theirs).key)


def test_a_gate_per_head_switches_that_head_alone(receiver, sharer):
    fuser = tiny_fuser(receiver, sharer, gate="head")
    mine, theirs = random_kv(fuser.config.receiver_kv), random_kv(fuser.config.sharer_kv)
    before = fuser(receiver=mine, sharer=theirs)
    fuser.gate.logit.data[3 + 1, 0, 0] = -1.0  # values of layer 1, head 0
    after = fuser(receiver=mine, sharer=theirs)
    assert torch.equal(before.key, after.key)
    assert not after.value[1, :, 0].any()
    assert torch.equal(before.value[1, :, 1], after.value[1, :, 1])
    assert describe_gates(fuser) == "Open gates: keys 6 of 6, values 5 of 6."


def test_the_references_noise_is_drawn_for_every_head_and_token():
    gate = Gate(2, 1.0, 0.001, noise="gumbel").train()
    gate.reset_parameters(0.0)
    torch.manual_seed(0)
    draws = gate(4000, 3).detach()
    assert draws.shape == (2, 4000, 3)
    assert draws.unique().numel() > 20_000
    opened = (draws > 0.5).float().mean()  # P(Gumbel > 0) = 1 - 1/e
    assert float(opened) == pytest.approx(1 - 1 / torch.e, abs=0.01)
    assert gate.eval()(4000, 3).flatten().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("option", ["parts", "gate", "gate_noise", "rope"])
def test_an_unknown_choice_is_named(receiver, sharer, option):
    with pytest.raises(PairError, match=rf"expected fuser\.{option} to be one of"):
        tiny_fuser(receiver, sharer, **{option: "nonsense"})


@pytest.mark.parametrize(
    "options", [{"gate": "head"}, {"weighting": False}, {"rope": "removed"}, {"parts": "values"}], ids=str
)
def test_what_the_published_format_cannot_hold_is_refused(receiver, sharer, tmp_path, options):
    fuser = tiny_fuser(receiver, sharer, token_alignment="identity", **options)
    with pytest.raises(CheckpointError, match=f"{next(iter(options))}="):
        write_published(fuser, tmp_path)
