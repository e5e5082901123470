"""The authors' format: read as they compute, refused where it is not whole, written so that it reads the same."""

import json
import os
import shutil

import published_parity
import pytest
import torch
from helpers import inputs_of
from torch.nn import functional as F
from typer.testing import CliRunner

from kvfuse.cache.kv import KV
from kvfuse.checkpoint import convert, load_fuser, save_fuser
from kvfuse.cli import app
from kvfuse.errors import CheckpointError, PairError
from kvfuse.fusers import FUSERS
from kvfuse.model import CacheToCache
from kvfuse.published.pairs import PUBLISHED_PAIRS
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer

KINDS = ["c2c", "c2c-complex"]
DEPTHS = {"c2c": {"num_layers": 4}, "c2c-complex": {"num_layers": 3, "weight_temperature": 0.7}}
QUESTION = "What is the capital of Norway?"


@pytest.fixture(scope="module")
def twin():
    """A sharer with the receiver's tokenizer, deeper and of another width."""
    return tiny_model("llama", num_hidden_layers=4, num_key_value_heads=4, seed=4)


@pytest.fixture(params=KINDS)
def fuser(request, receiver, twin):
    fuser = tiny_fuser(receiver, twin, request.param, dropout=0.1, **DEPTHS[request.param])
    for layer, logit in enumerate(fuser.gate.logit.data):
        logit.fill_((-1.0) ** layer)  # some closed, some open
    return fuser


@pytest.fixture
def folder(fuser, tmp_path):
    """The fuser as the authors would publish it."""
    return convert(save_fuser(fuser, tmp_path / "ours"), tmp_path / "theirs")


def flat(x):
    return x.transpose(1, 2).flatten(2)


def reference_c2c(state, part, mine, theirs):
    """One layer's residual by the names of a published file, in plain PyTorch."""

    def linear(name, x):
        return F.linear(x, state[f"{part}_{name}.weight"], state[f"{part}_{name}.bias"])

    def block(name, x):
        w1, w2, norm = (state[f"{part}_{name}.{leaf}.weight"] for leaf in ("w1", "w2", "norm"))
        return x + F.linear(F.gelu(F.linear(F.rms_norm(x, x.shape[-1:], norm, 1e-6), w1)), w2)

    hidden = block(
        "mlp1.blocks.0", linear("in", torch.cat([flat(getattr(theirs, part)), flat(getattr(mine, part))], -1))
    )
    weight = torch.sigmoid(linear("scalar_head", block("scalar_mlp2.blocks.0", hidden)))
    for i in range(2):
        hidden = block(f"proj_mlp2.blocks.{i}", hidden)
    heads = linear("proj_out", hidden).unflatten(-1, (weight.shape[-1], -1))
    return ((state[f"{part}_gate_logit"] > 0) * weight.unsqueeze(-1) * heads).transpose(1, 2)


def reference_complex(state, part, mine, theirs):
    """The same for an AllInOneProjector with the options of the authors' recipe."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def project(part):
        x = flat(getattr(theirs, part))
        for i in (0, 3):
            name = f"{part}_projection.layers"
            x = F.silu(linear(f"{name}.{i}.gate_proj", x)) * linear(f"{name}.{i}.up_proj", x)
            x = F.layer_norm(x, x.shape[-1:], state[f"{name}.{i + 1}.weight"], state[f"{name}.{i + 1}.bias"])
        x = linear(f"{part}_projection.layers.6", x)
        return linear(f"{part}_combiner", torch.cat([x, flat(getattr(mine, part))], -1))

    num_heads = mine.key.shape[1]
    keys = project("key").unflatten(-1, (num_heads, -1)).transpose(1, 2)
    hidden = linear("weight_hidden.layers.0", flat(torch.cat([mine.key, keys], -1)))
    hidden = F.layer_norm(
        hidden, hidden.shape[-1:], state["weight_hidden.layers.1.weight"], state["weight_hidden.layers.1.bias"]
    )
    weight = torch.sigmoid(linear(f"{part}_weight_head", linear("weight_hidden.layers.4", F.gelu(hidden))) / 0.7)
    heads = project(part).unflatten(-1, (num_heads, -1))
    return ((state["gate_logit"] > 0) * weight.unsqueeze(-1) * heads).transpose(1, 2)


REFERENCES = {"c2c": reference_c2c, "c2c-complex": reference_complex}


def test_residuals_equal_those_of_the_published_formula(fuser, folder):
    mine, theirs = inputs_of(fuser, batch=1)
    residual = load_fuser(folder)(receiver=mine, sharer=theirs)
    reference = REFERENCES[next(kind for kind in KINDS if type(fuser) is FUSERS[kind])]
    for layer, sharer_layer in enumerate(fuser.config.layers):
        state = torch.load(folder / "final" / f"projector_{layer}.pt", weights_only=True)
        one = KV(mine.key[layer], mine.value[layer]), KV(theirs.key[sharer_layer], theirs.value[sharer_layer])
        for part in ("key", "value"):
            torch.testing.assert_close(
                getattr(residual, part)[layer], reference(state, part, *one), rtol=1e-5, atol=1e-6
            )


def test_there_and_back_is_the_same_fuser(fuser, folder, tmp_path):
    back = load_fuser(convert(folder, tmp_path / "back"))
    assert {name: value.tolist() for name, value in back.state_dict().items()} == {
        name: value.tolist() for name, value in fuser.state_dict().items()
    }
    assert back.config.layers == fuser.config.layers
    assert back.config.receiver["name"] == fuser.config.receiver["name"]
    assert (tmp_path / "back" / "model.safetensors").is_file()
    assert not list((tmp_path / "back").glob("*.pt"))


def test_a_pair_answers_through_it_as_through_ours(fuser, folder, receiver, twin):
    ours, theirs = (CacheToCache(receiver, [twin], [one]) for one in (fuser, load_fuser(folder.parent, folder.name)))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(QUESTION, **options), theirs.generate(QUESTION, **options))


def test_a_shared_projector_and_a_checkpoint_folder(fuser, folder):
    (folder / "final").rename(folder / "checkpoint-20")
    shutil.copytree(folder / "checkpoint-20", folder / "checkpoint-100")
    mapping = {"0": {"1": {"0": [[0, 1]], "1": [[0, 1], [2, 2]], "2": [[3, 2]]}}}
    (folder / "checkpoint-100" / "projector_config.json").write_text(json.dumps(mapping))
    read = load_fuser(folder)
    assert read.config.layers == [0, 0, 3]
    mine, theirs = inputs_of(fuser, batch=1)
    same = KV(mine.key[:1].expand_as(mine.key), mine.value[:1].expand_as(mine.value))
    residual = read(receiver=same, sharer=theirs)
    assert torch.equal(residual.key[0], residual.key[1]), "both are served by projector 1 and sharer layer 0"


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def reshape(path):
    state = torch.load(path, weights_only=True)
    name = next(name for name, tensor in state.items() if tensor.ndim == 2)
    torch.save({**state, name: torch.zeros(3, 5)}, path)


def poison(path, value):
    state = torch.load(path, weights_only=True)
    name = next(name for name, tensor in state.items() if tensor.ndim == 2)
    state[name][0, 0] = value
    torch.save(state, path)


DAMAGE = {
    "NaN": (lambda place: poison(place / "projector_1.pt", torch.nan), r"projector_1\.pt, got NaN or infinity in \S+"),
    "infinity": (lambda place: poison(place / "projector_2.pt", -torch.inf), r"projector_2\.pt, got NaN or infinity"),
    "missing": (lambda place: (place / "projector_1.pt").unlink(), "no such file"),
    "renamed": (lambda place: (place / "projector_1.pt").rename(place / "projector_7.pt"), "projector_1.pt"),
    "truncated": (lambda place: os.truncate(place / "projector_1.pt", 700), "cannot be read safely"),
    "empty": (lambda place: (place / "projector_1.pt").write_bytes(b""), "cannot be read safely"),
    "malicious": (lambda place: torch.save({"x": Malicious()}, place / "projector_0.pt"), "cannot be read safely"),
    "no state": (lambda place: torch.save([torch.ones(1)], place / "projector_0.pt"), "named tensors"),
    "fewer tensors": (
        lambda place: torch.save({"key_in.weight": torch.ones(1)}, place / "projector_0.pt"),
        "differs in",
    ),
    "other sizes": (lambda place: reshape(place / "projector_2.pt"), "do not belong together"),
    "no arguments": (lambda place: (place / "projector_1.json").unlink(), "projector_1.json"),
    "unequal arguments": (lambda place: edit(place / "projector_1.json", init_args={}), "one class and size"),
    "unknown class": (
        lambda place: [edit(place / f"projector_{i}.json", **{"class": "TrivialProjector"}) for i in range(3)],
        "TrivialPr",
    ),
    "no sizes": (
        lambda place: [edit(place / f"projector_{i}.json", init_args={}) for i in range(3)],
        "expected arguments",
    ),
    "no mapping": (lambda place: (place / "projector_config.json").unlink(), "projector_config.json"),
    "odd mapping": (
        lambda place: (place / "projector_config.json").write_text('{"0": {"1": {"1": [[0, 0]]}}}'),
        "of the form",
    ),
    "no recipe": (lambda place: (place.parent / "config.json").unlink(), "config.json"),
    "odd recipe": (lambda place: (place.parent / "config.json").write_text('{"model": 3}'), "base_model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_refused_in_one_line(folder, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harm, told = DAMAGE[damage]
    harm(folder / "final")
    with pytest.raises(CheckpointError, match=told) as caught:
        load_fuser(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_options_that_ours_does_not_know_are_named(receiver, twin, tmp_path):
    ours = save_fuser(tiny_fuser(receiver, twin, "c2c-complex"), tmp_path / "ours")
    folder = convert(ours, tmp_path / "theirs")
    for path in (folder / "final").glob("projector_?.json"):
        edit(path, init_args={**json.loads(path.read_text())["init_args"], "gate_granularity": "token"})
    with pytest.raises(CheckpointError, match="gate_granularity='token'"):
        load_fuser(folder)


@pytest.mark.parametrize("options", [{}, {"token_alignment": "identity", "fuse": "messages"}])
def test_what_the_published_format_cannot_hold_is_not_written(receiver, sharer, options, tmp_path):
    ours = save_fuser(tiny_fuser(receiver, sharer, **options), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="published format"):
        convert(ours, tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_another_pair_is_refused(folder, receiver, sharer, twin):
    read = load_fuser(folder)
    with pytest.raises(PairError, match="receiver with 3 layers x 2 KV heads x 12"):
        CacheToCache(tiny_model("llama"), [twin], [read])
    with pytest.raises(PairError, match="sharer with 4 layers x 4 KV heads x 8"):
        CacheToCache(receiver, [tiny_model("llama", num_hidden_layers=5, num_key_value_heads=4)], [read])


def test_a_sharer_that_lacks_ids_of_the_receiver_is_refused(folder, receiver):
    small = tiny_model("llama", tiny_tokenizer(300), num_hidden_layers=4, num_key_value_heads=4)
    with pytest.raises(PairError, match=r"320 token ids, got .* with 300"):
        CacheToCache(receiver, [small], [load_fuser(folder)])


def test_pickles_are_downloaded_only_for_a_published_pair(folder, fuser, tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns=None, ignore_patterns=None, **options):
        asked.append((allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("kvfuse.fusers.folder.snapshot_download", download)
    load_fuser("someone/fusers", "theirs")
    assert [allowed for allowed, _ in asked] == ["theirs/*"] * 2
    assert "*.pt" in asked[0][1]
    assert asked[1][1] == "*/training_state.pt"
    asked.clear()
    load_fuser("someone/fusers", "ours")
    assert len(asked) == 1


def test_models_and_alignment_come_from_the_recipe(folder):
    model = json.loads((folder / "config.json").read_text())["model"]
    for aligned, strategy, expected in (
        (False, "first", ("identity", "all")),
        (True, "first", ("reencode-first", "messages")),
        (True, "longest", ("reencode-longest", "messages")),
    ):
        edit(
            folder / "config.json",
            model={**model, "base_model": "R", "is_do_alignment": aligned, "alignment_strategy": strategy},
        )
        config = load_fuser(folder).config
        assert (config.receiver["name"], config.token_alignment, config.fuse) == ("R", *expected)


def test_convert_on_the_command_line(folder, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(tmp_path), str(tmp_path / "again"), "--subfolder", folder.name])
    assert result.exit_code == 0, result.output
    assert load_fuser(tmp_path / "again").config.receiver["name"] == load_fuser(folder).config.receiver["name"]
    with pytest.raises(CheckpointError, match="new folder"):
        convert(tmp_path / "again", folder)


def test_a_fuser_is_replaced_only_where_asked(folder, tmp_path):
    ours = convert(folder, tmp_path / "again")
    for source, target in ((folder, ours), (ours, folder)):
        for options in ([], ["--overwrite"]):
            result = CliRunner().invoke(app, ["convert", str(source), str(target), *options])
            assert (result.exit_code == 0) == bool(options)
    (folder / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match="new folder"):
        convert(ours, folder, overwrite=True)
    assert (folder / "notes.md").read_text() == "mine"


def test_pairs_are_listed_with_their_sources():
    text = CliRunner().invoke(app, ["list", "pairs"]).output
    assert all(pair.folder in text for pair in PUBLISHED_PAIRS)
    assert len(PUBLISHED_PAIRS) == 8
    assert all("arXiv" in pair.authors for pair in PUBLISHED_PAIRS)


SHAPES = {  # layers, KV heads, head dimension, as the models' own configurations tell
    "Qwen/Qwen3-0.6B": (28, 8, 128),
    "Qwen/Qwen3-1.7B": (28, 8, 128),
    "Qwen/Qwen3-4B": (36, 8, 128),
    "Qwen/Qwen3-4B-Base": (36, 8, 128),
    "Qwen/Qwen3-8B": (36, 8, 128),
    "Qwen/Qwen2.5-0.5B-Instruct": (24, 2, 64),
    "Qwen/Qwen2.5-1.5B-Instruct": (28, 2, 128),
    "Qwen/Qwen2.5-Math-1.5B": (28, 2, 128),
    "Qwen/Qwen2.5-7B-Instruct": (28, 4, 128),
    "meta-llama/Llama-3.2-1B-Instruct": (16, 8, 64),
}


@pytest.mark.parametrize("pair", PUBLISHED_PAIRS, ids=lambda pair: pair.folder)
def test_listed_sizes_are_those_of_our_fuser(pair):
    identities = {
        whose: {
            "name": name,
            "kv": dict(
                zip(
                    ("num_layers", "num_kv_heads", "key_dim", "value_dim"),
                    (*SHAPES[name], SHAPES[name][2]),
                    strict=True,
                )
            ),
        }
        for whose, name in (("receiver", pair.receiver), ("sharer", pair.sharer))
    }
    with torch.device("meta"):
        fuser = FUSERS["c2c"](FUSERS["c2c"].config_class(**identities))
    assert sum(parameter.numel() for parameter in fuser.parameters()) == pair.parameters


@pytest.mark.parametrize("name", ["shallow_sharer", "two_sharers"])
def test_parity_with_the_reference(shared, name, capsys):
    assert published_parity.main(shared / "fixtures" / "published_fuser" / name) == 0, capsys.readouterr().out
