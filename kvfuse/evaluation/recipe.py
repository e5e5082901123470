"""The sections of a recipe that ``kvfuse eval`` reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kvfuse.errors import RecipeError
from kvfuse.evaluation.predictions import Published
from kvfuse.evaluation.report.published_figures import as_rows
from kvfuse.methods import WITHOUT_FUSER, find_method
from kvfuse.methods.audit import DERANGEMENTS
from kvfuse.prompts.chat_options import ChatOptionKeys
from kvfuse.support.config import Section, check, read_recipe

FOREIGN_SECTIONS = ("fuser", "data", "train", "token_alignment")
AUDIT = (
    "receiver",
    "sharer",
    "text-to-text",
    "cache-to-cache",
    *(f"deranged-{seed}" for seed in DERANGEMENTS),
    "adapter-only",
    "zeroed",
    "moment-matched",
    "random-fuser",
)
"""The methods of ``kvfuse eval --audit``."""
CONTROLS = ("zeroed", "mismatched", "shuffled", "random-fuser", "projected-only", "calibrated")

Fusers = list[str | list[str]]
"""Folders or Hub ids, one per training seed; with several sharers, a list of one fuser per sharer for each seed."""
Tables = Annotated[list[Published], BeforeValidator(as_rows)]
"""See :func:`kvfuse.evaluation.report.published_figures.as_rows`."""


class PairSection(Section):
    """``evaluation.pairs``: one of several pairs, each with its own run. Keys that it leaves out are the recipe's."""

    name: str = Field(min_length=1)
    """Name of the pair's folder."""
    receiver: str | None = None
    sharer: str | list[str] | None = None
    fusers: Fusers = Field(default_factory=list)
    """Fusers of this pair, as in :class:`EvaluationSection`."""
    subfolder: str | list[str] = ""
    """Folder within the fusers' repositories."""
    fusion: Literal["parallel", "sequential"] | None = None
    tasks: list[str] = Field(default_factory=list)
    data: Path | None = None
    methods: list[str] = Field(default_factory=list)
    max_new_tokens: int | None = Field(None, ge=1)
    published: Tables = Field(default_factory=list)
    """Published figures for this pair."""
    why_not: str = ""
    """Why this pair cannot be run as published: printed, and the pair skipped unless its fusers exist locally."""

    @property
    def can_run(self) -> bool:
        """Whether all fusers are available, as far as the recipe says."""
        sources = [source for seed in self.fusers for source in ([seed] if isinstance(seed, str) else seed)]
        return not self.why_not or (bool(sources) and all(Path(source).is_dir() for source in sources))


class EvaluationSection(Section):
    """``evaluation``: methods, tasks and the form of the questions."""

    fusers: Fusers = Field(default_factory=list)
    """Folders or Hub ids, see :data:`Fusers`; by default the fuser that the recipe trains."""
    subfolder: str | list[str] = ""
    """Folder within the fusers' repositories."""
    fusion: Literal["parallel", "sequential"] = "parallel"
    """Combination of several sharers."""
    tasks: list[str] = Field(min_length=1)
    """See ``kvfuse list tasks``."""
    methods: list[str] = Field(["receiver", "sharer", "text-to-text", "cache-to-cache"], min_length=1)
    """See ``kvfuse list methods``."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the methods (:class:`kvfuse.methods.MethodContext`); ``router`` is a file."""
    examples: Path | None = None
    """JSON lines of ``prompt`` and ``response``: the first ``shots`` precede each question of ``few-shot``."""
    shots: int = Field(5, ge=1)
    """Number of examples of ``few-shot``."""
    data: Path | None = None
    """Folder of the tasks' files; by default they come from the Hub."""
    template: Path | None = None
    """Jinja file in place of the tasks' prompts."""
    only: list[str] = Field(default_factory=list)
    """Subjects, locales or kinds of question to ask."""
    limit: int | None = Field(None, ge=1)
    """Number of questions per task."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Maximal length of an answer, in place of the tasks' own."""
    chat: bool = True
    """Ask through each model's chat template, or as plain text."""
    harness_tasks: bool = False
    """Find the tasks of lm-evaluation-harness, too."""
    batch_size: int = Field(8, ge=1)
    """Number of questions per batch."""
    timed: int = Field(60, ge=0)
    """Number of questions to time, one at a time and the methods in turns."""
    pairs: list[PairSection] = Field(default_factory=list)
    """Several pairs to compare; by default only the recipe's own."""
    published: Tables = Field(default_factory=list)
    """Published figures to compare with the measured ones."""
    note: str = ""
    """Note that reports begin with."""


class EvaluationRecipe(ChatOptionKeys):
    """A pair and its evaluation."""

    receiver: str | None = None
    """Folder or Hub id; by default the model that the fuser names."""
    sharer: str | list[str] | None = None
    """Folder or Hub id, or one per fuser; by default the models that the fusers name."""
    output: Path | None = None
    """Folder in which ``kvfuse train`` put the fuser."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the models."""
    evaluation: EvaluationSection

    def with_controls(self, controls: Sequence[str]) -> "EvaluationRecipe":
        """Returns the same recipe with some of :data:`CONTROLS`, or :data:`AUDIT`, added to its methods."""

        def add(section: Any) -> Any:
            return section.model_copy(update={"methods": list(dict.fromkeys([*section.methods, *controls]))})

        # a pair without methods takes the recipe's
        pairs = [add(pair) if pair.methods else pair for pair in self.evaluation.pairs]
        section = add(self.evaluation).model_copy(update={"pairs": pairs})
        return self.model_copy(update={"evaluation": section})

    def runs(self) -> list["EvaluationRecipe"]:
        """Returns a recipe per pair, without :attr:`EvaluationSection.pairs`."""
        return [self._of(pair) for pair in self.evaluation.pairs] or [self]

    @property
    def fuse(self) -> bool:
        """Whether a fuser is needed, by a method or to name the models."""
        methods = set(self.evaluation.methods)
        return not (methods <= WITHOUT_FUSER and self.receiver is not None and self.sharer is not None)

    def fusers(self) -> Fusers:
        """Returns the fusers, one or several for each seed; none where none is named nor needed.

        Raises:
            RecipeError: None is named, and a method needs one, or the models are not named either.
        """
        if self.evaluation.fusers:
            return self.evaluation.fusers
        if self.output is not None:
            return [str(self.output / "fuser")]
        if self.fuse:
            raise RecipeError(
                "expected evaluation.fusers, or output where one was trained, got none; name the folder of a fuser, "
                "or receiver and sharer for methods that fuse nothing"
            )
        return []

    def _of(self, pair: PairSection) -> "EvaluationRecipe":
        # keys that the pair sets replace the recipe's
        own = {key: value for key, value in pair if value and key not in ("name", "receiver", "sharer", "why_not")}
        if pair.fusers:  # which lie elsewhere than the recipe's
            own["subfolder"] = pair.subfolder
        section = self.evaluation.model_copy(update={**own, "pairs": []})
        models = {"receiver": pair.receiver or self.receiver, "sharer": pair.sharer or self.sharer}
        return self.model_copy(update={**models, "evaluation": section})


def load_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> EvaluationRecipe:
    """Read a recipe with ``key=value`` overrides, e.g. ``evaluation.limit=100``.

    Relative paths are relative to the working directory.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown (the nearest is named), or a value is wrong.
        MethodError: A method is unknown.
    """
    recipe = check(read_recipe(path, overrides), EvaluationRecipe, FOREIGN_SECTIONS)
    # unknown methods are found before any data or model is loaded
    for run in recipe.runs():
        for name in run.evaluation.methods:
            find_method(name)
    return recipe
