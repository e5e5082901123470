"""Fusers by kind: the built-in ones, those of installed packages, those registered by hand.

A package offers a fuser by an entry point of the group ``kvfuse.fusers``, its kind the name and its class the object. It is
imported when its kind is first asked for, by :func:`make_fuser`, a recipe or a fuser's folder.
"""

from typing import Any

from transformers import AutoConfig, AutoModel

from kvfuse.errors import PairError
from kvfuse.fusers.base import Fuser, FuserConfig
from kvfuse.fusers.c2c import C2CFuser
from kvfuse.fusers.c2c_complex import C2CComplexFuser
from kvfuse.fusers.low_rank import LowRankFuser
from kvfuse.fusers.ridge import RidgeFuser
from kvfuse.support.plugins import find_plugin

GROUP, PREFIX = "kvfuse.fusers", "kvfuse-"
FUSERS: dict[str, type[Fuser]] = {}
"""Kind -> class, as far as they are loaded."""


def register_fuser(kind: str, cls: type[Fuser]) -> None:
    """Make a fuser known under a kind, to transformers too.

    Args:
        kind: What recipes call it.
        cls: Its ``config_class`` has the ``model_type`` ``kvfuse-<kind>``, by which a saved fuser is found again.

    Raises:
        PairError: It is no fuser, its ``model_type`` is another, or the kind is taken.
    """
    config = getattr(cls, "config_class", None)
    if not (
        isinstance(cls, type)
        and issubclass(cls, Fuser)
        and isinstance(config, type)
        and issubclass(config, FuserConfig)
    ):
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


def fuser_class(kind: str) -> type[Fuser]:
    """The class of a kind.

    Raises:
        PairError: There is no such kind (the nearest is named), or its package does not offer a fuser.
    """
    return find_plugin(kind, option="fuser.kind", group=GROUP, known=FUSERS, register=register_fuser, error=PairError)


def make_fuser(kind: str, **options: Any) -> Fuser:
    """A new fuser of a kind, its weights drawn from torch's global generator.

    Args:
        kind: See :func:`fuser_class`.
        options: Fields of its configuration.

    Raises:
        PairError: An unknown kind, or models that the kind cannot serve.
    """
    cls = fuser_class(kind)
    fuser = cls(cls.config_class(**options))
    fuser.reset_parameters()
    return fuser


for _kind, _cls in {
    "c2c": C2CFuser,
    "c2c-complex": C2CComplexFuser,
    "low-rank": LowRankFuser,
    "ridge": RidgeFuser,
}.items():
    register_fuser(_kind, _cls)
