import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_tensors
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from kvfuse.cache.transformers_cache import CACHE
from kvfuse.checkpoint import load_fuser, save_fuser
from kvfuse.errors import CheckpointError
from kvfuse.fusers import FUSERS, Fuser
from kvfuse.fusers.folder import model_card
from kvfuse.language_model import _sample
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.support.files import write_folder
from kvfuse.testing import tiny_fuser

PROMPT = [{"role": "user", "content": "What is the capital of Norway?"}]


@pytest.fixture(params=FUSERS)
def fuser(request, receiver, sharer):
    return tiny_fuser(receiver, sharer, request.param)


@pytest.fixture
def folder(fuser, tmp_path):
    return save_fuser(fuser, tmp_path / "fuser")


def logits(pair):
    prompt = stack([pair.align(PROMPT)])
    return pair.receiver.model(prompt.ids[:, -1:], **{CACHE: pair.prefill(prompt)}).logits


def test_save_and_load_give_the_same_logits(fuser, folder, receiver, sharer):
    before, after = (CacheToCache(receiver, [sharer], [one]) for one in (fuser, load_fuser(folder)))
    assert torch.equal(logits(before), logits(after))


def test_the_folder_holds_the_fusers_own_weights_a_config_and_a_card(fuser, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert load_file(folder / "model.safetensors").keys() == fuser.state_dict().keys()
    assert fuser.config.sharer["name"] in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        ("Qwen/Qwen3-0.6B", "org/other", ["Qwen/Qwen3-0.6B", "org/other"]),
        ("models/mine", "org/other", ["org/other"]),
        ("mine", "/a/b", None),
    ],
)
def test_the_card_names_to_the_hub_those_models_that_are_there(fuser, tmp_path, monkeypatch, mine, theirs, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    fuser.config.receiver, fuser.config.sharer = (
        {**fuser.config.receiver, "name": mine},
        {**fuser.config.sharer, "name": theirs},
    )
    data = ModelCard(model_card(fuser)).data
    assert (data.base_model, data.library_name, data.tags) == (told, "kvfuse", ["cache-to-cache"])


def test_saving_again_replaces_the_fuser(fuser, folder):
    fuser.gate.logit.data.fill_(-3)
    save_fuser(fuser, folder)
    assert (load_fuser(folder).gate.logit == -3).all()
    assert [path.name for path in folder.parent.iterdir()] == ["fuser"], "nothing is left beside it"


def test_a_failed_save_leaves_the_old_folder(folder):
    def fail(fresh):
        (fresh / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="disk full"):
        write_folder(folder, fail)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["fuser"]


def test_a_folder_of_other_things_is_not_replaced(fuser, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="other files"):
        save_fuser(fuser, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        load_fuser(folder)


@pytest.mark.parametrize("kept", [0, 7, 200, -100])
def test_truncated_weights_are_named(folder, kept):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated"):
        load_fuser(folder)


def test_a_pickle_is_never_opened(fuser, folder):
    (folder / "model.safetensors").unlink()
    torch.save(fuser.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"the pickle pytorch_model\.bin"):
        load_fuser(folder)


def test_a_pickle_under_the_name_of_safetensors_is_never_opened(fuser, folder):
    torch.save(fuser.state_dict(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load_fuser(folder)


def test_tensors_of_another_fuser_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    save_file(
        {**{key: value for key, value in weights.items() if key != name}, "stranger": torch.zeros(1)},
        folder / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match="other tensors"):
        load_fuser(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(fuser, folder, value, which, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    name = list(weights)[which]
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_fuser, Fuser.from_pretrained, type(fuser).from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=rf"got NaN or infinity in {re.escape(name)} "):
            load(folder)


def test_a_weight_too_large_for_the_dtype_asked_for_is_named(fuser, folder):
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_fuser(folder).dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"\(float16\)"):
        load_fuser(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    "config", ["{", "{}", json.dumps({"model_type": "qwen3"}), json.dumps({"model_type": "nonsense"})]
)
def test_a_config_of_something_else_is_named(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="expected"):
        load_fuser(folder)


def test_a_fuser_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_fuser(tmp_path / "nothing")


def test_from_pretrained_finds_the_pair_in_the_fuser(saved_models, tmp_path):
    from kvfuse.language_model import LanguageModel

    receiver, sharer = (LanguageModel.from_pretrained(saved_models / name) for name in ("receiver", "sharer"))
    save_fuser(tiny_fuser(receiver, sharer), tmp_path / "fuser")
    named = CacheToCache.from_pretrained(fuser=tmp_path / "fuser")
    given = CacheToCache.from_pretrained(
        receiver=saved_models / "receiver", sharer=saved_models / "sharer", fuser=tmp_path / "fuser"
    )
    assert torch.equal(logits(named), logits(given))


def test_the_last_weight_of_a_large_embedding_is_sampled():
    """155,582,464 of them, as Qwen3-0.6B's: float32 has no number for the last place."""
    weights = torch.empty(1, dtype=torch.bfloat16).expand(151936, 1024)
    assert len(_sample(weights.as_strided((151936 * 1024,), (0,)))) == 4


# As users of transformers and peft expect it


def test_the_base_class_loads_any_kind(fuser, folder):
    loaded = Fuser.from_pretrained(folder)
    assert type(loaded) is type(fuser)
    assert not loaded.training
    assert_same_tensors(loaded.state_dict(), fuser.state_dict())


def test_a_class_refuses_the_folder_of_another_kind(receiver, sharer, tmp_path):
    save_fuser(tiny_fuser(receiver, sharer, "low-rank"), tmp_path / "fuser")
    with pytest.raises(CheckpointError, match=r"expected a C2CFuser in .*, got a LowRankFuser"):
        FUSERS["c2c"].from_pretrained(tmp_path / "fuser")


def test_save_pretrained_writes_the_card_and_is_whole_or_nothing(fuser, tmp_path, monkeypatch):
    fuser.save_pretrained(tmp_path / "fuser", notes="It was measured.")
    assert "It was measured." in (tmp_path / "fuser" / "README.md").read_text()
    before = {path.name: path.read_bytes() for path in (tmp_path / "fuser").iterdir()}
    monkeypatch.setattr("kvfuse.fusers.folder.model_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuser.save_pretrained(tmp_path / "fuser")
    assert {path.name: path.read_bytes() for path in (tmp_path / "fuser").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["fuser"]


def test_other_files_beside_a_fuser_are_kept(fuser, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "run.txt").write_text("mine too")
    fuser.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "logs" / "run.txt").read_text() == "mine too"


def test_a_models_folder_is_not_replaced(fuser, saved_models):
    before = sorted(path.name for path in (saved_models / "receiver").iterdir())
    with pytest.raises(CheckpointError, match="new or hold a fuser"):
        fuser.save_pretrained(saved_models / "receiver")
    assert sorted(path.name for path in (saved_models / "receiver").iterdir()) == before


def test_push_to_hub_uploads_weights_configuration_and_card(fuser, monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            uploaded["private"] = private
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **options):
            uploaded.update(repo=repo_id, files={path.name: path.read_bytes() for path in folder_path.iterdir()})
            return "the commit"

    monkeypatch.setattr("kvfuse.fusers.base.HfApi", Hub)
    assert fuser.push_to_hub("my-fuser", notes="Measured: 7.", private=True, token="secret") == "the commit"
    assert (uploaded["repo"], uploaded["private"], uploaded["token"]) == ("me/my-fuser", True, "secret")
    assert uploaded["files"].keys() == {"config.json", "model.safetensors", "README.md"}
    card = uploaded["files"]["README.md"].decode()
    assert "Measured: 7." in card
    assert ModelCard(card).data.library_name == "kvfuse"


def test_what_trains_is_shown_as_in_peft(receiver, sharer, capsys):
    fuser = tiny_fuser(receiver, sharer)
    fuser.gate.requires_grad_(False)
    total, gates = sum(parameter.numel() for parameter in fuser.parameters()), fuser.gate.logit.numel()
    fuser.print_trainable_parameters()
    assert f"trainable params: {total - gates:,} || all params: {total:,} || trainable%:" in capsys.readouterr().out
