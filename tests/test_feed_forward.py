"""The block's own backward pass is autograd's."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.memory import peak_bytes
from kvfuse.fusers.execution import feed_forward as blocks
from kvfuse.fusers.execution.feed_forward import DROPOUT_LEVELS, feed_forward
from kvfuse.fusers.layers import GroupedFFN

SHAPES = ((3, 5, 8), (3, 1, 8), (3, 8, 6), (3, 6, 8))
EPS = 1e-6
LEFT_OUT = 6554  # of 2^16, for a dropout of 0.1


@pytest.fixture(params=[0, 2**40], ids=["one by one", "at once"])
def tensors(request, monkeypatch):
    monkeypatch.setattr(blocks, "CACHE_BYTES", request.param)
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]


def plain(x, scale, w1, w2, mask=1.0):
    return x + mask * (F.gelu((F.rms_norm(x, x.shape[-1:], eps=EPS) * scale) @ w1) @ w2)


def mask_of(count, left_out, seed=0):
    torch.manual_seed(seed)
    return blocks._draw_mask(torch.empty(count, dtype=torch.uint8), left_out)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("dropout", "kept"), [(0.0, 1.0), (0.5, 0.5), (0.1, 1 - LEFT_OUT / DROPOUT_LEVELS)])
def test_value_and_gradients_are_those_of_the_plain_formula(tensors, dropout, kept, keep):
    got = feed_forward(*tensors, dropout=dropout, eps=EPS, keep=keep)
    mask = (got - tensors[0]).detach() != 0  # rounding aside, nothing that is added is zero
    expected = plain(*tensors, mask / kept)
    torch.testing.assert_close(got, expected)
    gradient = torch.randn_like(got)
    for mine, other in zip(*(torch.autograd.grad(one, tensors, gradient) for one in (got, expected)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
def test_gradients_are_right_numerically(tensors, keep):
    def block(*inputs):
        torch.manual_seed(0)
        return feed_forward(*inputs, dropout=0.3, eps=EPS, keep=keep)

    assert torch.autograd.gradcheck(block, tensors)


def test_dropout_leaves_out_and_scales_up_and_the_gradient_knows_what(tensors):
    x = tensors[0]
    whole, some = feed_forward(*tensors, dropout=0.0, eps=EPS) - x, feed_forward(*tensors, dropout=0.5, eps=EPS) - x
    left_out = some.abs() < 1e-12
    assert 0.2 < left_out.double().mean() < 0.8
    torch.testing.assert_close(some[~left_out], 2 * whole[~left_out])
    (gradient,) = torch.autograd.grad(some[left_out].sum(), tensors[3], retain_graph=True)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    (gradient,) = torch.autograd.grad(some.sum(), tensors[3], retain_graph=True)
    (expected,) = torch.autograd.grad((2 * whole)[~left_out].sum(), tensors[3])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("left_out", [1, LEFT_OUT, DROPOUT_LEVELS // 2, DROPOUT_LEVELS - 1])
def test_a_mask_keeps_the_share_that_it_says(left_out):
    mask, share = mask_of(1_000_003, left_out), 1 - left_out / DROPOUT_LEVELS
    assert set(mask.unique().tolist()) <= {0, 1}
    assert abs(float(mask.double().mean()) - share) < 4 * (share * (1 - share) / len(mask)) ** 0.5


def test_a_seed_decides_the_mask():
    assert torch.equal(mask_of(1001, LEFT_OUT), mask_of(1001, LEFT_OUT))
    assert not torch.equal(mask_of(1001, LEFT_OUT), mask_of(1001, LEFT_OUT, seed=1))


@pytest.mark.parametrize("apart", [1, 2, 3, 4, 8, 512])
def test_elements_of_a_mask_know_nothing_of_each_other(apart):
    """Four of them are of one draw."""
    mask = mask_of(1_000_000, LEFT_OUT).double()
    both = torch.corrcoef(torch.stack([mask[apart:], mask[:-apart]]))[0, 1]
    assert abs(float(both)) < 4 / len(mask) ** 0.5


@pytest.mark.parametrize("keep", [True, False])
def test_the_gradient_of_one_matrix_is_gone_before_there_is_the_others(keep):
    x, scale, w1, w2 = (
        torch.randn(shape, requires_grad=True) for shape in ((2, 4, 256), (2, 1, 256), (2, 256, 256), (2, 256, 256))
    )
    for tensor in (x, scale, w1, w2):
        tensor.grad = torch.zeros_like(tensor)
    out = feed_forward(x, scale, w1, w2, dropout=0.1, eps=EPS, keep=keep).sum()
    assert w1.nbytes < peak_bytes(out.backward) < 1.5 * w1.nbytes


@pytest.mark.parametrize(("recompute", "tensors"), [(False, 2), (True, 1)])
def test_it_keeps_two_tensors_or_one_and_a_mask(recompute, tensors):
    ffn = GroupedFFN(2, 8, 8, dropout=0.1)
    ffn.recompute = recompute
    ffn.reset_parameters()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        ffn(torch.randn(2, 50, 8))
    assert sum(tensor.nbytes for tensor in kept.values() if tensor.ndim == 3 and tensor.shape[1] == 50) == 2 * 50 * (
        4 * 8 * tensors + 8
    )


def test_under_autocast_and_at_inference_it_computes_the_same():
    ffn = GroupedFFN(2, 8, 8, dropout=0.1).eval()
    ffn.reset_parameters()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), ffn.requires_grad_(False)(x))
    expected = ffn(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ffn(x), expected, rtol=0.05, atol=0.05)
