"""Shared plotting: one style for every picture, saved as PNG, as SVG, or as SVG that follows the page's text colour."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfuse.support.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Figure
else:  # names for annotations, so that nothing imports matplotlib before it draws
    Axes = Axis = Figure = Any

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#888888")
"""Okabe and Ito's scheme for colour-blind readers; yellow darkened and black a grey, for light and dark pages."""
MARKERS = "osD^vPX*"
LOOKS = tuple(zip(COLOURS, MARKERS, strict=True))
"""Colour and marker of the first, second, ... series of a picture."""
INK = "#010203"
"""Stands for the page's text colour in :func:`svg`."""
PAPER = "#fdfefd"
"""Stands for the page's background in :func:`svg`."""
DASHED = (0, (4, 3))
"""Line style of means and reference levels."""
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
WIDTH = 8.0  # inches of 72 SVG units each: text is 14 pixels high where a figure is shown 800 pixels wide
PNG_DPI = 120  # 960 pixels wide
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: draw or save with :data:`STYLE`, whatever the user's own settings are."""

    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
            return draw(*args, **kwargs)

    return styled


@styled
def svg(figure: Figure, name: str) -> str:
    """Returns a figure as an ``<svg>`` element for an HTML page, without links.

    Args:
        figure: What to embed.
        name: Unique on the page; the ids of repeated shapes are derived from it.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    text = file.getvalue()
    # drop the XML header, metadata, group ids and the fixed size: the page decides how large it is
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| width="[\d.]+pt"| height="[\d.]+pt"', "", text)
    return text.replace("xlink:href", "href").replace(INK, "currentColor").replace(PAPER, "var(--paper)").strip()


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG (960 pixels wide) or SVG, by the suffix: reproducible bytes, whole or not at all."""
    import matplotlib

    kind = path.suffix.removeprefix(".")
    metadata = {"Software": None} if kind == "png" else NO_METADATA
    options: dict[str, Any] = {"format": kind, "dpi": PNG_DPI, "facecolor": "white", "metadata": metadata}
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        write_atomically(path, lambda temporary: figure.savefig(temporary, **options))


def new_axes(height: float) -> tuple[Figure, Axes]:
    """Returns a figure ``height`` inches high with a single pair of axes."""
    figure, panels = new_panels(height)
    return figure, panels[0]


def new_panels(height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Returns a figure ``height`` inches high and its grid of axes, row by row.

    Args:
        height: In inches of 72 SVG units.
        columns: Number of columns.
        rows: Number of rows.
        options: Of matplotlib's ``subplots``, such as ``sharey``.
    """
    figure = _new_figure(height)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def new_mosaic(height: float, layout: Sequence[str], **options: Any) -> tuple[Figure, list[Axes]]:
    """Returns a figure whose axes span several grid cells.

    Args:
        height: In inches.
        layout: Rows of letters, one letter per cell: ``("aa", "bc")`` is one wide panel over two narrow ones.
        options: Of matplotlib's ``subplot_mosaic``, such as ``height_ratios``.
    """
    figure = _new_figure(height)
    panels = figure.subplot_mosaic(list(map(list, layout)), **options)
    return figure, [panels[letter] for letter in sorted(panels)]


def name_lines(axes: Axes, labels: Sequence[str]) -> None:
    """Label the horizontal lines 0, 1, ... from the top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def name_columns(axes: Axes, labels: Sequence[str], first: int = 0) -> None:
    """Write long labels, such as tokens, slanted below the columns ``first``, ``first + 1``, ..."""
    columns = range(first, first + len(labels))
    axes.set_xticks(columns, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)


def count_whole(axis: Axis) -> None:
    """Put ticks at whole numbers only, as for layers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def draw_lines(
    axes: Axes,
    lines: Mapping[str, Sequence[float]],
    x: Sequence[float] | None = None,
    looks: Sequence[tuple[str, str]] = LOOKS,
) -> list[Any]:
    """Draw lines with markers; returns the legend handles.

    Args:
        axes: Where to draw.
        lines: Values by label.
        x: Their positions on the horizontal axis; by default 0, 1, ...
        looks: Colour and marker of each.
    """
    return [
        axes.plot(range(len(y)) if x is None else x, y, color=colour, marker=marker, label=label)[0]
        for (label, y), (colour, marker) in zip(lines.items(), looks, strict=False)
    ]


def stack_bars(
    axes: Axes, parts: Mapping[str, Sequence[float]], height: float, colours: Sequence[str] = COLOURS
) -> list[Any]:
    """Draw horizontal bars on lines 0, 1, ... out of labelled parts; returns the legend handles.

    Args:
        axes: Where to draw.
        parts: By label, the width on each line.
        height: Of a bar; lines are 1 apart.
        colours: One per part.
    """
    handles, lefts = [], [0.0] * len(next(iter(parts.values())))
    for (label, widths), colour in zip(parts.items(), colours, strict=False):
        handles.append(axes.barh(range(len(widths)), widths, height, lefts, color=colour, label=label))
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    return handles


def legend_above(figure: Figure, shown: Sequence[Any]) -> None:
    """Put one legend above all panels."""
    figure.legend(handles=shown, loc="outside upper left", ncols=5, handletextpad=0.4, columnspacing=1.2)


def legend_on_top(axes: Axes, columns: int) -> None:
    """Put the legend of a single panel on its top edge."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def _new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")
