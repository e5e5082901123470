"""A real pair that nobody here trained: two story tellers with different tokenizers, depths and KV shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvfuse.model import CacheToCache

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_sharer_that_reads_the_story_along_saves_the_receiver_bits(shared, tmp_path):
    overrides = {
        "receiver": shared / "models/stories260K",
        "sharer": shared / "models/stories3M",
        "data.path": shared / "data/tinystories/tinystories_train_first2MB.txt",
        "output": tmp_path / "run",
    }
    words = [f"{key}={value}" for key, value in overrides.items()]
    subprocess.run(
        [sys.executable, "-m", "kvfuse.cli", "train", "recipes/stories.yaml", *words], cwd=ROOT, check=True
    )  # on all cores
    gain = json.loads((tmp_path / "run" / "result.json").read_text())
    assert gain["examples"] > 100
    assert gain["fused"] < 0.96 * gain["receiver"]
    assert gain["fused"] < gain["mismatched"], "it is this story that the sharer must have read"
    pair = CacheToCache.from_pretrained(fuser=tmp_path / "run" / "fuser")
    assert len(pair.chat("Once upon a time there was a little", max_new_tokens=20, do_sample=False)) > 20
