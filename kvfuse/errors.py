"""Errors for users: each says what was expected, what was found and what to do. The command line prints one line."""

import difflib
from collections.abc import Iterable


class KVFuseError(Exception):
    """Base of every error that kvfuse raises on purpose."""


class PromptError(KVFuseError, ValueError):
    """A prompt that cannot be answered: empty, too long, or hidden by its template."""


class PairError(KVFuseError, ValueError):
    """Models, tokenizers or a fuser that do not fit together."""


class CheckpointError(KVFuseError, OSError):
    """A fuser folder that is missing, incomplete, damaged or of another format."""


class MethodError(KVFuseError, ValueError):
    """A method that is unknown, or lacks something it needs."""


class RecipeError(KVFuseError, ValueError):
    """A training recipe, or its data, that cannot be used."""


class EvaluationError(KVFuseError, ValueError):
    """Tasks, data or the folder of an evaluation that cannot be used, or a run without a single answer."""


class AnalysisError(KVFuseError, ValueError):
    """An analysis that is unknown, or that cannot be made of this pair or these runs."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to be quoted in another."""
    return str(error).strip().partition("\n")[0]


def nearest(name: str, names: Iterable[str]) -> str:
    """The name most similar to an unknown one, for "did you mean"; empty where there are no names."""
    return "".join(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0))
