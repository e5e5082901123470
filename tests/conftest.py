import atexit
import logging
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(
    prefix="kvfuse-tests-"
)  # read when datasets is imported; also by commands

from pathlib import Path

import pytest
import torch

from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests run side by side; two processes with two threads each fight for two cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def receiver():
    return tiny_model("qwen3")


@pytest.fixture(scope="session")
def sharer():
    return tiny_model("llama", tiny_tokenizer(300, "lines"), num_hidden_layers=4, num_key_value_heads=4)


@pytest.fixture
def pair(receiver, sharer):
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])


@pytest.fixture(scope="session")
def shared():
    """Files too large for the repository; where they are not at hand, the tests that need them are skipped."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the model pair and texts in {SHARED.name}/ beside the checkout")
    return SHARED


@pytest.fixture
def undrawn(monkeypatch):
    """Figures stay empty in tests of reports that do not look at them: drawing takes most of the time."""
    monkeypatch.setattr("kvfuse.evaluation.report.write.svg", lambda figure, name: "<svg></svg>")


@pytest.fixture
def quiet_logs():
    """No warnings of lm-eval in the output of a test."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory, receiver, sharer):
    """Folders of the two tiny models, as a user has them."""
    folder = tmp_path_factory.mktemp("models")
    for name, one in (("receiver", receiver), ("sharer", sharer)):
        one.model.save_pretrained(folder / name)
        one.tokenizer.save_pretrained(folder / name)
    return folder
