"""What all kinds with a trained gate have in common."""

import pytest
import torch
from helpers import assert_kv_close, assert_kv_equal, random_kv

from kvfuse.cache.kv import KV
from kvfuse.errors import PairError
from kvfuse.fusers import FUSERS, GatedFuser
from kvfuse.fusers.gate import GatedConfig
from kvfuse.testing import tiny_fuser

KINDS = [kind for kind, cls in FUSERS.items() if issubclass(cls.config_class, GatedConfig)]


def test_the_three_that_learn_by_gradient_are_among_them():
    assert {"c2c", "c2c-complex", "low-rank"} <= set(KINDS)


@pytest.mark.parametrize(("noise", "alike"), [("logistic", True), ("logistic-per-token", False), ("gumbel", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_drawn_per_gate_or_for_every_token(receiver, sharer, kind, noise, alike):
    """Of tokens that are all the same, only noise of their own can tell one from another."""
    fuser = tiny_fuser(receiver, sharer, kind, gate_noise=noise, dropout=0.0).train()
    torch.manual_seed(0)
    same = [random_kv(spec, 1, 1) for spec in (fuser.config.receiver_kv, fuser.config.sharer_kv)]
    alike_kv = [KV(kv.key.expand(-1, -1, -1, 4, -1), kv.value.expand(-1, -1, -1, 4, -1)) for kv in same]
    residual = fuser(receiver=alike_kv[0], sharer=alike_kv[1])
    for part in (residual.key, residual.value):
        assert torch.allclose(part, part[:, :, :, :1].expand_as(part), rtol=1e-4, atol=1e-6) == alike


@pytest.mark.parametrize("kind", KINDS)
def test_gate_noise_is_off_at_inference(receiver, sharer, kind):
    logistic, gumbel = (tiny_fuser(receiver, sharer, kind, gate_noise=noise) for noise in ("logistic", "gumbel"))
    inputs = random_kv(logistic.config.receiver_kv), random_kv(logistic.config.sharer_kv)
    assert_kv_equal(*(fuser(receiver=inputs[0], sharer=inputs[1]) for fuser in (logistic, gumbel)))


@pytest.mark.parametrize("kind", KINDS)
def test_gates_anneal_and_train_apart(receiver, sharer, kind):
    fuser = tiny_fuser(receiver, sharer, kind, initial_temperature=2.0, final_temperature=0.02)
    fuser.set_progress(0.5)
    assert fuser.gate.temperature == pytest.approx(0.2)
    assert [parameter is fuser.gate.logit for parameter in fuser.gate_parameters()] == [True]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_noise_is_named(receiver, sharer, kind):
    with pytest.raises(
        PairError, match=r"expected fuser\.gate_noise to be one of logistic, logistic-per-token, gumbel"
    ):
        tiny_fuser(receiver, sharer, kind, gate_noise="nonsense")


def test_a_network_of_the_old_contract_still_fuses(receiver, sharer):
    """Fusers of packages written for 0.1 return the residual and the weights of its heads."""

    class Old(FUSERS["low-rank"]):
        residual = GatedFuser.residual

        def network(self, theirs, mine):
            features = self.fusion(self.down(torch.cat([theirs, mine], dim=-1)))
            return self.up(features), self.head_weights(self.weighting(features))

    new = tiny_fuser(receiver, sharer, "low-rank")
    old = Old(new.config).eval()
    old.load_state_dict(new.state_dict())
    inputs = {"receiver": random_kv(new.config.receiver_kv), "sharer": random_kv(new.config.sharer_kv)}
    with pytest.warns(DeprecationWarning, match="write residual"):
        got = old(**inputs)
    assert_kv_close(got, new(**inputs))
