"""Analyses by name; each is imported when it is asked for."""

import ast
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError, nearest
from kvfuse.support.config import override

ANALYSES = {
    "enrichment": "kvfuse.analysis.enrichment",
    "transformation": "kvfuse.analysis.transformation",
    "gates": "kvfuse.analysis.gates",
    "effective-rank": "kvfuse.analysis.effective_rank",
    "proportion": "kvfuse.analysis.proportion",
    "layers": "kvfuse.analysis.layers",
    "overlap": "kvfuse.analysis.overlap",
    "scaling": "kvfuse.analysis.scaling",
    "length": "kvfuse.analysis.length",
    "attention": "kvfuse.analysis.attention",
    "lens": "kvfuse.analysis.lens",
}
"""Name -> module, which has the function ``run`` and opens with the question that it answers."""


def analyze(name: str, study: Study, **options: Any) -> Finding:
    """Run an analysis.

    Args:
        name: A key of :data:`ANALYSES`.
        study: What is looked at.
        options: Those of the analysis.

    Raises:
        AnalysisError: The name or an option is unknown (the nearest is told), or the study lacks what it needs.
    """
    run = importlib.import_module(module_of(name)).run
    known = [option for option in inspect.signature(run).parameters if option != "study"]
    for option in options:
        if option not in known:
            told = f"did you mean {nearest(option, known)!r}?" if known else "it has none"
            raise AnalysisError(f"expected an option of the analysis {name}, got the unknown {option!r}; {told}")
    finding: Finding = run(study, **options)
    return finding


def module_of(name: str) -> str:
    """Where an analysis is. Raises AnalysisError: there is none of that name."""
    if name not in ANALYSES:
        raise AnalysisError(
            f"expected an analysis of {', '.join(ANALYSES)}, got {name!r}; did you mean {nearest(name, list(ANALYSES))!r}?"
        )
    return ANALYSES[name]


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Options from ``key=value`` words, values in YAML. Raises RecipeError where a word is none."""
    options: dict[str, Any] = {}
    override(options, words)
    return options


def question(name: str) -> str:
    """What an analysis answers: the first line of its file, which is not imported for it."""
    file = Path(__file__).with_name(module_of(name).rpartition(".")[2] + ".py")
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
