"""Methods by name: built in, registered by hand, or offered by installed packages.

A package offers a method by an entry point of the group ``kvfuse.methods``: its name, and a function from a
:class:`MethodContext` to a :class:`Method`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from kvfuse.errors import MethodError, nearest
from kvfuse.language_model import LanguageModel
from kvfuse.methods.audit import DERANGEMENTS, AdapterOnly, Deranged, MomentMatched
from kvfuse.methods.augmented import FewShot
from kvfuse.methods.base import Method
from kvfuse.methods.cache_to_cache import Fused
from kvfuse.methods.calibrated import ANSWER, Calibrated, void_options
from kvfuse.methods.controls import Mismatched, ProjectedOnly, RandomFuser, Shuffled, Zeroed
from kvfuse.methods.routing import Cascade, Routed, Router
from kvfuse.methods.single import Single
from kvfuse.methods.text_to_text import HINT_REQUEST, Hybrid, TextToText
from kvfuse.model import CacheToCache
from kvfuse.prompts.messages import Message, Prompt
from kvfuse.support.plugins import find_plugin

GROUP = "kvfuse.methods"
CASCADE_SHARE = 0.5  # as in the paper


@dataclass(frozen=True)
class Unfused:
    """Models without a fuser between them: enough for the methods of :data:`WITHOUT_FUSER`."""

    receiver: LanguageModel
    sharers: Sequence[LanguageModel]


@dataclass(frozen=True, kw_only=True)
class MethodContext:
    """The options of all methods; each method takes those it needs.

    Attributes:
        models: The models, and the fusers where there are any.
        sharer: Index of the sharer that answers alone, is routed to and writes hints.
        hint_request: Prompt for a hint, with ``{question}``.
        hint_reading: Prompt with the hint, see :class:`TextToText`.
        hint_tokens: Maximum length of a hint.
        sees_options: Whether the sharer sees the options when it writes a hint; else ``without_options`` removes them.
        without_options: Removes the options from a prompt.
        router: Trained router, for ``routing``.
        share: Share of the questions for the sharer in ``routing`` and ``cascade``. Default: those that the router
            chooses, and half of them for ``cascade``, as in the paper.
        confidence: For ``cascade`` in place of a share: the probability below which the sharer answers.
        examples: Messages, for ``few-shot``.
        donor: For ``mismatched``: maps each prompt to the one that the sharers read instead.
        content_free: For ``calibrated``: maps each prompt to its content-free version.
        answer: For ``calibrated``: the answer to generate, with ``{letter}``.
        seed: Seed of random fusers and shuffled positions.
    """

    models: CacheToCache | Unfused
    sharer: int = 0
    hint_request: str = HINT_REQUEST
    hint_reading: str | None = None
    hint_tokens: int = 256
    sees_options: bool = True
    without_options: Callable[[Prompt], Prompt] | None = None
    router: Router | None = None
    share: float | None = None
    confidence: float | None = None
    examples: Sequence[Message] = ()
    donor: Callable[[Prompt], Prompt] | None = None
    content_free: Callable[[Prompt], Prompt] = void_options
    answer: str = ANSWER
    seed: int = 0

    @property
    def pair(self) -> CacheToCache:
        """The models and fusers. Raises MethodError where there are no fusers."""
        if isinstance(self.models, Unfused):
            raise MethodError("expected a fuser for a method that fuses, got models alone; name the fuser's folder")
        return self.models

    @property
    def receiver_alone(self) -> Single:
        """The method ``receiver``."""
        return Single("receiver", self.models.receiver)

    @property
    def sharer_alone(self) -> Single:
        """The method ``sharer``."""
        return Single("sharer", self.models.sharers[self.sharer])


MethodMaker = Callable[[MethodContext], Method]


def _few_shot(context: MethodContext) -> FewShot:
    if not context.examples:
        raise MethodError("expected examples for the method few-shot, got none; give messages of user and assistant")
    return FewShot(context.receiver_alone, context.examples)


def _text_to_text(context: MethodContext, kind: type[TextToText], reader: Method) -> TextToText:
    if not context.sees_options and context.without_options is None:
        raise MethodError(
            "expected a way to take the options off a prompt for sees_options=false, got none; give without_options"
        )
    return kind(
        reader,
        context.sharer_alone,
        request=context.hint_request,
        reading=context.hint_reading,
        hint_tokens=context.hint_tokens,
        without_options=None if context.sees_options else context.without_options,
    )


def _routing(context: MethodContext) -> Routed:
    if context.router is None:
        raise MethodError("expected a trained router for the method routing, got none; give router, or use cascade")
    receiver, sharer = context.receiver_alone, context.sharer_alone
    return Routed(receiver=receiver, sharer=sharer, router=context.router, share=context.share)


def _cascade(context: MethodContext) -> Cascade:
    receiver, sharer = context.receiver_alone, context.sharer_alone
    if context.confidence is not None:
        return Cascade(receiver=receiver, sharer=sharer, threshold=-context.confidence)
    return Cascade(receiver=receiver, sharer=sharer, share=CASCADE_SHARE if context.share is None else context.share)


def _deranged(seed: int, context: MethodContext) -> Deranged:
    return Deranged(context.pair, seed)


METHODS: dict[str, MethodMaker] = {
    "receiver": lambda context: context.receiver_alone,
    "sharer": lambda context: context.sharer_alone,
    "few-shot": _few_shot,
    "text-to-text": lambda context: _text_to_text(context, TextToText, context.receiver_alone),
    "routing": _routing,
    "cascade": _cascade,
    "cache-to-cache": lambda context: Fused(context.pair),
    "hybrid": lambda context: _text_to_text(context, Hybrid, Fused(context.pair)),
    "zeroed": lambda context: Zeroed(context.pair),
    "mismatched": lambda context: Mismatched(context.pair, context.donor),
    **{f"deranged-{seed}": partial(_deranged, seed) for seed in DERANGEMENTS},
    "adapter-only": lambda context: AdapterOnly(context.pair),
    "moment-matched": lambda context: MomentMatched(context.pair),
    "shuffled": lambda context: Shuffled(context.pair, context.seed),
    "random-fuser": lambda context: RandomFuser(context.pair, context.seed),
    "projected-only": lambda context: ProjectedOnly(context.pair),
    "calibrated": lambda context: Calibrated(context.receiver_alone, context.content_free, context.answer),
}
"""Name -> the function that makes the method: the built-in ones, and those registered so far."""


WITHOUT_FUSER = frozenset({"receiver", "sharer", "few-shot", "text-to-text", "routing", "cascade", "calibrated"})
"""The methods that need no fuser; one of another package may need one."""


def register_method(name: str, maker: MethodMaker) -> None:
    """Register a method under a name.

    Raises:
        MethodError: ``maker`` cannot be called, or the name is taken.
    """
    if not callable(maker):
        raise MethodError(
            f"expected a function from a MethodContext to a Method for {name!r}, got {maker!r}; write one"
        )
    if METHODS.setdefault(name, maker) is not maker:
        raise MethodError(f"expected a new method, got {name!r}, which is taken; choose another name")


def find_method(name: str) -> MethodMaker:
    """The function that makes a method, imported from the package that offers it.

    Raises:
        MethodError: The name is unknown.
    """
    return find_plugin(name, option="method", group=GROUP, known=METHODS, register=register_method, error=MethodError)


def make_method(name: str, pair: CacheToCache | Unfused, **options: Any) -> Method:
    """Make a method by its name.

    Args:
        name: A key of :data:`METHODS`, or the name of a method that an installed package offers.
        pair: The models and fusers; models alone for a method of :data:`WITHOUT_FUSER`.
        options: Fields of :class:`MethodContext`; those of other methods are ignored.

    Raises:
        MethodError: The name or an option is unknown (the message names the nearest), or the method lacks an option.
    """
    maker = find_method(name)
    known = [field.name for field in fields(MethodContext) if field.name != "models"]
    for option in options:
        if option not in known:
            raise MethodError(
                f"expected an option of methods, got the unknown {option!r}; did you mean {nearest(option, known)!r}?"
            )
    return maker(MethodContext(models=pair, **options))
