"""Group by group a fuser computes the same as at once, and it skips groups behind a closed gate."""

import pytest
import torch
from helpers import Dispatched, assert_kv_close, assert_kv_equal, inputs_of, random_kv
from torch import nn

from kvfuse.cache.kv import KV
from kvfuse.fusers import FUSERS
from kvfuse.fusers.execution import feed_forward
from kvfuse.fusers.execution.by_group import contiguous_slices, is_grouped, select_groups
from kvfuse.fusers.layers import GroupedLinear
from kvfuse.testing import tiny_fuser, tiny_model

OPTIONS = [
    {},
    {"gate": "head"},
    {"gate": "none"},
    {"parts": "values"},
    {"replace": True},
    {"weighting": False},
    {"weights": "int8"},
    {"weights": "int4"},
]


def both_ways(fuser, inputs, monkeypatch):
    """The residual with all groups at once, and group by group."""
    with torch.no_grad():
        monkeypatch.setattr(feed_forward, "CACHE_BYTES", 2**40)
        together = fuser(receiver=inputs[0], sharer=inputs[1])
        monkeypatch.setattr(feed_forward, "CACHE_BYTES", 0)
        return together, fuser(receiver=inputs[0], sharer=inputs[1])


@pytest.fixture(params=[{"kind": kind} for kind in FUSERS] + OPTIONS, ids=str)
def fuser(request, receiver, sharer):
    return tiny_fuser(receiver, sharer, **request.param)


@pytest.fixture
def inputs(fuser):
    return inputs_of(fuser, tokens=9)


@pytest.mark.parametrize("closed", [[], [1], [0, 2]])
def test_one_by_one_equals_together_equals_training(fuser, inputs, closed, monkeypatch):
    if fuser.gate is not None:
        with torch.no_grad():
            fuser.gate.logit[closed] = -1.0
            fuser.gate.logit[-1, :, -1:] = -1.0
    expected = fuser(receiver=inputs[0], sharer=inputs[1])  # with gradients: all groups, switched afterwards
    for got in both_ways(fuser, inputs, monkeypatch):
        assert_kv_close(got, expected, atol=1e-6)
        assert torch.equal(got.key == 0, expected.key == 0)


def test_few_tokens_weigh_their_heads_alike(receiver, sharer, monkeypatch):
    """For few tokens the two last products of the weighting are not multiplied first."""
    fuser = tiny_fuser(receiver, sharer)
    many = random_kv(fuser.config.receiver_kv, 1, 7), random_kv(fuser.config.sharer_kv, 1, 7)
    one = tuple(KV(kv.key[:, :, :, 3:4], kv.value[:, :, :, 3:4]) for kv in many)
    for alone, together in zip(both_ways(fuser, one, monkeypatch), both_ways(fuser, many, monkeypatch), strict=True):
        torch.testing.assert_close(alone.key, together.key[:, :, :, 3:4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [0, 2**40])
def test_what_is_behind_closed_gates_is_not_computed(receiver, sharer, monkeypatch, budget):
    monkeypatch.setattr(feed_forward, "CACHE_BYTES", budget)
    fuser = tiny_fuser(receiver, sharer)
    with torch.no_grad():
        fuser.gate.logit[[0, 3, 4]] = -1.0
    computed = []
    residual = type(fuser).residual

    def counted(self, *, receiver, **others):
        computed.append(len(receiver))
        return residual(self, receiver=receiver, **others)

    monkeypatch.setattr(type(fuser), "residual", counted)
    with torch.no_grad():
        fuser(receiver=random_kv(fuser.config.receiver_kv), sharer=random_kv(fuser.config.sharer_kv))
    assert sum(computed) == 3


def test_gates_that_change_are_noticed(receiver, sharer):
    fuser = tiny_fuser(receiver, sharer)
    inputs = random_kv(fuser.config.receiver_kv), random_kv(fuser.config.sharer_kv)
    with torch.no_grad():
        for logit, adds in ((-1.0, False), (1.0, True)):
            fuser.gate.reset_parameters(logit)
            assert fuser(receiver=inputs[0], sharer=inputs[1]).key.any() == adds
        fuser.gate.logit.data.fill_(-1.0)
        assert not fuser(receiver=inputs[0], sharer=inputs[1]).key.any()
        fuser.gate.reset_parameters(1.0)
        fuser.load_state_dict({**fuser.state_dict(), "gate.logit": -torch.ones_like(fuser.gate.logit)})
        assert not fuser(receiver=inputs[0], sharer=inputs[1]).value.any()


def test_a_fuser_with_weights_for_all_layers_together_has_no_lanes(receiver, sharer, monkeypatch):
    """Cutting a weight whose first axis is something else would be silently wrong."""
    fuser = tiny_fuser(receiver, sharer)
    assert is_grouped(fuser)
    groups = len(fuser.gate.logit)
    fuser.shared = nn.Linear(4, groups)
    assert not is_grouped(fuser)
    together, apart = both_ways(
        fuser, (random_kv(fuser.config.receiver_kv), random_kv(fuser.config.sharer_kv)), monkeypatch
    )
    assert_kv_equal(together, apart)


def test_a_cut_shares_the_weights():
    linear = GroupedLinear(6, 4, 5)
    linear.reset_parameters()
    part = select_groups(linear, slice(2, 4), 6)
    assert part.weight.data_ptr() == linear.weight[2].data_ptr()
    x = torch.randn(2, 3, 4)
    assert torch.equal(part(x), linear(x.repeat(3, 1, 1))[2:4])
    pairs = select_groups(linear, slice(1, 2), 3)  # a gate group of two groups
    assert torch.equal(pairs.weight, linear.weight[[1, 4]])


@pytest.mark.parametrize(("chosen", "expected"), [([], []), ([0, 1, 4], [(0, 2), (4, 5)]), ([2], [(2, 3)])])
def test_runs_are_neighbours(chosen, expected):
    assert [(one.start, one.stop) for one in contiguous_slices(chosen)] == expected


def test_all_layers_at_once_are_a_few_operations_and_no_device_is_asked(receiver, sharer, monkeypatch):
    """Each is a kernel launch on a GPU, where an RMSNorm is one, not the five that it is here."""
    monkeypatch.setattr(feed_forward, "CACHE_BYTES", 2**40)
    for layers in (3, 9):
        deep = tiny_model("qwen3", num_hidden_layers=layers)
        fuser = tiny_fuser(deep, sharer)
        inputs = random_kv(fuser.config.receiver_kv, 1, 64), random_kv(fuser.config.sharer_kv, 1, 64)
        with torch.no_grad():
            fuser(receiver=inputs[0], sharer=inputs[1])  # asks once which gates are open
            with Dispatched() as seen:
                fuser(receiver=inputs[0], sharer=inputs[1])
        norms = sum("pow" in name for name in seen.names)
        assert norms == 3
        assert len(seen.names) - 4 * norms < 38, seen.names
        asked = [name for name in seen.names if any(word in name for word in ("_local_scalar", "nonzero", "_to_copy"))]
        assert asked == ["aten::nonzero"], "which gates are open; on a device that is kept"
