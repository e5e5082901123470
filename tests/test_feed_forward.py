"""The block's own backward pass is autograd's."""

import pytest
import torch
from torch.nn import functional as F

from kvfuse.fusers import feed_forward
from kvfuse.fusers.feed_forward import FeedForward
from kvfuse.fusers.grouped import GroupedFFN

SHAPES = ((3, 5, 8), (3, 1, 8), (3, 8, 6), (3, 6, 8))
EPS = 1e-6


@pytest.fixture(params=[0, 2**40], ids=["one by one", "at once"])
def tensors(request, monkeypatch):
    monkeypatch.setattr(feed_forward, "CACHED_BYTES", request.param)
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]


def plain(x, scale, w1, w2):
    return x + F.gelu((F.rms_norm(x, x.shape[-1:], eps=EPS) * scale) @ w1) @ w2


@pytest.mark.parametrize("keep", [True, False])
def test_value_and_gradients_are_those_of_the_plain_formula(tensors, keep):
    expected, got = plain(*tensors), FeedForward.apply(*tensors, 0.0, EPS, keep)
    torch.testing.assert_close(got, expected)
    gradient = torch.randn_like(got)
    for mine, other in zip(*(torch.autograd.grad(one, tensors, gradient) for one in (got, expected)), strict=True):
        torch.testing.assert_close(mine, other)


def test_gradients_are_right_numerically(tensors):
    assert torch.autograd.gradcheck(lambda *inputs: FeedForward.apply(*inputs, 0.0, EPS), tensors)


def test_dropout_leaves_out_and_scales_up_and_the_gradient_knows_what(tensors):
    x = tensors[0]
    whole, some = FeedForward.apply(*tensors, 0.0, EPS) - x, FeedForward.apply(*tensors, 0.5, EPS) - x
    left_out = some.abs() < 1e-12
    assert 0.2 < left_out.double().mean() < 0.8
    torch.testing.assert_close(some[~left_out], 2 * whole[~left_out])
    (gradient,) = torch.autograd.grad(some[left_out].sum(), tensors[3], retain_graph=True)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    (gradient,) = torch.autograd.grad(some.sum(), tensors[3], retain_graph=True)
    (expected,) = torch.autograd.grad((2 * whole)[~left_out].sum(), tensors[3])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("recompute", "tensors"), [(False, 2), (True, 1)])
def test_it_keeps_two_tensors_or_one_and_a_mask(recompute, tensors):
    ffn = GroupedFFN(2, 8, 8, dropout=0.1)
    ffn.recompute = recompute
    ffn.reset_parameters()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ffn(torch.randn(2, 50, 8))
    assert sum(tensor.nbytes for tensor in kept if tensor.ndim == 3 and tensor.shape[1] == 50) == 2 * 50 * (4 * 8 * tensors + 8)


def test_under_autocast_and_at_inference_it_computes_the_same():
    ffn = GroupedFFN(2, 8, 8, dropout=0.1).eval()
    ffn.reset_parameters()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), ffn.requires_grad_(False)(x))
    expected = ffn(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ffn(x), expected, rtol=0.05, atol=0.05)
