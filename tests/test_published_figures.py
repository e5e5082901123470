"""Published figures: a paper's table becomes a row each, and stands with_published what was measured."""

import pytest

from kvfuse.errors import RecipeError
from kvfuse.evaluation.predictions import Published
from kvfuse.evaluation.recipe import EvaluationRecipe
from kvfuse.evaluation.report.published_figures import as_rows, select, sources, with_published
from kvfuse.support.config import check

TABLE = {
    "source": "paper",
    "why_not": {"sharer": "lost"},
    "values": {"t": {"receiver": {"all": 3, "easy": 4}, "sharer": 5}},
}


def figure(method, value, **fields):
    return Published(task="t", method=method, value=value, source="paper", **fields)


def test_a_table_is_read_row_by_row():
    rows = [Published.model_validate(row) for row in as_rows([TABLE])]
    assert rows == [figure("receiver", 3), figure("receiver", 4, part="easy"), figure("sharer", 5, why_not="lost")]
    plain = [row.model_dump() for row in rows]
    assert as_rows(plain) == plain


def test_cells_have_the_published_figure_after_a_slash():
    rows = [
        figure("receiver", 3),
        figure("receiver", 4, part="easy"),
        figure("receiver", 250, unit="ms"),
        figure("receiver", 350, unit="ms"),
    ]
    assert with_published("1.0", select(rows, "receiver")) == "1.0 / 3"
    assert with_published("1.0", select(rows, "receiver", part="easy")) == "1.0 / 4"
    assert with_published("1.0", select(rows, "receiver", "ms")) == "1.0 / 300"
    assert with_published("1.0", select(rows, "sharer")) == "1.0"


def test_sources_and_reasons_are_told_once():
    rows = [figure("a", 1, part="x", why_not="lost"), figure("a", 2, part="y", why_not="lost"), figure("b", 3)]
    assert [(one.lead, one.text) for one in sources(rows)] == [
        ("Published, paper:", "a 1 (x), a 2 (y), b 3."),
        ("a, not run as published:", "lost"),
    ]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({**TABLE, "values": {"t": 3}}, "values are by task and method"),
        ({**TABLE, "values": {"t": {"receiver": "much"}}}, "evaluation.published.0.value"),
        ({**TABLE, "sauce": "x"}, "unknown 'evaluation.published.0.sauce'; did you mean 'source'"),
    ],
)
def test_a_wrong_table_is_named(table, words):
    with pytest.raises(RecipeError, match=words):
        check({"evaluation": {"tasks": ["t"], "published": [table]}}, EvaluationRecipe)


def recipe(**pair):
    fusers = {"fusers": ["own"], "subfolder": "within", "fusion": "sequential"}
    section = {"tasks": ["t"], "methods": ["receiver"], **fusers, "pairs": [{"name": "pair", **pair}]}
    return EvaluationRecipe.model_validate({"evaluation": section})


def test_a_pair_that_cannot_be_had_is_run_once_its_fuser_is_there(tmp_path):
    def can_run(**pair):
        return recipe(**pair).evaluation.pairs[0].can_run

    assert can_run()
    assert not can_run(why_not="lost")
    assert not can_run(why_not="lost", fusers=[[str(tmp_path), "elsewhere"]])
    assert can_run(why_not="lost", fusers=[[str(tmp_path), str(tmp_path)]])


def test_a_pair_takes_from_the_recipe_what_it_leaves_out():
    run = recipe(fusers=["other"], methods=["sharer"]).with_controls(["zeroed"]).runs()[0].evaluation
    assert (run.fusers, run.subfolder, run.fusion, run.methods) == (["other"], "", "sequential", ["sharer", "zeroed"])
    run = recipe().with_controls(["zeroed"]).runs()[0].evaluation
    assert (run.fusers, run.subfolder, run.methods) == (["own"], "within", ["receiver", "zeroed"])
