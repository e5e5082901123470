"""Methods by name: the built-in ones, those registered by hand, those of installed packages.

A package offers a method by an entry point of the group ``kvfuse.methods``: its name, and what makes it of a :class:`MethodContext`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvfuse.errors import MethodError, nearest
from kvfuse.methods.augmented import FewShot
from kvfuse.methods.base import Method
from kvfuse.methods.cache_to_cache import Fused
from kvfuse.methods.calibrated import Calibrated
from kvfuse.methods.controls import Mismatched, ProjectedOnly, RandomFuser, Shuffled, Zeroed
from kvfuse.methods.routing import Cascade, Routed, Router
from kvfuse.methods.single import Single
from kvfuse.methods.text_to_text import HINT_REQUEST, Hybrid, TextToText
from kvfuse.model import CacheToCache
from kvfuse.prompts.chat import Message, Prompt
from kvfuse.prompts.multiple_choice import ANSWER_STEM
from kvfuse.support.plugins import find_plugin

GROUP = "kvfuse.methods"


@dataclass(frozen=True, kw_only=True)
class MethodContext:
    """What methods are made of; each takes what it needs.

    Attributes:
        pair: The models and fusers.
        sharer: Which of several sharers answers alone, is routed to and writes hints.
        hint_request: What the sharer is asked for a hint, with ``{question}``.
        hint_reading: What a hint is read in, see :class:`TextToText`.
        hint_tokens: Longest hint.
        sees_options: Whether the sharer sees the options when it writes a hint; else ``without_options`` takes them away.
        without_options: Gives the prompt without its options.
        router: Trained, for ``routing``.
        share: Of the questions, those that ``routing`` and ``cascade`` have the sharer answer; by default as many as the router
            says, and for ``cascade`` half of them, as in the paper.
        confidence: For ``cascade`` in place of a share: the probability below which the sharer answers.
        examples: Messages, for ``few-shot``.
        donor: For ``mismatched``: gives for each prompt the one that the sharers read instead.
        content_free: For ``calibrated``: the prompt that says nothing.
        answer: For ``calibrated``: the answer to generate, with ``{letter}``.
        seed: Of what is drawn: random fusers, shuffled positions.
    """

    pair: CacheToCache
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
    content_free: Callable[[Prompt], Prompt] | None = None
    answer: str = f"{ANSWER_STEM} {{letter}}"
    seed: int = 0

    def single(self, role: str = "receiver") -> Single:
        """The receiver or the sharer alone."""
        return Single(role, self.pair.receiver if role == "receiver" else self.pair.sharers[self.sharer])

    def talking(self, kind: type[TextToText], reader: Method) -> TextToText:
        """A method in which the sharer writes hints."""
        if not self.sees_options and self.without_options is None:
            raise MethodError(
                "expected a way to take the options off a prompt for sees_options=false, got none; give without_options"
            )
        without = None if self.sees_options else self.without_options
        return kind(
            reader, self.single("sharer").model, self.hint_request, self.hint_reading, self.hint_tokens, without
        )

    def routed(self) -> Routed:
        """The method ``routing``."""
        if self.router is None:
            raise MethodError("expected a trained router for the method routing, got none; give router, or use cascade")
        return Routed(self.pair.receiver, self.pair.sharers[self.sharer], self.router, self.share)

    def cascade(self) -> Cascade:
        """The method ``cascade``."""
        share = 0.5 if self.share is None else self.share
        return Cascade(
            self.pair.receiver,
            self.pair.sharers[self.sharer],
            self.confidence,
            share if self.confidence is None else None,
        )

    def few_shot(self) -> FewShot:
        """The method ``few-shot``."""
        if not self.examples:
            raise MethodError(
                "expected examples for the method few-shot, got none; give messages of user and assistant"
            )
        return FewShot(self.single(), self.examples)


MethodMaker = Callable[[MethodContext], Method]
METHODS: dict[str, MethodMaker] = {
    "receiver": MethodContext.single,
    "sharer": lambda setting: setting.single("sharer"),
    "few-shot": MethodContext.few_shot,
    "text-to-text": lambda setting: setting.talking(TextToText, setting.single()),
    "routing": MethodContext.routed,
    "cascade": MethodContext.cascade,
    "cache-to-cache": lambda setting: Fused(setting.pair),
    "hybrid": lambda setting: setting.talking(Hybrid, Fused(setting.pair)),
    "zeroed": lambda setting: Zeroed(setting.pair),
    "mismatched": lambda setting: Mismatched(setting.pair, setting.donor),
    "shuffled": lambda setting: Shuffled(setting.pair, setting.seed),
    "random-fuser": lambda setting: RandomFuser(setting.pair, setting.seed),
    "projected-only": lambda setting: ProjectedOnly(setting.pair),
    "calibrated": lambda setting: Calibrated(setting.single(), setting.content_free, setting.answer),
}
"""Name -> what makes it, as far as they are loaded."""


def register_method(name: str, maker: MethodMaker) -> None:
    """Make a method known under a name.

    Raises:
        MethodError: It cannot be called, or the name is taken.
    """
    if not callable(maker):
        raise MethodError(
            f"expected a function from a MethodContext to a Method for {name!r}, got {maker!r}; write one"
        )
    if METHODS.setdefault(name, maker) is not maker:
        raise MethodError(f"expected a new method, got {name!r}, which is taken; choose another name")


def find_method(name: str) -> MethodMaker:
    """What makes a method, by its name, loading the package that offers it if need be. Raises MethodError: the name is unknown."""
    return find_plugin(name, "method", GROUP, METHODS, register_method, MethodError)


def make_method(name: str, pair: CacheToCache, **options: Any) -> Method:
    """A method by its name.

    Args:
        name: A key of :data:`METHODS`, or one that an installed package offers.
        pair: The models and fusers.
        options: Fields of :class:`MethodContext`, those of other methods too.

    Raises:
        MethodError: The name or an option is unknown (the nearest is told), or the method lacks an option.
    """
    maker = find_method(name)
    known = [field.name for field in fields(MethodContext) if field.name != "pair"]
    for option in options:
        if option not in known:
            raise MethodError(
                f"expected an option of methods, got the unknown {option!r}; did you mean {nearest(option, known)!r}?"
            )
    return maker(MethodContext(pair=pair, **options))
