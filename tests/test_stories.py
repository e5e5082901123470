"""A real pair that nobody here trained: two story tellers with different tokenizers, depths and KV shapes."""

import json

import pytest
from typer.testing import CliRunner

from kvfuse.cli import app
from kvfuse.model import CacheToCache


@pytest.mark.slow
def test_a_sharer_that_has_read_the_story_saves_the_receiver_bits(shared, tmp_path):
    overrides = {
        "receiver": shared / "models/stories260K",
        "sharer": shared / "models/stories3M",
        "data.path": shared / "data/tinystories/tinystories_train_first2MB.txt",
        "output": tmp_path / "run",
    }
    words = [f"{key}={value}" for key, value in overrides.items()]
    result = CliRunner().invoke(app, ["train", "recipes/stories.yaml", *words], catch_exceptions=False)
    assert result.exit_code == 0
    gain = json.loads((tmp_path / "run" / "result.json").read_text())
    assert gain["examples"] > 50
    assert gain["fused"] < 0.96 * gain["receiver"]
    pair = CacheToCache.from_pretrained(fuser=tmp_path / "run" / "fuser")
    assert len(pair.chat("Once upon a time there was a little", max_new_tokens=20, do_sample=False)) > 20
