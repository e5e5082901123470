"""The errors users meet. Each says what was expected, what came and what to do; the command line prints them as one line."""

import difflib
from collections.abc import Iterable


class KVFuseError(Exception):
    """Base of every error that kvfuse raises on purpose."""


class PromptError(KVFuseError, ValueError):
    """A prompt that cannot be answered: empty, too long, or rendered by a template that hides it."""


class PairError(KVFuseError, ValueError):
    """Models, tokenizers or a fuser that do not fit together."""


class CheckpointError(KVFuseError, OSError):
    """A fuser folder that is missing, incomplete, damaged or of another format."""


class MethodError(KVFuseError, ValueError):
    """A way to answer that is unknown, or lacks something it needs."""


class RecipeError(KVFuseError, ValueError):
    """A training recipe or its data that cannot be used."""


class EvaluationError(KVFuseError, ValueError):
    """An evaluation's tasks, data or folder that cannot be used, or a run in which nothing was answered."""


class AnalysisError(KVFuseError, ValueError):
    """An analysis that is unknown, or asked about something that it cannot answer."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to be quoted in one of ours."""
    return str(error).strip().partition("\n")[0]


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that looks most like an unknown one, for "did you mean"; empty where there are no names."""
    return "".join(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0))
