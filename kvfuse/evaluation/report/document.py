"""A page as a list of blocks, written as one HTML file that needs nothing else, and as GitHub Markdown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Heading:
    """The page's title (level 1), or that of a section."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; ``lead`` is set in bold before it."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Facts:
    """Short pieces of information, each with its name."""

    facts: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``named`` columns hold words, the others figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    named: int = 1


@dataclass(frozen=True)
class Picture:
    """An SVG element and what it shows; Markdown leaves it out, since a table has the same figures."""

    svg: str
    caption: str

    @property
    def markup(self) -> Markup:
        """For the template, which escapes everything else."""
        return Markup(self.svg)


@dataclass(frozen=True)
class Code:
    """Text to be shown as it is."""

    text: str


Block = Heading | Text | Facts | Table | Picture | Code


def to_html(blocks: Sequence[Block]) -> str:
    """The page: no script, nothing loaded, light or dark as the reader has it."""
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        blocks=[(type(block).__name__, block) for block in blocks], title=_title(blocks)
    )


def to_markdown(blocks: Sequence[Block]) -> str:
    """The same without pictures."""
    return "\n\n".join(_markdown(block) for block in blocks if not isinstance(block, Picture)) + "\n"


def _title(blocks: Sequence[Block]) -> str:
    return next(block.text for block in blocks if isinstance(block, Heading))


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_plain(block.text)}"
        case Text():
            return f"**{_plain(block.lead)}** {_plain(block.text)}" if block.lead else _plain(block.text)
        case Facts():
            return "\n".join(f"- {_plain(name)}: {_plain(fact)}" for name, fact in block.facts.items())
        case Table():
            marks = ["---" if i < block.named else "---:" for i in range(len(block.header))]
            lines = [
                marks if row is None else [_plain(cell) for cell in row] for row in (block.header, None, *block.rows)
            ]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Code():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            return f"{fence}\n{block.text.rstrip()}\n{fence}"
    raise TypeError(f"expected a block of text, got {type(block).__name__}")


def _plain(text: str) -> str:
    """One line that Markdown shows as it is: what a model says is no markup."""
    return re.sub(r"([\\`*_<>|~]|(?<=\])\()", r"\\\1", " ".join(text.split()))
