"""Figures: matplotlib, no window, drawn for 800 pixels; as files, or as SVG whose text takes the colour of the page."""

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfuse.support.files import write_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#888888")
"""Okabe and Ito's scheme, distinct to colour-blind eyes; their yellow darkened and their black a grey, to show on light and dark pages."""
MARKERS = "osD^vPX*"
INK = "#010203"
"""Drawn in this colour, shown in that of the page's text."""
PAPER = "#fdfefd"
"""Likewise shown in the colour of the page."""
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
WIDTH = 8.0  # inches of 72 SVG units: text is 14 pixels high where a figure is shown 800 wide


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draw or save with :data:`STYLE`, whatever the user's own settings are."""

    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
            return draw(*args, **kwargs)

    return styled


@styled
def svg(figure: "Figure", name: str) -> str:
    """A figure as an element for an HTML page, without links.

    Args:
        figure: What to embed.
        name: One that no other figure of the page has: what is drawn twice has ids made from it.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| width="[\d.]+pt"| height="[\d.]+pt"', "", text)
    return text.replace("xlink:href", "href").replace(INK, "currentColor").replace(PAPER, "var(--paper)").strip()


@styled
def save(figure: "Figure", path: Path) -> None:
    """Write a figure to a file, PNG (960 pixels wide) or SVG by its suffix: the same bytes each time, whole or not at all."""
    import matplotlib

    kind = path.suffix.removeprefix(".")
    metadata = {"Software": None} if kind == "png" else dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        write_beside(
            path, lambda beside: figure.savefig(beside, format=kind, dpi=120, facecolor="white", metadata=metadata)
        )


def new_axes(height: float) -> "tuple[Figure, Axes]":
    """A figure so many inches high, with one pair of axes."""
    figure, panels = new_panels(height)
    return figure, panels[0]


def new_panels(height: float, columns: int = 1, rows: int = 1, **options: Any) -> "tuple[Figure, list[Axes]]":
    """A figure so many inches high, with axes beside and below each other, row by row.

    Args:
        height: In inches of 72 SVG units.
        columns: Beside each other.
        rows: Below each other.
        options: Of matplotlib's ``subplots``, as ``sharey``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def name_lines(axes: "Axes", labels: Sequence[str]) -> None:
    """Labels of horizontal lines 0, 1, … from above."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)


def count_whole(axis: "Axis") -> None:
    """Ticks at whole numbers alone, as of layers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def legend_above(figure: "Figure", shown: Sequence[Any]) -> None:
    """What the colours and marks stand for, above everything."""
    figure.legend(handles=shown, loc="outside upper left", ncols=5, handletextpad=0.4, columnspacing=1.2)
