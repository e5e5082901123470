import re
from html.parser import HTMLParser
from math import pi

import matplotlib
import numpy as np
import pytest

from kvfuse.evaluation.report import figures
from kvfuse.evaluation.report.venn import THREE, lens, middle, two_circles
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
REGIONS = {"": 5, "a": 10, "b": 0, "c": 2.5, "a+b": 3, "a+c": 4, "b+c": 1, "a+b+c": 20}


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


def test_what_is_not_told_from_zero_is_hollow(drawn):
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


def test_every_region_has_its_count():
    assert set(words(figures.venn("abc", REGIONS))) >= {
        "10",
        "0",
        "2.5",
        "3",
        "4",
        "1",
        "20",
        "nobody: 5",
        "a\n37 right",
    }


@pytest.mark.parametrize(
    "counts", [(10, 20, 30), (1, 99, 0.5), (50, 0, 20), (0, 30, 10), (0, 30, 0), (0, 0, 7), (0, 0, 0), (40, 1e-3, 60)]
)
def test_areas_of_two_circles_are_to_scale(counts):
    first, both, second = counts
    one, other = two_circles(first, both, second)
    scale = pi * max(one.radius, other.radius) ** 2 / (max(first, second) + both or 1)
    assert pi * one.radius**2 == pytest.approx((first + both) * scale, abs=1e-6)
    assert pi * other.radius**2 == pytest.approx((second + both) * scale, abs=1e-6)
    assert lens(other.x - one.x, one.radius, other.radius) == pytest.approx(both * scale, abs=1e-6)


def test_shared_area_agrees_with_counting_points():
    rng = np.random.default_rng(0)
    points = rng.uniform(-2, 3, (400_000, 2))
    both = (np.hypot(*points.T) < 1.2) & (np.hypot(points[:, 0] - 1, points[:, 1]) < 0.9)
    assert lens(1.0, 1.2, 0.9) == pytest.approx(25 * both.mean(), rel=0.02)


@pytest.mark.parametrize("inside", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a + b + c])
def test_counts_stand_in_their_regions(inside):
    x, y, room = middle(THREE, inside)
    assert tuple(int(np.hypot(x - one.x, y - one.y) < one.radius) for one in THREE) == inside
    assert room > 0.16  # for a number of three digits


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
    one, other = (plots.svg(figures.venn(["a", "b"], {"": 1, "a": 2, "b": 3, "a+b": 4}), "v") for _ in range(2))
    assert one == other


def test_drawing_leaves_the_users_settings():
    before = dict(matplotlib.rcParams)
    draw_all()
    assert dict(matplotlib.rcParams) == before
