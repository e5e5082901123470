import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from runs import write_recipe

from kvfuse.cache.transformers_cache import read_cache
from kvfuse.errors import PairError, RecipeError
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser, tiny_model
from kvfuse.training.data.columns import from_columns, to_columns
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.loop.batches import collate
from kvfuse.training.loop.loss import response_loss
from kvfuse.training.memory import precomputed_caches
from kvfuse.training.memory.precomputed_caches import PrecomputedCaches
from kvfuse.training.recipe import load_recipe
from kvfuse.training.run import train

EXAMPLES = [Example([{"role": "user", "content": f"What is {'x' * i}?"}], f"number {i}") for i in range(7)]


@pytest.fixture
def examples(pair):
    return Dataset.from_list([to_columns(Encoder.of(pair).encode(example)) for example in EXAMPLES])


@pytest.fixture
def keep(pair, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(precomputed_caches, "EXAMPLES_PER_FILE", 3)

    def make(receiver=False, dtype="bfloat16"):
        kept = PrecomputedCaches(pair, examples, tmp_path / f"{receiver}-{dtype}", receiver=receiver, dtype=dtype)
        kept.fill(batch_size=2)
        return kept

    return make


def close(got, expected, mask, tolerance):
    seen = mask.bool()
    for part in ("key", "value"):
        one, other = (getattr(kv, part).permute(1, 3, 0, 2, 4)[seen] for kv in (got, expected))
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_a_batch_gets_what_the_models_would_read(pair, examples, keep, dtype, tolerance):
    rows = [5, 0, 3]
    batch = collate([from_columns(examples[row]) for row in rows])
    kept, streams = keep(True, dtype).load(rows), pair.read(batch.prompt)
    close(kept.sharers[0], read_cache(streams.sharers[0]), batch.prompt.sharers[0].mask, tolerance)
    close(kept.receiver, read_cache(streams.receiver), batch.prompt.mask[:, :-1], 2**-8)


@pytest.mark.parametrize("both", [False, True])
@torch.no_grad()
def test_the_loss_is_that_of_reading(pair, examples, keep, both):
    rows = [from_columns(row) for row in examples]
    kept = keep(both).load(range(len(rows)))
    assert response_loss(pair, collate(rows, kept)).item() == pytest.approx(
        float(response_loss(pair, collate(rows))), rel=3e-3
    )


def test_no_model_reads_a_prompt_whose_cache_is_precomputed(pair, examples, keep, monkeypatch):
    rows, kept = [from_columns(examples[row]) for row in (1, 2)], keep(True).load([1, 2])
    expected = response_loss(pair, collate(rows)).item()
    monkeypatch.setattr(pair, "prefiller", None)
    with pytest.raises(TypeError):
        response_loss(pair, collate(rows))
    assert response_loss(pair, collate(rows, kept)).item() == pytest.approx(expected, rel=2e-3)


def test_files_that_are_there_are_not_read_again(keep, monkeypatch):
    folder = keep().folder
    assert sorted(file.name for file in folder.iterdir()) == [f"{shard:06d}.safetensors" for shard in range(3)]
    (folder / "000001.safetensors").unlink()
    written = []
    monkeypatch.setattr(PrecomputedCaches, "_write", lambda self, first, *others: written.append(first))
    keep()
    assert written == [3]


def test_the_size_is_told_before_anything_is_read(keep, monkeypatch):
    for receiver, dtype in ((False, "bfloat16"), (True, "bfloat16"), (False, "int8")):
        kept = keep(receiver, dtype)
        files = sum(file.stat().st_size for file in kept.folder.iterdir())
        assert kept.bytes == pytest.approx(files, rel=0.35), "but for names and padding of the format"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(RecipeError, match=r"GiB of room .* keep them as int8"):
        keep(True, "int8")


@pytest.fixture
def along(receiver, sharer):
    """A pair whose sharer reads the response along."""
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, fuse_response=True)])


def test_responses_that_are_fused_are_kept_too(along, tmp_path, monkeypatch):
    rows = [Encoder.of(along).encode(example) for example in EXAMPLES]
    columns = Dataset.from_list([to_columns(row) for row in rows])
    kept = PrecomputedCaches(along, columns, tmp_path, receiver=True, dtype="bfloat16")
    kept.fill(batch_size=2)
    files = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert kept.bytes == pytest.approx(files, rel=0.35)
    chosen = [4, 0, 6]
    examples, caches = [rows[row] for row in chosen], kept.load(chosen)
    expected = response_loss(along, collate(examples)).item()
    monkeypatch.setattr("kvfuse.stages.response_fusion.prefill", None)  # no model reads a response any more
    monkeypatch.setattr(along, "prefiller", None)
    assert response_loss(along, collate(examples, caches)).item() == pytest.approx(expected, rel=3e-3)


def test_responses_that_are_fused_need_both_models_caches(along, examples, tmp_path):
    with pytest.raises(PairError, match="keep_caches=both"):
        PrecomputedCaches(along, examples, tmp_path, receiver=False, dtype="int8")


def test_short_examples_are_read_together(pair, examples, keep, monkeypatch, capsys):
    one_by_one = keep(True)
    whole = one_by_one.load(range(len(examples)))
    monkeypatch.setattr(precomputed_caches, "TOKENS_PER_READ", 1)
    shutil.rmtree(one_by_one.folder)
    one_by_one.fill(batch_size=1)
    alone = one_by_one.load(range(len(examples)))
    for got, expected in zip((whole.receiver, *whole.sharers), (alone.receiver, *alone.sharers), strict=True):
        torch.testing.assert_close(got.key, expected.key, rtol=2**-7, atol=2**-7)
    assert "keeping caches: 100%" in capsys.readouterr().err


def test_a_receiver_with_state_is_refused(sharer, examples, tmp_path):
    receiver = tiny_model("qwen3_next")
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
    PrecomputedCaches(pair, examples, tmp_path, receiver=False, dtype="int8")
    with pytest.raises(PairError, match="in every layer"):
        PrecomputedCaches(pair, examples, tmp_path, receiver=True, dtype="int8")


def test_a_run_learns_the_same_and_leaves_no_caches(saved_models, tmp_path):
    recipe = write_recipe(tmp_path, saved_models, [f"number {i}" for i in range(10)])
    options = ["train.epochs=2", "train.learning_rate=0.01"]
    read = train(load_recipe(recipe, [*options, f"output={tmp_path / 'read'}"]), lambda line: None)
    for keep in ("sharer", "both"):
        extra = [*options, "train.keep_caches_as=int8", f"train.keep_caches={keep}", f"output={tmp_path / keep}"]
        kept = train(load_recipe(recipe, extra), lambda line: None)
        assert kept.fused == pytest.approx(read.fused, rel=2e-3)
        assert not list((tmp_path / keep).glob("caches*"))
