"""What ``kvfuse eval`` reads of a recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kvfuse.errors import RecipeError
from kvfuse.evaluation.predictions import Published
from kvfuse.evaluation.report.published_figures import as_rows
from kvfuse.methods import find_method
from kvfuse.support.config import Section, check, read_recipe

FOREIGN_SECTIONS = ("fuser", "data", "train", "token_alignment")
CONTROLS = ("zeroed", "mismatched", "shuffled", "random-fuser", "projected-only", "calibrated")


Tables = Annotated[list[Published], BeforeValidator(as_rows)]


class PairSection(Section):
    """``evaluation.pairs``: one of several pairs, each a run of its own; what it leaves out is the recipe's."""

    name: str = Field(min_length=1)
    """Of its folder."""
    receiver: str | None = None
    sharer: str | list[str] | None = None
    fusers: list[str | list[str]] = Field(default_factory=list)
    """Folders or Hub ids, one per training seed; where there are several sharers, a list of one fuser for each."""
    subfolder: str | list[str] = ""
    """Inside of the fusers' repositories."""
    fusion: Literal["parallel", "sequential"] | None = None
    """In place of the recipe's."""
    tasks: list[str] = Field(default_factory=list)
    """In place of the recipe's."""
    data: Path | None = None
    """In place of the recipe's."""
    methods: list[str] = Field(default_factory=list)
    """In place of the recipe's."""
    max_new_tokens: int | None = Field(None, ge=1)
    """In place of the recipe's."""
    published: Tables = Field(default_factory=list)
    """Figures of a paper for this pair; see :func:`kvfuse.evaluation.report.published_figures.as_rows`."""
    why_not: str = ""
    """Why this pair cannot be run as published. It is told and nothing is run, unless ``fusers`` names folders and they are there."""

    @property
    def can_run(self) -> bool:
        """Whether there is what it takes, as far as the recipe knows."""
        sources = [one for seed in self.fusers for one in ([seed] if isinstance(seed, str) else seed)]
        return not self.why_not or (bool(sources) and all(Path(one).is_dir() for one in sources))


class EvaluationSection(Section):
    """``evaluation``: who is asked what."""

    fusers: list[str | list[str]] = Field(default_factory=list)
    """Folders or Hub ids, one per training seed; by default the one that the recipe trains."""
    subfolder: str | list[str] = ""
    """Inside of the fusers' repositories."""
    fusion: Literal["parallel", "sequential"] = "parallel"
    """How several sharers come together."""
    tasks: list[str] = Field(min_length=1)
    """See ``kvfuse list tasks``."""
    methods: list[str] = Field(["receiver", "sharer", "text-to-text", "cache-to-cache"], min_length=1)
    """See ``kvfuse list methods``."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of the methods (:class:`kvfuse.methods.MethodContext`); ``router`` is a file."""
    examples: Path | None = None
    """JSON lines of ``prompt`` and ``response``: what ``few-shot`` reads before each question, the first ``shots`` of them."""
    shots: int = Field(5, ge=1)
    data: Path | None = None
    """Folder of the tasks' files; by default they come from the Hub."""
    template: Path | None = None
    """Jinja file in place of the tasks' prompts."""
    only: list[str] = Field(default_factory=list)
    """Subjects, locales or kinds of question."""
    limit: int | None = Field(None, ge=1)
    """Questions per task."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer, in place of the tasks' own."""
    chat: bool = True
    """Ask through each model's chat template, or as plain text."""
    harness_tasks: bool = False
    """Know the tasks of lm-evaluation-harness by name, too."""
    batch_size: int = Field(8, ge=1)
    timed: int = Field(60, ge=0)
    """Questions asked one at a time, methods by turns, for the clock."""
    pairs: list[PairSection] = Field(default_factory=list)
    """Several pairs, side by side; by default the recipe's own alone."""
    published: Tables = Field(default_factory=list)
    """Figures of a paper to stand beside the measured ones; see :func:`kvfuse.evaluation.report.published_figures.as_rows`."""
    note: str = ""
    """What a reader must know first; reports begin with it."""


class EvaluationRecipe(Section):
    """A pair and how it is evaluated."""

    receiver: str | None = None
    """Folder or Hub id; by default the one that the fuser names."""
    sharer: str | list[str] | None = None
    """Likewise, one or several."""
    output: Path | None = None
    """Where ``kvfuse train`` has put the fuser."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the models are loaded as."""
    evaluation: EvaluationSection

    def with_controls(self, controls: Sequence[str]) -> "EvaluationRecipe":
        """The same with some of :data:`CONTROLS` added to its methods."""

        def more(methods: Sequence[str]) -> dict[str, list[str]]:
            return {"methods": list(dict.fromkeys([*methods, *controls]))}

        section = self.evaluation
        pairs = [pair.model_copy(update=more(pair.methods)) if pair.methods else pair for pair in section.pairs]
        return self.model_copy(
            update={"evaluation": section.model_copy(update={**more(section.methods), "pairs": pairs})}
        )

    def runs(self) -> list["EvaluationRecipe"]:
        """The recipe of each pair, without :attr:`EvaluationSection.pairs`."""
        return [self._of(pair) for pair in self.evaluation.pairs] or [self]

    def fusers(self) -> list[str | list[str]]:
        """The fusers, one or several for each seed. Raises RecipeError where none is named."""
        if self.evaluation.fusers:
            return self.evaluation.fusers
        if self.output is None:
            raise RecipeError(
                "expected evaluation.fusers, or output where one was trained, got none; name the folder of a fuser"
            )
        return [str(self.output / "fuser")]

    def _of(self, pair: PairSection) -> "EvaluationRecipe":
        instead = {key: value for key, value in pair if value and key not in ("name", "receiver", "sharer", "why_not")}
        if pair.fusers:
            instead["subfolder"] = pair.subfolder
        section = self.evaluation.model_copy(update={**instead, "pairs": []})
        mine = {"receiver": pair.receiver or self.receiver, "sharer": pair.sharer or self.sharer, "evaluation": section}
        return self.model_copy(update=mine)


def load_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> EvaluationRecipe:
    """Read a recipe and the ``key=value`` words after it, e.g. ``evaluation.limit=100``; relative paths are those of the shell.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown (the nearest is named), or a value is wrong.
        MethodError: A method is unknown.
    """
    recipe = check(read_recipe(path, overrides), EvaluationRecipe, FOREIGN_SECTIONS)
    for run in recipe.runs():
        for name in run.evaluation.methods:
            find_method(name)
    return recipe
