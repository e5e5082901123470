import json
import re

import pytest
import yaml
from answers import answers, run_of, timings
from helpers import CheckedHTML

from kvfuse.errors import EvaluationError
from kvfuse.evaluation.predictions import append
from kvfuse.evaluation.report.comparison import comparison, write_comparison
from kvfuse.evaluation.report.document import Code, Facts, Heading, Table, Text, to_html, to_markdown
from kvfuse.evaluation.report.write import report, write_report
from kvfuse.evaluation.scoring.metrics import metrics

METHODS = ["receiver", "sharer", "text-to-text", "cache-to-cache", "mismatched"]
HOSTILE = '<script>alert(1)</script><img src="https://example.org/x.png"> | *bold* [link](https://example.org)'


class Page(CheckedHTML):
    """The tags, links, text and table rows of a page."""

    def __init__(self, text):
        self.tags, self.links, self.words, self.rows = [], [], "", []
        super().__init__(text)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def rows(answer="A", task="t"):
    """Five methods, two fuser seeds, two categories, a failure."""
    right = {
        name: [float((i * 7 + place * 3) % 10 < 4 + place) for i in range(20)] for place, name in enumerate(METHODS)
    }
    right["text-to-text"][3] = 0.0
    out = []
    for name in METHODS:
        seeds = (0, 1) if name in METHODS[3:] else (None,)
        for seed in seeds:
            failed = [None] * 3 + ["out of memory"] + [None] * 16 if name == "text-to-text" else None
            some = answers(
                name,
                right[name],
                task=task,
                seed=seed,
                category=["law", "physics"] * 10,
                failed=failed,
                question=f"{answer}?",
            )
            out += [one.model_copy(update={"answer": f"{answer} {one.score:.0f}"}) for one in some]
    return out


def folder(path, answer="A", config=None, **fields):
    append(path / "predictions.jsonl", rows(answer, **fields))
    append(
        path / "latency.jsonl",
        [row for name in METHODS for row in timings(name, [0.1, 0.2], {"decode": 0.4, "fuse": 0.1})],
    )
    (path / "config.yaml").write_text(
        yaml.safe_dump(config or {"receiver": "small", "sharer": "large", "evaluation": {"limit": 20}})
    )
    (path / "versions.json").write_text(json.dumps({"torch": "2.13.0", "date": "2026-01-01"}))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = folder(tmp_path_factory.mktemp("runs") / "first", HOSTILE)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def page(written):
    return Page((written / "report.html").read_text())


def test_the_page_needs_nothing_else(page, written):
    text = (written / "report.html").read_text()
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"@import|url\((?!#)", text)


def test_the_verdict_stands_first_and_the_configuration_last(page, written):
    verdict = json.loads((written / "metrics.json").read_text())["tasks"]["t"]["verdict"]
    places = [
        page.words.index(part) for part in ("small", verdict, "Differences", "Latency", "Sample answers", "limit: 20")
    ]
    assert places == sorted(places)


def test_what_models_say_is_shown_as_they_said_it(page):
    assert HOSTILE in " ".join(page.words.split())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_in_every_table(page, written, method):
    one = json.loads((written / "metrics.json").read_text())["tasks"]["t"]["methods"][method]
    low, high = one["interval"]
    accuracy, *_, spent = (row for row in page.rows if row[0] == method)
    assert accuracy[1] == f"{100 * one['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert spent[1] == "150.0"
    assert method in next(row for row in page.rows if row[0] == "category")
    assert method == METHODS[0] or any(f"{method} - receiver" == row[0] for row in page.rows)


def test_failures_are_shown(page):
    assert "1 failed. They count as wrong" in page.words
    assert ["t", "text-to-text", "out of memory", "3", "1"] in page.rows


def test_all_figures_are_there(page):
    assert page.tags.count("svg") == page.tags.count("figcaption") == 5


def test_markdown_has_the_same_tables(page, written):
    lines = (written / "report.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|") and not line.startswith("| ---")]
    assert len(tables) == len(page.rows)
    cells = [re.sub(r"\\(.)", r"\1", cell).strip() for line in tables for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert cells == [" ".join(cell.split()) for row in page.rows for cell in row]
    assert not any(re.search(r"(?<!\\)<(script|img)", line) for line in lines)


def test_a_report_can_be_written_again(tmp_path, undrawn):
    write_report(folder(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert before.keys() == {
        "predictions.jsonl",
        "latency.jsonl",
        "config.yaml",
        "versions.json",
        "metrics.json",
        "report.html",
        "report.md",
    }


def test_published_figures_stand_beside_the_measured(tmp_path, undrawn):
    published = [
        {"task": "t", "method": "receiver", "value": 35.53, "source": "Table 3"},
        {"task": "t", "method": "oracle", "value": 50, "source": "Table 9", "why_not": "its data is not public"},
        {"task": "elsewhere", "method": "receiver", "value": 1.5, "source": "Table 4"},
    ]
    write_report(folder(tmp_path, config={"published": published}))
    page = Page((tmp_path / "report.html").read_text())
    found = {row[0]: row[-1] for row in page.rows[: len(METHODS) + 2]}
    assert (found["receiver"], found["oracle"], found["sharer"]) == ("35.5", "50.0", "-")
    assert "Published, Table 3: receiver 35.53." in page.words
    assert "its data is not public" in page.words
    assert "Table 4" not in page.words.split("Configuration")[0]


def test_a_wrong_published_figure_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"expected value .* the published figures of"):
        write_report(folder(tmp_path, config={"published": [{"task": "t", "method": "receiver", "source": "Table 3"}]}))
    assert not (tmp_path / "report.html").exists()


def test_the_least_run_has_a_report(undrawn):
    """One method, one item: nothing to compare, nothing timed, nothing known of it."""
    run = run_of(answers("cache-to-cache", [1], seed=0))
    assert "No verdict" in Page(to_html(list(report(run, metrics(run))))).words


def test_an_unfinished_run_says_so(undrawn):
    run = run_of(answers("receiver", [1, 0, 1]), answers("cache-to-cache", [1, None, None], seed=0))
    assert "Not finished" in to_markdown(list(report(run, metrics(run))))


def test_samples_are_where_methods_disagree(page, written, undrawn):
    alike = sum(int(n) for n in re.findall(r"(\d+) items like this", page.words))
    assert 0 < alike <= 20
    agreeing = run_of(answers("receiver", [1, 0]), answers("sharer", [1, 0]))
    assert "Sample answers" not in to_markdown(list(report(agreeing, metrics(agreeing))))


@pytest.mark.parametrize(("number", "drawn"), [(12, METHODS), (13, ["receiver", "sharer", "cache-to-cache"])])
def test_many_categories_are_drawn_for_three_methods(number, drawn, undrawn, monkeypatch):
    given = []
    monkeypatch.setattr(
        "kvfuse.evaluation.report.figures.by_category", lambda categories, axis: given.append(categories)
    )
    names = [f"subject {i}" for i in range(number)]
    run = run_of(*(answers(name, [1.0] * (number - 1) + [0.0], category=names, seed=0) for name in METHODS))
    text = to_markdown(list(report(run, metrics(run))))
    assert [list(one) for one in given[0].values()] == [drawn] * number
    assert f"| category | items | {' | '.join(METHODS)} |" in text


def test_markdown_of_every_block():
    blocks = [
        Heading("A_b", 1),
        Facts({"x": "1"}),
        Text("b", lead="a."),
        Table(["n", "v"], [["a|b", "1\n2"]]),
        Code("a\n```\n"),
    ]
    assert to_markdown(blocks).split("\n\n") == [
        "# A\\_b",
        "- x: 1",
        "**a.** b",
        "| n | v |\n| --- | ---: |\n| a\\|b | 1 2 |",
        "````\na\n```\n````\n",
    ]


def test_runs_side_by_side(tmp_path):
    one = folder(tmp_path / "one")
    two = folder(tmp_path / "two", config={"receiver": "small", "sharer": "larger", "evaluation": {"limit": 20}})
    write_comparison([one, two], tmp_path / "out" / "both.html")
    page = Page((tmp_path / "out" / "both.html").read_text())
    assert ["receiver", "40.0 [21.9, 61.3]", "40.0 [21.9, 61.3]"] in page.rows
    assert ["receiver", "+0.0 [+0.0, +0.0]"] in page.rows
    assert ["sharer", "large", "larger"] in page.rows
    assert not any(row[0] == "evaluation.limit" for row in page.rows)
    assert (tmp_path / "out" / "both.md").read_text().startswith("# Evaluation: one, two\n")


def text_of(*runs):
    return to_markdown(list(comparison(runs, [f"run {i}" for i in range(len(runs))])))


def test_the_same_items_are_paired_whatever_their_order():
    """Every item is gained by one and lost by none: the difference has no width, as only a paired one has."""
    before, after = answers("receiver", [1, 0, 0.5, 0]), answers("receiver", [1, 0.25, 0.75, 0.5])
    shifted = run_of(answers("receiver", [0, 0, 0, 0.5])), run_of(answers("receiver", [0.5, 0.5, 0.5, 1])[::-1])
    assert "+50.0 [+50.0, +50.0]" in text_of(*shifted)
    assert "+25.0 [" in text_of(run_of(before), run_of(after))


def test_other_items_are_not_paired():
    text = text_of(run_of(answers("receiver", [1, 0, 1])), run_of(answers("receiver", [1, 0])))
    assert "3 items in run 0, 2 in run 1, 2 of them the same: no paired differences" in text
    assert "run 1 minus run 0" not in text


def test_other_words_are_noted():
    other = [row.model_copy(update={"prompt_hash": "new"}) for row in answers("receiver", [1, 0])]
    assert "2 of them were asked in other words" in text_of(run_of(answers("receiver", [1, 0])), run_of(other))


def test_a_task_of_one_run_alone_is_shown():
    text = text_of(run_of(answers("receiver", [1, 0])), run_of(answers("sharer", [1, 1], task="u")))
    assert "| receiver | 50.0 [9.5, 90.5] | - |" in text
    assert "| sharer | - | 100.0 [34.2, 100.0] |" in text


def test_one_run_is_no_comparison(tmp_path):
    with pytest.raises(EvaluationError, match="two or more"):
        write_comparison([folder(tmp_path / "one")], tmp_path / "both.html")
