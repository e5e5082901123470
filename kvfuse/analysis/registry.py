"""Analyses by name; a module is imported when its analysis runs."""

import ast
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfuse.errors import AnalysisError, nearest
from kvfuse.support.config import override

if TYPE_CHECKING:  # both load torch
    from kvfuse.analysis.finding import Finding
    from kvfuse.analysis.study import Study

# in the order of the paper's sections, as `kvfuse list analyses` prints them
NAMES = (
    "enrichment",
    "transformation",
    "gates",
    "effective-rank",
    "proportion",
    "layers",
    "overlap",
    "scaling",
    "length",
    "attention",
    "lens",
)
ANALYSES = {name: f"kvfuse.analysis.{name.replace('-', '_')}" for name in NAMES}
"""Name -> module with a function ``run``; the first line of the module is the question that it answers."""


def analyze(name: str, study: "Study", **options: Any) -> "Finding":
    """Run an analysis.

    Args:
        name: A key of :data:`ANALYSES`.
        study: The pair and the questions.
        options: Keyword arguments of the analysis.

    Raises:
        AnalysisError: The name or an option is unknown (the message names the nearest), or the study lacks what it
            needs.
    """
    # import only now: most analyses load torch, some scikit-learn
    run = importlib.import_module(module_of(name)).run
    known = [option for option in inspect.signature(run).parameters if option != "study"]
    for option in options:
        if option not in known:
            hint = f"did you mean {nearest(option, known)!r}?" if known else "it has none"
            raise AnalysisError(f"expected an option of the analysis {name}, got the unknown {option!r}; {hint}")
    finding: Finding = run(study, **options)
    return finding


def module_of(name: str) -> str:
    """Returns the module of an analysis. Raises AnalysisError where the name is unknown."""
    if name not in ANALYSES:
        hint = f"did you mean {nearest(name, ANALYSES)!r}?"
        raise AnalysisError(f"expected an analysis of {', '.join(ANALYSES)}, got {name!r}; {hint}")
    return ANALYSES[name]


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Returns options from ``key=value`` words, with values in YAML. Raises RecipeError where a word has no ``=``."""
    options: dict[str, Any] = {}
    override(options, words)
    return options


def question(name: str) -> str:
    """Returns the question of an analysis: the first line of its module, read without importing it."""
    # parsed, because importing a module loads torch
    file = Path(__file__).with_name(module_of(name).rpartition(".")[2] + ".py")
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
