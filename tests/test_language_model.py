"""Loading of models: from folders, GGUF files and the Hub, in whatever dtype and on whatever device."""

import json
import logging
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvfuse.backends import dtypes
from kvfuse.errors import PairError
from kvfuse.language_model import LanguageModel, load_config, load_tokenizer
from kvfuse.model import CacheToCache
from kvfuse.support.hub import SOURCE_OPTIONS, is_path
from kvfuse.testing import tiny_fuser

QUESTION = "What is the capital of Norway?"
ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
PARTLY_ON_DISK = ON_DISK | {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.fixture
def nested(saved_models, tmp_path):
    """A repository with its model in a folder inside."""
    shutil.copytree(saved_models / "receiver", tmp_path / "repository" / "hf")
    return tmp_path / "repository"


@pytest.fixture
def half(receiver, tmp_path):
    """A model whose weights are stored in bfloat16."""
    folder = tmp_path / "half"
    receiver.tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(receiver.model.config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def speeds(monkeypatch):
    """Sets how fast this machine multiplies matrices of each dtype."""

    def set_speeds(**speeds):
        monkeypatch.setattr(dtypes, "products_per_second", lambda dtype, device: speeds[str(dtype)[6:]])

    return set_speeds


def test_options_that_name_files_reach_model_tokenizer_and_configuration(monkeypatch, saved_models):
    given = dict.fromkeys(SOURCE_OPTIONS, None) | {"revision": "main", "subfolder": "", "token": "secret"}
    given = {name: value for name, value in given.items() if value is not None}
    seen = {}
    for cls in (AutoModelForCausalLM, AutoTokenizer, AutoConfig):
        load = cls.from_pretrained

        def spy(name, *args, _cls=cls, _load=load, **options):
            seen.setdefault(_cls.__name__, options)
            return _load(name, *args, **options)

        monkeypatch.setattr(cls, "from_pretrained", spy)
    LanguageModel.from_pretrained(saved_models / "receiver", **given)
    load_config(saved_models / "receiver", **given)
    assert len(seen) == 3
    for options in seen.values():
        assert given.items() <= options.items()


def test_a_subfolder_is_that_of_the_tokenizer_too(nested, receiver):
    model = LanguageModel.from_pretrained(nested, subfolder="hf")
    assert model.identity.weights == receiver.identity.weights
    assert model.identity.tokenizer == receiver.identity.tokenizer
    with pytest.raises(PairError, match="expected a causal language model"):
        LanguageModel.from_pretrained(nested)


def test_each_model_of_a_pair_may_have_its_own_options(nested, saved_models, receiver, sharer, tmp_path):
    tiny_fuser(receiver, sharer).save_pretrained(tmp_path / "fuser")
    names = {"receiver": nested, "sharer": saved_models / "sharer", "fuser": tmp_path / "fuser"}
    pair = CacheToCache.from_pretrained(**names, receiver_options={"subfolder": "hf"})
    assert pair.receiver.identity.weights == receiver.identity.weights


@pytest.mark.parametrize("load", [LanguageModel.from_pretrained, load_tokenizer, load_config])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./models/none", "no such folder"),
        ("{models}/receiver/config.json", "a file"),
        ("{models}", "expected"),
    ],
)
def test_what_is_no_model_is_named(load, name, message, saved_models):
    with pytest.raises(PairError, match=message) as caught:
        load(name.format(models=saved_models))
    assert "Repo id" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_repository_out_of_reach_is_no_wrong_name():
    with pytest.raises(PairError) as caught:
        load_config("gpt2")
    assert "check the name" not in str(caught.value)


def test_ids_of_repositories_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert [is_path(name) for name in ("gpt2", "Qwen/Qwen3-0.6B", "here", "./x", "~/x", "/x", "a/b/c")] == [
        False,
        False,
        *[True] * 5,
    ]


@pytest.mark.parametrize("devices", [PARTLY_ON_DISK, {"": "disk"}], ids=["partly", "wholly"])
def test_layers_on_disk_answer_as_those_in_memory(devices, receiver, sharer, saved_models, tmp_path):
    tiny_fuser(receiver, sharer).save_pretrained(tmp_path / "fuser")
    names = {"receiver": saved_models / "receiver", "sharer": saved_models / "sharer", "fuser": tmp_path / "fuser"}
    expected = CacheToCache.from_pretrained(**names).chat(QUESTION, max_new_tokens=8)
    offloaded = {"device_map": devices, "offload_folder": str(tmp_path / "offload")}
    sharer_devices = {**offloaded, "device_map": {"": "disk"}}
    pair = CacheToCache.from_pretrained(**names, **offloaded, sharer_options=sharer_devices)
    assert any(parameter.device.type == "meta" for parameter in pair.receiver.model.parameters())
    assert pair.device.type == "cpu"
    assert pair.chat(QUESTION, max_new_tokens=8) == expected


def test_half_precision_is_loaded_as_stored_where_it_is_fast(half, speeds, caplog):
    speeds(bfloat16=2.0, float32=1.0)
    with caplog.at_level(logging.WARNING, "kvfuse"):
        assert LanguageModel.from_pretrained(half).model.dtype == torch.bfloat16
    assert not caplog.messages


def test_half_precision_is_loaded_in_float32_where_it_is_slow(half, speeds, caplog):
    speeds(bfloat16=1.0, float32=2.0)
    with caplog.at_level(logging.WARNING, "kvfuse"):
        assert LanguageModel.from_pretrained(half).model.dtype == torch.float32
        assert LanguageModel.from_pretrained(half, dtype="auto").model.dtype == torch.float32
    assert [half.name in message and "bfloat16" in message for message in caplog.messages] == [True, True]


def test_a_dtype_that_is_asked_for_is_kept(half, speeds, caplog):
    speeds(bfloat16=1.0, float32=2.0)
    assert LanguageModel.from_pretrained(half, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert not caplog.messages


def test_only_cpus_are_asked(speeds):
    speeds(bfloat16=1.0, float32=2.0)
    assert dtypes.fast_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert dtypes.fast_dtype(torch.float32, torch.device("cpu")) == torch.float32


def test_the_speed_is_measured_once():
    dtypes.products_per_second.cache_clear()
    for _ in range(3):
        assert dtypes.products_per_second(torch.float32, torch.device("cpu")) > 1e6
    assert dtypes.products_per_second.cache_info().misses == 1


def test_identity_survives_another_place(saved_models, receiver, tmp_path):
    shutil.copytree(saved_models / "receiver", tmp_path / "moved")
    moved = LanguageModel.from_pretrained(tmp_path / "moved")
    assert json.dumps(moved.identity.to_dict()["weights"]) == json.dumps(receiver.identity.to_dict()["weights"])
    assert moved.name == str(tmp_path / "moved")
