"""The benchmarks run on tiny models and tell what they promise; no time is held against anything."""

import json

import pytest
import torch

from benchmarks import follow, gpu
from benchmarks.asking import end_to_end_rows, first_token_rows
from benchmarks.case import BARS
from benchmarks.decoding import decode_rows
from benchmarks.drawing import draw
from benchmarks.fusing import bare_products, fuse_rows, growth_rows
from benchmarks.machine import Machine, Work, grouped_weights
from benchmarks.memory import memory_rows
from benchmarks.pairs import prompt_for, random_caches
from benchmarks.rows import line, markdown, report
from benchmarks.suite import FULL, GPU, QUICK, Case, Planned, measure, training_rows
from benchmarks.timing import in_turns, least, ratio, total
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.demo import load_pair
from kvfuse.model import CacheToCache
from kvfuse.support.plots import save
from kvfuse.testing import tiny_fuser, tiny_model

PLAN = (
    Planned("true", 1, 256, 2, (fuse_rows, first_token_rows, decode_rows, end_to_end_rows, memory_rows)),
    Planned("true", 2, 12, 1),
    Planned("true", 1, 4096, 1, (growth_rows,)),
    Planned("true", 1, 512, 1, (training_rows,)),
)
KEYS = {"figure", "setting", "value", "bar", "unit"}
MACHINE = Machine(flops=1e9, bandwidth=1e9)


@pytest.fixture(scope="module")
def same_ids():
    receiver, sharer = (tiny_model(family, max_position_embeddings=8192) for family in ("qwen3", "qwen2"))
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])


@pytest.fixture(scope="module")
def rows(same_ids, tmp_path_factory):
    """Of the whole plan, without the fastest products, which take a second."""
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "measured", lambda like: MACHINE)
        told = report(measure(PLAN, lambda shapes: same_ids), file)
    assert json.loads(file.read_text()) == told
    return told


def test_rows_have_the_promised_keys(rows):
    for found in rows:
        assert set(found) in (KEYS, KEYS | {"low", "high"})
        assert "low" not in found or found["low"] <= found["value"] <= found["high"]
        assert found["figure"] in line(found)
    assert len({(found["figure"], found["setting"]) for found in rows}) == len(rows)


def test_bars_are_told_where_they_hold(rows):
    bars = {(found["figure"], found["setting"]): found["bar"] for found in rows if found["bar"] is not None}
    here = {
        (figure, f"true, 1 x {tokens} tokens"): bar for figure, of_it in BARS.items() for tokens, bar in of_it.items()
    }
    assert all(here[case] == bar for case, bar in bars.items() if "training" not in case[1])
    only_in_full = {f"true, 1 x {tokens} tokens" for tokens in (64, 1024, 4096)}
    assert {setting for _, setting in here.keys() - bars.keys()} <= only_in_full
    assert ("fuse per token, 4096 / 256", "true, 1 x 4096 tokens") in bars


def test_both_plans_measure_every_bar():
    for plan in (QUICK, FULL):
        seen = {(one.tokens, group) for one in plan for group in one.groups if one.shapes == "true"}
        assert {
            (256, group) for group in (fuse_rows, first_token_rows, decode_rows, end_to_end_rows, memory_rows)
        } <= seen
        assert (4096, growth_rows) in seen


def test_rows_are_drawn_and_made_a_table(rows, tmp_path):
    save(draw(rows), tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert len(markdown(rows).splitlines()) == 2 + len(rows)


def test_followed_responses_have_rows(monkeypatch):
    monkeypatch.setattr(follow, "SIZES", {"max_position_embeddings": 512})
    monkeypatch.setattr(follow, "NEW_TOKENS", 2)
    monkeypatch.setattr(follow, "REPEATS", 1)
    for own_tokenizer in (False, True):
        assert [found["unit"] for found in follow.follow_rows(20, own_tokenizer)] == ["ms", "ms", "ms", "x"]


def test_answers_on_a_gpu_have_rows_wherever_they_run(same_ids, monkeypatch):
    monkeypatch.setattr(gpu, "ANSWER_TOKENS", 3)
    case = Case("true", same_ids, 1, 20, 2, MACHINE)
    figures = [found["figure"] for group in (gpu.gpu_first_token_rows, gpu.static_rows) for found in group(case)]
    assert "first token / receiver's, captured" in figures
    assert "3 tokens, C2C, static, captured" in figures
    assert len(set(figures)) == len(figures)


def test_every_bar_of_a_gpu_is_measured():
    measured = {group for one in GPU for group in one.groups if one.tokens == 256 and one.batch == 1}
    assert {gpu.gpu_fuse_rows, gpu.gpu_folded_rows, gpu.gpu_first_token_rows} <= measured


def test_bare_products_are_those_of_the_fuser(same_ids):
    """Of all tokens but each prompt's last, one group at a time or all at once."""
    case = Case("tiny", same_ids, 2, 8, 1, MACHINE)
    weights = grouped_weights(same_ids.fusers[0])
    assert Work.of_fusing(same_ids, case.prompt).flops == 2 * 2 * 7 * sum(weight.numel() for weight in weights)
    with torch.no_grad():
        assert all(run() > 0 for run in bare_products(case).values())


def test_random_caches_are_shaped_like_those_that_are_read(same_ids):
    with torch.no_grad():
        for pair in (same_ids, load_pair()):
            prompt = prompt_for(pair, 2, 12)
            read, made = pair.read(prompt), random_caches(pair, prompt)
            for one, other in zip((read.receiver, *read.sharers), (made.receiver, *made.sharers), strict=True):
                assert read_cache(one).key.shape == read_cache(other).key.shape


def test_rounds_are_compared_one_by_one():
    clock = iter((4.0, 2.0, 9.0, 3.0))
    taken = in_turns({"one": lambda: next(clock), "other": lambda: next(clock)}, 2)
    assert taken == {"one": [4.0, 9.0], "other": [2.0, 3.0]}
    assert (ratio(*taken.values()), total(*taken.values()), least(*taken.values())) == (
        [2.0, 3.0],
        [6.0, 12.0],
        [2.0, 3.0],
    )
