"""Observe modules while they run, by forward hooks that always come off."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Observer = Callable[[tuple[Any, ...], Any], None]
"""Called with a module's arguments, positional ones first, and its output."""


@contextmanager
def observe(observers: Mapping[nn.Module, Observer]) -> Iterator[None]:
    """While open, call a module's observer after each of its runs."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        observers[module]((*args, *kwargs.values()), output)

    # the stack removes every hook, whatever happens while it is open
    with ExitStack() as hooks:
        for module in observers:
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield
