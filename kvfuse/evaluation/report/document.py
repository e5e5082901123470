"""A report as a list of blocks -> one self-contained HTML file, and GitHub Markdown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined


@dataclass(frozen=True)
class Heading:
    """The title of the page (level 1) or of a section."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, with ``lead`` in bold before it."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Facts:
    """A list of names and values."""

    facts: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """Cells as text. The first ``named`` columns hold words, the others figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    named: int = 1


@dataclass(frozen=True)
class Picture:
    """An SVG element with its caption. Markdown leaves it out, since a table has the same figures."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    text: str


Block = Heading | Text | Facts | Table | Picture | Code


def to_html(blocks: Sequence[Block]) -> str:
    """Returns the page: no scripts, no external resources, light or dark by the reader's preference."""
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    # everything but the SVG is escaped, and a missing variable is an error
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    title = next(block.text for block in blocks if isinstance(block, Heading))
    named = [(type(block).__name__, block) for block in blocks]
    return environment.from_string(template).render(blocks=named, title=title)


def to_markdown(blocks: Sequence[Block]) -> str:
    """Returns the blocks as Markdown, without pictures."""
    return "\n\n".join(_markdown(block) for block in blocks if not isinstance(block, Picture)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_plain(block.text)}"
        case Text():
            return f"**{_plain(block.lead)}** {_plain(block.text)}" if block.lead else _plain(block.text)
        case Facts():
            return "\n".join(f"- {_plain(name)}: {_plain(fact)}" for name, fact in block.facts.items())
        case Table():
            header, *rows = ([_plain(cell) for cell in row] for row in (block.header, *block.rows))
            rule = ["---" if i < block.named else "---:" for i in range(len(header))]  # figures to the right
            return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
        case Code():
            # a fence longer than any run of backticks within
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            return f"{fence}\n{block.text.rstrip()}\n{fence}"
    raise TypeError(f"expected a block of text, got {type(block).__name__}")


def _plain(text: str) -> str:
    """Returns the text as one line of Markdown in which nothing is markup: models may write anything."""
    return re.sub(r"([\\`*_<>|~]|(?<=\])\()", r"\\\1", " ".join(text.split()))
