"""Fusers with integer weights: what is lost, that nothing else is, and what they refuse."""

import copy
import json
import shutil

import pytest
import torch
from helpers import assert_kv_equal, assert_same_tensors, inputs_of
from safetensors.torch import load_file
from transformers import AutoModel

from kvfuse.checkpoint import convert, load_fuser, save_fuser
from kvfuse.checkpoint import quantize as quantize_folder
from kvfuse.errors import CheckpointError, PairError, RecipeError
from kvfuse.fusers import FUSERS, FuserConfig, quantize
from kvfuse.fusers.base import Fuser
from kvfuse.fusers.execution.quantized import (
    FORMATS,
    MIN_OUTPUTS,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    cpu_multiplies_int8,
)
from kvfuse.fusers.folder import size_of
from kvfuse.fusers.layers import GroupedLinear
from kvfuse.fusers.registry import class_of
from kvfuse.methods import make_method
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser
from kvfuse.training.closed_form import fit
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.recipe import load_recipe

needs_int8 = pytest.mark.skipif(not cpu_multiplies_int8(), reason="needs a CPU that multiplies int8")
SHAPES = [(64, 16), (41, 17), (176, 48), (1, 20), (130, 33)]  # inputs, outputs: whole blocks, odd ones, a single input
# Evenly drawn weights are off by 1 / (2 * largest level) of their size: 0.4% in int8, 7% in int4.
# Tokens in int8 are off by about 0.6%.
# What is off in one layer is independent of what is in the next, so that six in a row are off by sqrt(6) as much.
LOST = {"int8": 0.02, "int4": 0.2}


def linear_of(inputs, outputs, weights, dtype=torch.float32, groups=3, bias=True):
    """A linear layer and its quantised copy."""
    torch.manual_seed(0)
    linear = GroupedLinear(groups, inputs, outputs, bias).to(dtype)
    linear.reset_parameters()
    small = FORMATS[weights](groups, inputs, outputs, bias).to(dtype)
    state = linear.state_dict()
    small.load_state_dict(small.rounded(state.pop("weight")) | state)
    return linear, small


def by_floats(monkeypatch):
    monkeypatch.setattr("kvfuse.fusers.execution.quantized.cpu_multiplies_int8", lambda: False)


def apart(one, other):
    """How far one residual is from another, as a share of the other."""
    parts = [(getattr(one, part).detach(), getattr(other, part).detach()) for part in ("key", "value")]
    return max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in parts)


@pytest.fixture(params=FORMATS)
def weights(request):
    return request.param


@pytest.fixture(params=FUSERS)
def full(request, receiver, sharer):
    return tiny_fuser(receiver, sharer, request.param)


@pytest.fixture
def small(full, weights):
    return quantize(full, weights)


@pytest.fixture
def inputs(full):
    return inputs_of(full)


@pytest.fixture
def small_pair(receiver, sharer, weights):
    return CacheToCache(receiver, [sharer], [quantize(tiny_fuser(receiver, sharer), weights)])


# One layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_off_by_half_a_step_at_most(shape, weights, dtype):
    linear, small = linear_of(*shape, weights, dtype)
    steps = (
        small.scale
        if weights == "int8"
        else (small.steps * small.scale[:, None]).expand(-1, -1, 2 * small.levels.shape[2], -1)
    )
    steps = steps if weights == "int8" else steps.flatten(1, 2)[:, : shape[0]]
    off = (small.integers() * small.scale.float() - linear.weight.float()).abs()
    assert small.integers().dtype == torch.int8
    assert (off <= 0.505 * steps.float() + 1e-9).all(), "the half more is the scale's own rounding"


def test_scales_of_bfloat16_cost_nothing(weights):
    linear, small = linear_of(1024, 64, weights, torch.bfloat16)
    exact = GroupedLinear(3, 1024, 64).requires_grad_(False)
    exact.weight.copy_(linear.weight.detach())
    tight = FORMATS[weights](3, 1024, 64)
    tight.load_state_dict(tight.rounded(exact.weight), strict=False)
    lost = [float((one.integers() * one.scale.float() - exact.weight).norm()) for one in (small, tight)]
    assert lost[0] == pytest.approx(lost[1], rel=0.01)


def test_outputs_without_weight_stay_zero(weights):
    small = FORMATS[weights](1, 8, 16, bias=False)
    small.reset_parameters(zero=True)
    assert not small(torch.randn(1, 4, 8)).any()
    assert not linear_of(8, 16, weights, bias=False)[1](torch.zeros(3, 4, 8)).any(), (
        "nor do tokens of zero divide by it"
    )


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_multiply_what_tokens_are_rounded_to(shape, weights, bias):
    """The product is exact: it is that of the rounded tokens and the weight, but for float32's own rounding."""
    _, small = linear_of(*shape, weights, bias=bias)
    x = torch.randn(3, 5, shape[0])
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / step).round() * step).double() @ small.weight.double() + (small.bias.double() if bias else 0)
    torch.testing.assert_close(small._multiply_integers(x).double(), expected, rtol=1e-5, atol=1e-5)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_to_multiply_agree(monkeypatch, weights, dtype):
    _, small = linear_of(176, 48, weights, dtype)
    x = torch.randn(3, 5, 176, dtype=dtype)
    integers = small._multiply_integers(x)
    by_floats(monkeypatch)
    floats = small(x)
    half_a_step = x.abs().amax(-1, keepdim=True).float() / 254
    most = half_a_step * small.weight.float().abs().sum(1, keepdim=True)  # were every input off by as much as it can be
    assert integers.dtype == floats.dtype == dtype
    assert ((integers - floats).abs() <= most + 2 * torch.finfo(dtype).eps * floats.abs().amax()).all()


def test_integer_products_depend_on_device_processor_and_gradient(monkeypatch, weights):
    _, small = linear_of(32, 16, weights)
    taken = []
    monkeypatch.setattr(QuantizedLinear, "_multiply_integers", lambda self, x: taken.append("integers"))
    for able, gradient in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr("kvfuse.fusers.execution.quantized.cpu_multiplies_int8", lambda able=able: able)
        small(torch.randn(3, 2, 32, requires_grad=gradient))
        taken.append("asked")
    small.to("meta")(torch.empty(3, 2, 32, device="meta"))
    assert taken == ["integers", "asked", "asked", "asked"]


def test_gradients_of_inputs_are_the_weights(weights):
    _, small = linear_of(32, 16, weights)
    x = torch.randn(3, 2, 32, requires_grad=True)
    small(x).sum().backward()
    torch.testing.assert_close(x.grad, small.weight.sum(2)[:, None].expand_as(x))


def test_a_slice_of_groups_is_a_layer(weights):
    """Every tensor has the groups as its first dimension: its slice is a layer of these groups, for any strides."""
    _, small = linear_of(130, 33, weights, groups=4)
    x = torch.randn(4, 5, 130)
    for first, groups in ((1, slice(1, 2)), (0, slice(0, 4, 2))):
        part = copy.deepcopy(small)
        for name, tensor in small.named_parameters():
            part._parameters[name] = torch.nn.Parameter(tensor.detach()[groups], requires_grad=False)
        torch.testing.assert_close(part(x[groups])[0], small(x)[first], rtol=1e-6, atol=1e-6)


@needs_int8
def test_it_makes_no_difference_how_many_groups_are_computed_at_once(monkeypatch, weights):
    _, small = linear_of(41, 17, weights)
    x = torch.randn(3, 5, 41)
    together = small._multiply_integers(x)
    monkeypatch.setattr("kvfuse.fusers.execution.quantized.ELEMENTS_AT_ONCE", 1)
    assert torch.equal(small._multiply_integers(x), together)
    assert small._multiply_integers(x[:, :0]).shape == (3, 0, 17)


@needs_int8
def test_what_is_no_number_is_not_hidden(weights):
    _, small = linear_of(32, 16, weights)
    x = torch.randn(3, 2, 32)
    x[0, 1, 3], x[1, 0, 0] = torch.nan, torch.inf
    finite = small._multiply_integers(x).isfinite()
    assert finite.all(-1).tolist() == [[True, False], [False, True], [True, True]]
    assert not finite[0, 1].any()


# One fuser


def test_large_layers_are_replaced_and_the_rest_is_copied(full, small, weights):
    left = dict(small.named_modules())
    for name, linear in full.named_modules():
        if isinstance(linear, GroupedLinear):
            assert type(left[name]) is (FORMATS[weights] if linear.weight.shape[2] >= MIN_OUTPUTS else GroupedLinear)
    same = [name for name, tensor in full.state_dict().items() if name in small.state_dict()]
    assert_same_tensors(*({name: one.state_dict()[name] for name in same} for one in (small, full)))
    assert "gate.logit" in same
    assert (full.config.weights, small.config.weights, small.training) == ("full", weights, False)
    assert not any(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("way", ["own", "floats"])
def test_the_residual_is_close_to_the_full_fusers(full, small, weights, inputs, monkeypatch, way):
    if way == "floats":
        by_floats(monkeypatch)
    assert (
        0
        < apart(small(receiver=inputs[0], sharer=inputs[1]), full(receiver=inputs[0], sharer=inputs[1]))
        < LOST[weights]
    )


def test_a_token_depends_on_that_token_alone(small, inputs):
    """Up to rounding: the last bit of an activation may decide between two neighbouring integers."""
    rows, places = torch.tensor([1, 0]), torch.tensor([3, 2])
    together = small(receiver=inputs[0], sharer=inputs[1]).tokens(rows, places)
    receiver_kv, sharer_kv = (kv.tokens(rows, places) for kv in inputs)
    assert apart(small(receiver=receiver_kv, sharer=sharer_kv), together) < 0.01


def test_a_closed_gate_gives_exactly_zero(receiver, sharer, full, weights, inputs):
    closed = quantize(
        tiny_fuser(receiver, sharer, full.config.model_type.removeprefix("kvfuse-"), gate_init=-1.0), weights
    )
    residual = closed(receiver=inputs[0], sharer=inputs[1])
    assert not residual.key.any()
    assert not residual.value.any()


def test_casting_leaves_the_integers(small, inputs, weights):
    cast = copy.deepcopy(small).to(torch.bfloat16)
    kept = [name for name, tensor in small.state_dict().items() if not tensor.is_floating_point()]
    assert kept
    assert_same_tensors(*({name: one.state_dict()[name] for name in kept} for one in (cast, small)))
    assert cast.dtype == next(cast.parameters()).dtype == torch.bfloat16
    assert (
        apart(
            cast(**dict(zip(("receiver", "sharer"), (kv.to("cpu", torch.bfloat16) for kv in inputs), strict=True))).to(
                "cpu", torch.float32
            ),
            small(receiver=inputs[0], sharer=inputs[1]),
        )
        < 0.05
    )


@pytest.mark.parametrize(("weights", "share"), [("int8", 0.502), ("int4", 0.260)])
def test_how_small_the_papers_fuser_becomes(weights, share):
    specs = {"receiver": (28, 8, 128), "sharer": (24, 2, 64)}
    pair = {
        whose: {"kv": {"num_layers": layers, "num_kv_heads": heads, "key_dim": dim, "value_dim": dim}}
        for whose, (layers, heads, dim) in specs.items()
    }
    classes = [class_of({"model_type": "kvfuse-c2c", "weights": kind}) for kind in ("full", weights)]
    with torch.device("meta"):
        full, small = (
            cls(cls.config_class(**pair, weights=kind)).to(torch.bfloat16)
            for cls, kind in zip(classes, ("full", weights), strict=True)
        )
    assert size_of(small) / size_of(full) == pytest.approx(share, abs=0.002)


# On disk


def test_saved_and_loaded_it_is_the_same_to_the_bit(full, small, weights, inputs, tmp_path):
    folder = save_fuser(small, tmp_path / "small")
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == small.state_dict().keys()
    assert (torch.int8 if weights == "int8" else torch.uint8) in {tensor.dtype for tensor in stored.values()}
    for loaded in (load_fuser(folder), AutoModel.from_pretrained(folder)):
        assert isinstance(loaded, type(full))
        assert_same_tensors(loaded.state_dict(), small.state_dict())
        assert [tensor.dtype for tensor in loaded.parameters()] == [tensor.dtype for tensor in small.parameters()]
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert_kv_equal(*(one(receiver=inputs[0], sharer=inputs[1]) for one in (loaded, small)))
    assert f"rounded to {weights}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_loaded_in_the_dtype_it_was_saved_in(receiver, sharer, weights, dtype, tmp_path):
    small = quantize(tiny_fuser(receiver, sharer).to(dtype), weights)
    folder = save_fuser(small, tmp_path / "small")
    assert load_fuser(folder).dtype == dtype
    wide = load_fuser(folder, dtype=torch.float32)
    assert wide.dtype == torch.float32
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name].to(tensor.dtype)), "nothing is lost where it is widened"


def test_transformers_is_told_of_no_quantisation(full, small, weights, tmp_path):
    """Its ``quantization_config`` would have it look for another library's kernels."""
    configs = [
        json.loads((save_fuser(one, tmp_path / name) / "config.json").read_text())
        for name, one in (("a", full), ("b", small))
    ]
    assert [config.get("weights") for config in configs] == ["full", weights]
    assert all("quantization_config" not in config for config in configs)


def test_a_pair_answers_with_it(saved_models, small_pair, tmp_path):
    save_fuser(small_pair.fusers[0], tmp_path / "small")
    folders = {name: saved_models / name for name in ("receiver", "sharer")}
    loaded = CacheToCache.from_pretrained(**folders, fuser=tmp_path / "small", dtype=torch.float32)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert loaded.chat("What is Oslo?", **options) == small_pair.chat("What is Oslo?", **options)
    assert (
        CacheToCache.from_pretrained(**folders, fuser=tmp_path / "small", dtype=torch.bfloat16).fusers[0].dtype
        == torch.float32
    )


def test_a_random_fuser_can_take_its_place(small_pair):
    """The control of evaluations draws one of the same class and configuration."""
    trained, drawn = small_pair.fusers[0], make_method("random-fuser", small_pair).fusers[0]
    assert type(drawn) is type(trained)
    assert drawn.config.to_dict() == trained.config.to_dict()
    differs = {name: not torch.equal(tensor, trained.state_dict()[name]) for name, tensor in drawn.state_dict().items()}
    assert differs["projection_out.levels"]
    assert not differs["gate.logit"]


def test_a_folder_becomes_another(receiver, sharer, weights, tmp_path):
    full = save_fuser(tiny_fuser(receiver, sharer), tmp_path / "full")
    before = (full / "model.safetensors").read_bytes()
    told = quantize_folder(full, tmp_path / "small", weights)
    assert told.startswith(f"wrote {tmp_path / 'small'}: ")
    assert f" MB of float32 -> {size_of(load_fuser(tmp_path / 'small')) / 1e6:.2f} MB of {weights} (" in told
    assert (full / "model.safetensors").read_bytes() == before


# What is refused


def test_it_cannot_be_trained(small_pair, tmp_path, weights):
    fuser = small_pair.fusers[0]
    for attempt in (
        fuser.train,
        lambda: FuserTrainer(small_pair, None, [], tmp_path / "run"),
        lambda: fit(small_pair, None, []),
    ):
        with pytest.raises(PairError, match=f"full weights to train, got one with {weights}"):
            attempt()
    assert not fuser.eval().training
    assert not (tmp_path / "run").exists()


def test_a_recipe_cannot_ask_for_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "{receiver: a, sharer: b, output: c, data: {path: d}, fuser: {weights: int8}}"
    )
    with pytest.raises(RecipeError, match=r"fuser\.weights"):
        load_recipe(tmp_path / "recipe.yaml")


def test_what_cannot_be_quantised_is_named(receiver, sharer, small, weights):
    with pytest.raises(PairError, match=f"full weights, got one with {weights}"):
        quantize(small, "int8")
    with pytest.raises(PairError, match="one of int8, int4, got 'int2'"):
        quantize(tiny_fuser(receiver, sharer), "int2")
    with pytest.raises(PairError, match=r"fuser\.weights to be one of full, int8, int4, got 'int2'"):
        tiny_fuser(receiver, sharer, weights="int2")


def test_a_fuser_without_grouped_layers_is_refused(receiver, sharer, weights):
    class PlainConfig(FuserConfig):
        model_type = "kvfuse-plain"

    class Plain(Fuser):
        config_class = PlainConfig

        def __init__(self, config):
            super().__init__(config)
            self.linear = torch.nn.Linear(4, 4)
            self.post_init()

    plain = Plain(PlainConfig(receiver=receiver.identity.to_dict(), sharer=sharer.identity.to_dict()))
    with pytest.raises(PairError, match="got a kvfuse-plain without"):
        quantize(plain, weights)


def test_refusals_leave_no_folder(receiver, sharer, weights, tmp_path):
    full = save_fuser(tiny_fuser(receiver, sharer, token_alignment="identity"), tmp_path / "full")
    small = save_fuser(quantize(load_fuser(full), weights), tmp_path / "small")
    with pytest.raises(PairError, match="got one with"):
        quantize_folder(small, tmp_path / "new", weights)
    with pytest.raises(PairError, match="got 'int2'"):
        quantize_folder(full, tmp_path / "new", "int2")
    with pytest.raises(CheckpointError, match="another folder than the fuser's own"):
        quantize_folder(full, tmp_path / "small" / ".." / "full", weights)
    with pytest.raises(CheckpointError, match=f"published format can hold, got .* weights='{weights}'"):
        convert(small, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "small"]
    assert load_fuser(full).config.weights == "full"


def test_a_folder_in_use_is_refused_before_anything_is_computed(receiver, sharer, saved_models, tmp_path, monkeypatch):
    full = save_fuser(tiny_fuser(receiver, sharer), tmp_path / "full")
    shutil.copytree(saved_models / "receiver", tmp_path / "model")
    (tmp_path / "model" / "notes.md").write_text("mine")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("no folder")
    before = files_of(tmp_path)
    monkeypatch.setattr("kvfuse.checkpoint.load_fuser", lambda *args: pytest.fail("refused too late"))
    for name in ("model", "words", "file"):
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match=r"new or hold a fuser|got a file"):
                quantize_folder(full, tmp_path / name, "int8", overwrite=overwrite)
            with pytest.raises(CheckpointError, match=r"expected a new folder|got a file"):
                convert(full, tmp_path / name, overwrite=overwrite)
    assert files_of(tmp_path) == before


def test_a_fuser_is_replaced_only_where_asked(receiver, sharer, tmp_path):
    full, other = (save_fuser(tiny_fuser(receiver, sharer, seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    (other / "notes.md").write_text("mine")
    before = files_of(other)
    with pytest.raises(CheckpointError, match=r"with a fuser in it; .*--overwrite"):
        quantize_folder(full, other, "int8")
    assert files_of(other) == before
    (tmp_path / "empty").mkdir()
    for folder, options in ((other, {"overwrite": True}), (tmp_path / "empty", {})):
        quantize_folder(full, folder, "int8", **options)
        assert load_fuser(folder).config.weights == "int8"
    assert (other / "notes.md").read_text() == "mine"


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_one_is_drawn_and_rounded(receiver, sharer, weights):
    drawn = tiny_fuser(receiver, sharer, weights=weights)
    layers = [layer for layer in drawn.modules() if isinstance(layer, QuantizedLinear)]
    assert layers
    assert all(layer.integers().any() and layer.scale.isfinite().all() for layer in layers)
    assert {type(layer) for layer in layers} == {Int8Linear if weights == "int8" else Int4Linear}
