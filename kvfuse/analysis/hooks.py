"""Watching modules while they run, by hooks that always come off."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Note = Callable[[Any, Any], None]
"""Given a module's inputs, by position or by name, and its output."""


@contextmanager
def watching(notes: dict[nn.Module, Note]) -> Iterator[None]:
    """Tell, each time one of these modules has run, what it read and what it gave.

    Args:
        notes: By module, who is told.
    """
    with ExitStack() as hooks:
        for module, note in notes.items():
            hooks.callback(
                module.register_forward_hook(
                    lambda _, args, kwargs, output, note=note: note(args or kwargs, output), with_kwargs=True
                ).remove
            )
        yield
