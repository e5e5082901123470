import re
from html.parser import HTMLParser

import matplotlib
import pytest

from kvfuse.evaluation.report import figures
from kvfuse.support import plots

ESTIMATES = [("receiver", 0.34, (0.3, 0.38)), ("cache-to-cache", 0.9, (0.88, 0.93))]
LATENCY = {
    "receiver": {"median": 0.02, "p95": 0.05, "mean": 0.025, "phases": {"receiver_prefill": 0.01, "decode": 0.012}},
    "cache-to-cache": {
        "median": 0.03,
        "p95": 0.06,
        "mean": 0.035,
        "phases": {"receiver_prefill": 0.01, "fuse": 0.015, "decode": 0.01},
    },
}
METHODS = ["receiver", "sharer", "cache-to-cache"]
REGIONS = {
    "": 5,
    "receiver": 10,
    "sharer": 0,
    "cache-to-cache": 2.5,
    "receiver+sharer": 3,
    "receiver+cache-to-cache": 4,
    "sharer+cache-to-cache": 1,
    "receiver+sharer+cache-to-cache": 1234,
}
KNOWN = {
    "receiver": {"right": 4, "wrong": 10},
    "sharer": {"right": 1, "wrong": 0},
    "receiver+sharer": {"right": 1234, "wrong": 3},
    "": {"right": 2.5, "wrong": 5},
}


def draw_all():
    categories = {
        "law": {"receiver": (0.3, (0.2, 0.4)), "sharer": (0.5, (0.4, 0.6))},
        "physics": {"sharer": (0.1, (0.0, 0.2))},
    }
    return {
        "forest": figures.forest(ESTIMATES, "accuracy (%), 95% interval"),
        "differences": figures.forest(
            [("a - b", 0.01, (-0.02, 0.04)), ("a - c", 0.1, (0.05, 0.15))], "difference (points)", zero=True
        ),
        "categories": figures.by_category(categories, "accuracy (%)"),
        "latency": figures.latency(LATENCY, ["receiver_prefill", "fuse", "decode"]),
        "overlap": figures.overlap(KNOWN),
    }


@pytest.fixture(scope="module")
def drawn():
    return draw_all()


def words(figure):
    axes = figure.axes[0]
    return [
        text.get_text()
        for text in (
            *axes.texts,
            *axes.get_yticklabels(),
            *(entry for one in figure.legends for entry in one.get_texts()),
        )
    ]


@pytest.mark.parametrize("name", ["forest", "differences", "categories", "latency"])
def test_axes_say_what_they_are_in_which_unit(name, drawn):
    axes = drawn[name].axes[0]
    assert re.search(r"\((%|points|ms)\)", axes.get_xlabel())
    assert all(label.get_text() for label in axes.get_yticklabels())
    assert axes.yaxis_inverted()  # the first is on top


def test_what_is_drawn_is_what_was_given(drawn):
    lines = drawn["forest"].axes[0].lines
    drawn_as = [list(line.get_xdata()) for line in lines]
    assert drawn_as == [pytest.approx(one) for one in ([30, 38], [34], [88, 93], [90])]


def test_points_whose_interval_contains_zero_are_hollow(drawn):
    _, one, _, other, _ = drawn["differences"].axes[0].lines
    assert (one.get_markerfacecolor(), other.get_markerfacecolor()) == (plots.PAPER, plots.COLOURS[0])


def test_phases_stack_to_the_mean(drawn):
    axes = drawn["latency"].axes[0]
    ends = [
        max(bar.get_x() + bar.get_width() for bar in axes.patches if round(bar.get_y() + 0.3) == row) for row in (0, 1)
    ]
    assert ends == pytest.approx([25, 35])
    assert {"fuse", "receiver prefill", "other", "median", "95th percentile"} <= set(words(drawn["latency"]))


def test_every_category_and_method_is_named(drawn):
    assert {"law", "physics", "receiver", "sharer"} <= set(words(drawn["categories"]))


def test_items_are_counted_by_who_knew_them():
    assert figures.knowledge(METHODS, REGIONS) == KNOWN
    pair = {"": 1, "receiver": 2, "cache-to-cache": 3, "receiver+cache-to-cache": 4}
    assert figures.knowledge(["receiver", "cache-to-cache"], pair) == {
        "receiver": {"right": 4, "wrong": 2},
        "": {"right": 3, "wrong": 1},
    }


def test_every_count_has_its_bar():
    axes = figures.overlap(KNOWN).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [4, 1, 1234, 2.5, 10, 0, 3, 5]
    assert [text.get_text() for text in axes.texts] == ["4", "1", "1,234", "2.5", "10", "0", "3", "5"]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "only the receiver",
        "only the sharer",
        "both",
        "neither",
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["right when fused", "wrong when fused"]
    right, wrong = (bar.get_y() + bar.get_height() / 2 for bar in (axes.patches[0], axes.patches[4]))
    assert -0.5 < right < 0 < wrong < 0.5, "both bars are on the first line, next to each other"


def test_svg_takes_the_pages_colours_and_links_nowhere():
    text = plots.svg(figures.forest([("a <b> $x$", 0.1, (-0.1, 0.2))], "difference (points)", zero=True), "one")
    assert "http" not in text
    assert plots.INK not in text
    assert "currentColor" in text
    assert "var(--paper)" in text
    assert "a &lt;b&gt; $x$" in text
    assert "difference (points)" in text  # as text, not as outlines


def test_figures_of_one_page_share_no_ids():
    class Ids(HTMLParser):
        def __init__(self):
            super().__init__()
            self.ids, self.used = [], set()

        def handle_starttag(self, tag, attrs):
            for name, value in attrs:
                if name == "id":
                    self.ids.append(value)
                self.used.update(re.findall(r"#(\w+)\)?$", value) if name in ("href", "clip-path") else ())

    reader = Ids()
    for name in ("first", "second"):
        reader.feed(plots.svg(figures.forest(ESTIMATES, "accuracy (%)"), name))
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.used <= set(reader.ids)


def test_a_figure_is_the_same_each_time():
    one, other = (plots.svg(figures.overlap(KNOWN), "overlap") for _ in range(2))
    assert one == other


def test_drawing_leaves_the_users_settings():
    before = dict(matplotlib.rcParams)
    draw_all()
    assert dict(matplotlib.rcParams) == before
