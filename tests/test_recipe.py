import pytest
import yaml

from kvfuse.errors import RecipeError
from kvfuse.prompts.alignment import TOKEN_ALIGNMENTS
from kvfuse.training.recipe import load_recipe

GOOD = {"receiver": "a", "sharer": "b", "output": "out", "data": {"path": "data.jsonl"}}


@pytest.fixture
def recipe(tmp_path):
    def write(content):
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def test_defaults_are_the_papers(recipe):
    loaded = load_recipe(recipe(GOOD))
    assert (loaded.train.learning_rate, loaded.train.weight_decay, loaded.train.warmup) == (1e-4, 0.01, 0.1)
    assert loaded.fuser.kind == "c2c"


@pytest.mark.parametrize("alignment", ["auto", *TOKEN_ALIGNMENTS])
def test_every_token_alignment_can_be_asked_for(recipe, alignment):
    assert load_recipe(recipe({**GOOD, "token_alignment": alignment})).token_alignment == alignment


def test_words_after_the_recipe_win(recipe):
    loaded = load_recipe(recipe(GOOD), ["train.steps=7", "fuser.hidden_dim=32", "receiver=other", "data.format=text"])
    assert (loaded.train.steps, loaded.fuser.options["hidden_dim"], loaded.receiver, loaded.data.format) == (
        7,
        32,
        "other",
        "text",
    )


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.learning_rat", "learning_rate"),
        ("recever", "receiver"),
        ("data.formt", "format"),
        ("fuser.hiden_dim", "hidden_dim"),
    ],
)
def test_an_unknown_key_names_the_nearest(recipe, key, nearest):
    with pytest.raises(RecipeError, match=f"did you mean '{nearest}'"):
        load_recipe(recipe(GOOD), [f"{key}=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("fuser.kind=c3c", "did you mean 'c2c'"),
        ("train.steps", "key=value"),
        ("receiver.name=x", "section"),
        ("data.format=opanbook", "did you mean 'openbookqa'"),
        ("data.loss_on=every", "data.loss_on to be one of last, all, got 'every'"),
        ("data.max_bad_share=2", "data.max_bad_share"),
    ],
)
def test_a_wrong_value_is_named(recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(GOOD), [override])


def test_a_start_that_was_the_default_is_accepted_and_deprecated(recipe):
    with pytest.warns(DeprecationWarning, match=r"train\.start has no effect"):
        loaded = load_recipe(recipe(GOOD), ["train.start=random", "train.steps=7"])
    assert loaded == load_recipe(recipe(GOOD), ["train.steps=7"])


def test_a_start_from_ridge_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"train\.start.*was removed"):
        load_recipe(recipe({**GOOD, "train": {"start": "ridge"}}))


@pytest.mark.parametrize("content", ["receiver: [", "- a list", "just words"])
def test_a_file_that_is_no_recipe_is_named(recipe, content):
    with pytest.raises(RecipeError, match="expected"):
        load_recipe(recipe(content))


def test_a_missing_key_is_named(recipe):
    with pytest.raises(RecipeError, match="expected the key sharer"):
        load_recipe(recipe({key: value for key, value in GOOD.items() if key != "sharer"}))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="expected a recipe"):
        load_recipe(tmp_path / "none.yaml")
