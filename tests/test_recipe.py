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
        ("train.seed=-1", "train.seed to be right .*greater than or equal to 0.*, got -1"),
        ("train.seed=4294967296", "train.seed"),
        *((f"train.{key}={value}", f"train.{key}") for key in ("learning_rate", "epochs") for value in (".inf", "nan")),
        ("train.weight_decay=.inf", "train.weight_decay"),
        ("train.max_grad_norm=1e999", "train.max_grad_norm"),
        ("fuser.hidden_dim=-3", "fuser.hidden_dim to be right .*, got -3; correct it"),
        ("fuser.hidden_dim=0", "fuser.hidden_dim"),
        ("fuser.hidden_dim=abc", "fuser.hidden_dim"),
        ("fuser.hidden_dim=2.5", "fuser.hidden_dim"),
        ("fuser.num_layers=2", "fuser.num_layers"),
        ("fuser.dropout=1.5", "fuser.dropout"),
        ("fuser.dropout=-0.1", "fuser.dropout"),
        ("fuser.gate_init=.nan", "fuser.gate_init"),
        ("fuser.final_temperature=0", "fuser.final_temperature"),
        ("fuser.replace=maybe", "fuser.replace"),
        ("fuser.layer_alignment=[a]", "fuser.layer_alignment"),
        ("fuser.fuse=some", "fuser.fuse to be one of all, messages"),
        ("fuser={kind: low-rank, rank: 0}", "fuser.rank"),
        ("fuser={kind: ridge, num_sources: 0}", "fuser.num_sources"),
        ("fuser={kind: c2c-complex, weight_temperature: 0}", "fuser.weight_temperature"),
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


@pytest.mark.parametrize(
    ("content", "key", "lines"),
    [
        ("receiver: a\nsharer: b\noutput: c\nreceiver: d\n", "receiver", "1 and 4"),
        ("receiver: a\ntrain:\n  steps: 1\n  seed: 2\n  'steps': 3\n", "steps", "3 and 5"),
        ("data: {path: d,\n path: e}\n", "path", "1 and 2"),
        ("methods:\n- {kind: a}\n- kind: b\n  kind: c\n", "kind", "3 and 4"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(recipe, content, key, lines):
    with pytest.raises(RecipeError, match=f"the key '{key}' twice, in lines {lines};"):
        load_recipe(recipe(content))


def test_a_merged_mapping_may_be_overridden(recipe):
    text = yaml.safe_dump({**GOOD, "receiver": "a"}) + "train: {<<: &base {steps: 3, seed: 1}, steps: 5}\n"
    loaded = load_recipe(recipe(text))
    assert (loaded.train.steps, loaded.train.seed) == (5, 1)


@pytest.mark.parametrize("word", ["train={steps: 1, steps: 2}", "train.steps=[", "output='x"])
def test_a_word_that_is_no_yaml_is_named(recipe, word):
    with pytest.raises(RecipeError, match=r"expected a value in YAML in .*; correct it") as caught:
        load_recipe(recipe(GOOD), [word])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"), [("data:\n\tpath: d\n", 2), ("\treceiver: a\n", 1), ("train:\n  steps: 1\n\tseed: 2\n", 3)]
)
def test_a_tab_is_named_with_its_line(recipe, content, line):
    with pytest.raises(RecipeError, match=rf"recipe\.yaml, got: a tab in line {line}, .*; check the file$"):
        load_recipe(recipe(content))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_recipe_is_read_as_other_programs_write_it(recipe, tmp_path, encoding, newline):
    text = yaml.safe_dump({**GOOD, "output": "Ausgänge"}, sort_keys=False, allow_unicode=True)
    (tmp_path / "other.yaml").write_bytes(text.replace("\n", newline).encode(encoding))
    assert load_recipe(tmp_path / "other.yaml") == load_recipe(recipe({**GOOD, "output": "Ausgänge"}))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_another_encoding_is_named(tmp_path, encoding):
    (tmp_path / "recipe.yaml").write_bytes(yaml.safe_dump(GOOD).encode(encoding))
    with pytest.raises(RecipeError, match=r"got: UTF-16 text .* save it as UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_missing_key_is_named(recipe):
    with pytest.raises(RecipeError, match="expected the key sharer"):
        load_recipe(recipe({key: value for key, value in GOOD.items() if key != "sharer"}))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="expected a recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_an_option_is_a_number_however_yaml_reads_it(recipe):
    """YAML takes 1e-3, without a point, for text."""
    loaded = load_recipe(recipe(GOOD), ["fuser.final_temperature=1e-3", "fuser.dropout=0"])
    assert loaded.fuser.options == {"final_temperature": 1e-3, "dropout": 0.0}
