"""Products by oneDNN are torch's own but for rounding, and are taken only where they are meant to be."""

import pytest
import torch
from helpers import Dispatched, assert_kv_close
from torch.nn import functional as F

from kvfuse.backends import onednn as products
from kvfuse.backends.onednn import MIN_ROWS, bmm, linear, onednn_linears
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.fusers.execution import feed_forward
from kvfuse.fusers.layers import GroupedLinear
from kvfuse.model import CacheToCache
from kvfuse.stages.prefill import prefill
from kvfuse.testing import tiny_fuser, tiny_model
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.loop.batches import collate
from kvfuse.training.loop.loss import response_loss

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch is built without oneDNN"
)
EXAMPLES = [
    Example([{"role": "user", "content": f"What is {i}?"}], f"It is number {i} of them, and of no others")
    for i in range(4)
]
X, WEIGHT, BIAS = torch.randn(2, MIN_ROWS, 512), torch.randn(640, 512), torch.randn(640)


@pytest.fixture(autouse=True)
def _quicker(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def counted(run):
    """How many products are oneDNN's."""
    with Dispatched() as seen:
        run()
    return sum("_linear_pointwise" in name for name in seen.names)


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("x", [X, X[0], X.transpose(0, 1), X[:, ::2].repeat(2, 1, 1), torch.randn(512, MIN_ROWS).T])
def test_it_is_torchs_own_product(x, bias):
    assert counted(lambda: linear(x, WEIGHT, bias)) == 1
    for weight in (WEIGHT, WEIGHT.T.contiguous().T):
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, WEIGHT, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "inputs",
    [
        (X[:1, : MIN_ROWS - 1], WEIGHT),
        (X, WEIGHT[:100]),
        (X.bfloat16(), WEIGHT.bfloat16()),
        (X.double(), WEIGHT.double()),
        (X, WEIGHT.clone().requires_grad_()),
        (X, WEIGHT, BIAS.clone().requires_grad_()),
    ],
    ids=["few rows", "small", "bfloat16", "float64", "a weight that learns", "a bias that learns"],
)
def test_all_else_is_left_to_torch(inputs):
    assert counted(lambda: linear(*inputs)) == 0
    assert torch.equal(linear(*inputs), F.linear(*inputs))


def test_autocast_is_left_to_torch():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(X, WEIGHT).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "gradients",
    [
        torch.randn(2, MIN_ROWS, 640),
        torch.ones(1).expand(2, MIN_ROWS, 640),
        torch.randn(640, MIN_ROWS, 2).transpose(0, 2),
    ],
)
@pytest.mark.parametrize("bias", [None, BIAS])
def test_gradients_go_through_what_is_frozen(bias, gradients):
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    assert counted(lambda: linear(inputs[0], WEIGHT, bias).backward(gradients)) == 2
    F.linear(inputs[1], WEIGHT, bias).backward(gradients)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_products_are_torchs_own(groups):
    a, b = torch.randn(groups, MIN_ROWS, 512), torch.randn(groups, 512, 640)
    out = torch.empty(groups, MIN_ROWS, 640)
    assert counted(lambda: bmm(a, b, out=out)) == int(groups == 1)
    for product in (out, bmm(a, b), bmm(a, b.mT.contiguous().mT)):
        torch.testing.assert_close(product, torch.bmm(a, b), rtol=1e-4, atol=1e-4)


def test_gradients_of_what_is_frozen_cost_nothing():
    frozen = X.clone().requires_grad_()
    with torch.no_grad():
        assert counted(lambda: linear(frozen, WEIGHT)) == 1


def test_models_multiply_so_within_and_not_after(monkeypatch):
    model = tiny_model("qwen3", hidden_size=512, intermediate_size=640).model
    ids = torch.randint(5, 250, (1, MIN_ROWS))
    what = model, ids, torch.ones_like(ids), torch.arange(MIN_ROWS)[None]
    assert counted(lambda: prefill(*what)) > 3
    quick = read_cache(prefill(*what))
    with pytest.raises(ZeroDivisionError), torch.no_grad(), onednn_linears(MIN_ROWS):
        raise ZeroDivisionError
    with torch.no_grad():
        assert counted(lambda: model(ids)) == 0
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert counted(lambda: prefill(*what)) == 0
    plain = read_cache(prefill(*what))
    assert_kv_close(quick, plain, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_lane_of_a_fuser_multiplies_so():
    layer, x = GroupedLinear(1, 512, 640), X[:1]
    layer.reset_parameters()
    assert counted(lambda: layer(x)) == 1
    torch.testing.assert_close(layer(x), torch.baddbmm(layer.bias, x, layer.weight), rtol=1e-4, atol=1e-4)


def test_a_training_step_multiplies_so_and_learns_the_same(monkeypatch, sharer):
    receiver = tiny_model("qwen3", hidden_size=512, intermediate_size=640)
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, hidden_dim=512, intermediate_dim=512)])
    monkeypatch.setattr(feed_forward, "CACHE_BYTES", 0)  # group by group, as large fusers are
    fuser = pair.fusers[0].train()

    def step(recompute=False):
        fuser.zero_grad()
        torch.manual_seed(0)  # of dropout and gates
        loss = response_loss(pair, collate(list(map(Encoder.of(pair).encode, EXAMPLES))), recompute=recompute)
        multiplied.append(counted(loss.backward))
        return [loss.detach(), *(parameter.grad.clone() for parameter in fuser.parameters())]

    multiplied = []
    quick, recomputed = step(), step(recompute=True)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    plain = step()
    assert multiplied[0] > multiplied[1] > multiplied[2] == 0, "what is computed again is computed as it was"
    torch.testing.assert_close(quick, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(recomputed, plain, rtol=1e-3, atol=1e-4)
