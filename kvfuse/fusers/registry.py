"""Fusers by kind: the built-in ones, those of installed packages, those registered by hand.

A package offers a fuser by an entry point of the group ``kvfuse.fusers``, its kind the name and its class the object.
It is imported when its kind is first asked for, by :func:`make_fuser`, a recipe or a fuser's folder.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from kvfuse.errors import PairError
from kvfuse.fusers.execution.quantized import quantized_class
from kvfuse.support.plugins import find_plugin

GROUP, PREFIX = "kvfuse.fusers", "kvfuse-"
FUSERS: dict[str, type[Any]] = {}
"""Kind -> class, of those that are loaded."""


def register_fuser(kind: str, cls: type[Any]) -> None:
    """Make a fuser known under a kind, to transformers too.

    Args:
        kind: The name that recipes use.
        cls: Its ``config_class`` has the ``model_type`` ``kvfuse-<kind>``, by which a saved fuser is found again.

    Raises:
        PairError: It is no fuser, its ``model_type`` is another, or the kind is taken.
    """
    config: Any = getattr(cls, "config_class", None)
    if not (_is_class(cls, PreTrainedModel) and _is_class(config, PreTrainedConfig)):
        raise PairError(
            f"expected a Fuser with a config_class of its own for the kind {kind!r}, got {cls!r}; subclass both"
        )
    if config.model_type != PREFIX + kind:
        raise PairError(
            f"expected {config.__name__}.model_type to be {PREFIX + kind!r}, got {config.model_type!r}; set it"
        )
    if FUSERS.setdefault(kind, cls) is not cls:
        raise PairError(
            f"expected a new fuser.kind, got {kind!r}, which is {FUSERS[kind].__name__}; choose another name"
        )
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, cls, exist_ok=True)


def fuser_class(kind: str) -> type[Any]:
    """The class of a kind.

    Raises:
        PairError: There is no such kind (the error names the nearest), or its package does not offer a fuser.
    """
    return find_plugin(kind, option="fuser.kind", group=GROUP, known=FUSERS, register=register_fuser, error=PairError)


def class_of(config: Mapping[str, Any]) -> type[Any]:
    """The class that a configuration asks for by its ``model_type`` and its ``weights``."""
    cls: Any = fuser_class(str(config["model_type"]).removeprefix(PREFIX))
    weights = config.get("weights", "full")
    return cls if weights == "full" else quantized_class(cls, weights)


def make_fuser(kind: str, **options: Any) -> Any:
    """A new fuser of a kind, its weights drawn from torch's global generator.

    Args:
        kind: See :func:`fuser_class`.
        options: Fields of its configuration.

    Raises:
        PairError: An unknown kind, or models that the kind cannot serve.
    """
    cls = class_of({"model_type": PREFIX + kind, **options})
    fuser = cls(cls.config_class(**options))
    fuser.reset_parameters()
    return fuser


def _is_class(cls: Any, base: type[Any]) -> bool:
    return isinstance(cls, type) and issubclass(cls, base)
