"""A dry run tells what the run will do."""

import pytest
from runs import write_recipe
from transformers import AutoConfig
from typer.testing import CliRunner

from kvfuse.cli import app
from kvfuse.errors import PairError
from kvfuse.language_model import LanguageModel
from kvfuse.testing import FAMILIES, tiny_model
from kvfuse.training.plan import plan, shape_of
from kvfuse.training.recipe import load_recipe
from kvfuse.training.run import new_pair, prepare_data


@pytest.fixture
def recipe(saved_models, tmp_path):
    return write_recipe(tmp_path, saved_models, [f"It is {i}." for i in range(11)], fuser={})


def planned(path, *overrides):
    loaded = load_recipe(path, overrides)
    return loaded, plan(loaded, prepare_data(loaded, lambda line: None))


@pytest.mark.parametrize(
    "overrides", [[], ["train.epochs=2.5", "train.accumulation=2"], ["train.steps=3", "train.batch_size=2"]]
)
def test_the_plan_is_what_the_trainer_does(recipe, overrides, tmp_path, monkeypatch):
    from kvfuse.training.loop.trainer import FuserTrainer
    from kvfuse.training.run import train

    made = []
    monkeypatch.setattr(FuserTrainer, "resume", lambda self: made.append(self.train()))
    loaded, estimate = planned(recipe, "fuser.hidden_dim=8", "fuser.intermediate_dim=8", *overrides)
    train(loaded, lambda line: None, quiet=True)
    assert estimate.steps == made[0].global_step
    assert estimate.examples == 9


def test_shapes_and_sizes_are_those_of_the_loaded_pair(recipe):
    loaded, estimate = planned(recipe, "fuser.kind=low-rank")
    pair = new_pair(loaded)
    assert estimate.trainable == sum(parameter.numel() for parameter in pair.fusers[0].parameters())
    for shape, model in ((estimate.receiver, pair.receiver), (estimate.sharer, pair.sharers[0])):
        assert (shape.parameters, shape.kv) == (model.model.num_parameters(), model.kv_spec)


def test_larger_batches_need_more_memory_and_more_steps_more_time(recipe):
    _, small = planned(recipe, "train.steps=10", "train.batch_size=1")
    _, large = planned(recipe, "train.steps=10", "train.batch_size=64")
    _, long = planned(recipe, "train.steps=100000", "train.batch_size=1")
    assert large.memory > small.memory == long.memory
    assert long.seconds > 100 * small.seconds


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2", "gpt_oss", "qwen3_moe", "qwen3_next"}))
def test_a_shape_is_told_from_the_configuration_alone(family, tmp_path):
    model = tiny_model(family)
    model.model.config.save_pretrained(tmp_path)
    assert shape_of(str(tmp_path), "bfloat16").kv == model.kv_spec
    assert shape_of(str(tmp_path), "bfloat16").itemsize == 2
    assert AutoConfig.from_pretrained(tmp_path).model_type == family


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(PairError, match=r"expected a model's configuration at .* got no such folder"):
        shape_of(str(tmp_path / "none"), "auto")


def test_the_command_writes_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "from_pretrained", None)  # no weight is loaded
    result = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("receiver", "sharer", "trainable", "steps", "MiB", "minutes"))
    assert not (tmp_path / "out").exists()
