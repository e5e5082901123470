import pytest
import torch

from kvfuse.analysis.layers import FusedLayers, run
from kvfuse.analysis.study import Study
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.methods import Fused
from kvfuse.prompts.alignment import stack


@pytest.fixture(scope="module")
def study():
    return Study.tiny("llama")


@torch.no_grad()
def cache(study, fusers):
    prompt = stack([study.pair.align(one.prompt) for one in study.questions])
    return read_cache(study.pair.prefill(prompt, fusers=fusers))


def test_each_layer_is_fused_or_the_receivers(study):
    full, none = cache(study, None), cache(study, [])
    assert not torch.equal(full.key[0], none.key[0])
    for chosen in ([], [0], [2], [0, 2], [0, 1, 2]):
        mixed = cache(study, FusedLayers(study.pair, chosen).fusers)
        for layer in range(3):
            expected = full if layer in chosen else none
            assert torch.equal(mixed.key[layer], expected.key[layer])
            assert torch.equal(mixed.value[layer], expected.value[layer])


def test_all_layers_are_cache_to_cache(study):
    prompts, options = [one.prompt for one in study.questions], {"max_new_tokens": 6, "do_sample": False}
    in_layers, fused = (
        method.reply(prompts, **options) for method in (FusedLayers(study.pair, range(3)), Fused(study.pair))
    )
    assert in_layers == fused


def test_each_layer_is_asked_alone_and_left_out(study):
    figures = run(study).figures
    assert [len(figures[name]) for name in ("alone", "without")] == [3, 3]
    bits = {figures[name]["bits_per_character"] for name in ("none", "all")} | {
        one["bits_per_character"] for one in figures["alone"]
    }
    assert len(bits) == 5
