import pytest
import torch
from datasets import Dataset
from helpers import assert_kv_equal, random_kv

from kvfuse.cache.kv import KV
from kvfuse.errors import PairError
from kvfuse.fusers.normal_equations import NormalEquations
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.testing import tiny_fuser
from kvfuse.training.closed_form import fit, read_pairs
from kvfuse.training.data.columns import to_columns
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.recipe import TrainSection


def tokens(count, groups=2, inputs=3, outputs=4):
    x = torch.randn(groups, count, inputs, dtype=torch.float64)
    return x, x @ torch.randn(groups, inputs, outputs, dtype=torch.float64) + 5 + torch.randn(groups, count, outputs)


def seen(x, y):
    moments = NormalEquations(len(x), x.shape[2], y.shape[2], x.device)
    for part in range(0, x.shape[1], 7):
        moments.add(x[:, part : part + 7], y[:, part : part + 7])
    return moments


def test_it_solves_what_least_squares_on_all_tokens_solves():
    x, y = tokens(100)
    weight, bias = seen(x, y).solve(penalty=0.0)
    both = torch.linalg.lstsq(torch.nn.functional.pad(x, (0, 1), value=1.0), y).solution
    torch.testing.assert_close(torch.cat([weight, bias], 1), both)


def test_the_penalty_counts_in_each_inputs_own_variance():
    x, y = tokens(100)
    scale = torch.tensor([1.0, 100.0, 0.01], dtype=torch.float64)
    weight, bias = seen(x, y).solve(0.3)
    scaled, same = seen(x * scale, y).solve(0.3)
    torch.testing.assert_close(scaled * scale[:, None], weight)
    torch.testing.assert_close(same, bias)
    assert weight.norm() < seen(x, y).solve(0.0)[0].norm()


def test_what_is_explained_is_measured_on_any_tokens():
    x, y = tokens(100)
    weight, bias = seen(x, y).solve(0.01)
    x, y = x[:, :40] + 1, y[:, :40]
    by_head, by_group = seen(x, y).explained(weight, bias, heads=2)
    wrong, total = ((part**2).sum(1) for part in (y - x @ weight - bias, y - y.mean(1, keepdim=True)))
    torch.testing.assert_close(by_group, 1 - wrong.sum(1) / total.sum(1))
    torch.testing.assert_close(by_head[:, 1], 1 - wrong[:, 2:].sum(1) / total[:, 2:].sum(1))


@pytest.fixture
def fuser(receiver, sharer):
    return tiny_fuser(receiver, sharer, "ridge", num_sources=2)


def planted(fuser, count, noise):
    """Values of receiver layer 0 follow those of a sharer layer that it reads; everything else is unrelated."""
    torch.manual_seed(5)
    theirs = [random_kv(fuser.config.sharer_kv, tokens=200) for _ in range(count)]
    layer = fuser.sources[0][0]
    for kv in theirs:
        mine = random_kv(fuser.config.receiver_kv, tokens=200)
        value = torch.cat([kv.value[layer][:, :2], kv.value[layer][:, 2:]], -1)[..., : mine.value.shape[-1]]
        mine.value[0] = value + noise * mine.value[0]
        yield KV(mine.key, mine.value), kv


def test_what_can_be_told_from_the_sharer_is_weighted_and_the_rest_closed(fuser):
    fuser.fit(planted(fuser, 16, noise=1.0))
    opened = fuser.open_gates()
    assert opened["values"].tolist() == [True, False, False]
    assert not opened["keys"].any()
    torch.testing.assert_close(fuser.weight[3].detach(), torch.full((1, 2), 0.25), atol=0.01, rtol=0)  # R^2 = 1/2
    for mine, theirs in planted(fuser, 1, noise=1.0):
        residual = fuser(receiver=mine, sharer=theirs)
        assert not residual.key.any()
        assert not residual.value[1:].any()


def test_what_the_map_repeats_stays_as_it_is(fuser):
    fuser.fit(planted(fuser, 16, noise=0.0))
    ((mine, theirs),) = planted(fuser, 1, noise=0.0)
    assert fuser(receiver=mine, sharer=theirs).value[0].abs().max() < 1e-2 < mine.value[0].abs().max()


def test_each_layer_reads_its_own_and_its_neighbours(receiver, sharer):
    assert tiny_fuser(receiver, sharer, "ridge", num_sources=3).sources == [[0, 1, 1], [1, 2, 2], [2, 3, 3]]
    with pytest.raises(PairError, match=r"fuser\.num_sources from 1 to the sharer's 4"):
        tiny_fuser(receiver, sharer, "ridge", num_sources=5)


def test_one_batch_is_too_few(fuser):
    with pytest.raises(PairError, match="at least two batches"):
        fuser.fit(planted(fuser, 1, noise=1.0))


def test_it_is_fitted_to_what_it_will_see(receiver, sharer, fuser):
    pair = CacheToCache(receiver, [sharer], [fuser])
    examples = [
        Encoder.of(pair).encode(Example([{"role": "user", "content": f"What is {i}?"}], "a number")) for i in range(6)
    ]
    inputs = []
    fuser.register_forward_pre_hook(lambda _, args, kvs: inputs.append(tuple(kvs.values())), with_kwargs=True)
    pair.prefill(stack([example.prompt for example in examples[:3]]))
    for given, read in zip(inputs[0], next(read_pairs(pair, examples, 3)), strict=True):
        assert_kv_equal(given, read)
    fit(pair, TrainSection(batch_size=2, steps=2), Dataset.from_list(list(map(to_columns, examples))))
    assert fuser.weight.max() <= 0.25
