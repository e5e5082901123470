"""Things found by name: the built-in ones, those registered by hand, those that installed packages offer by entry points."""

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from kvfuse.errors import KVFuseError, nearest

T = TypeVar("T")


def find_plugin(
    name: str,
    what: str,
    group: str,
    known: Mapping[str, T],
    register: Callable[[str, Any], None],
    error: type[KVFuseError],
) -> T:
    """Look a thing up, importing it from the package that offers it when it is first asked for.

    Args:
        name: What it is called.
        what: What the option that names it is called, for the message.
        group: The group of entry points.
        known: Those registered, by name; ``register`` adds to it.
        register: Checks and registers what a package offers.
        error: What to raise.

    Raises:
        KVFuseError: There is none of that name (the nearest is told), or a package offers something else.
    """
    offered = {point.name: point for point in entry_points(group=group)}
    if name not in known and name in offered:
        register(name, offered[name].load())
    if name not in known:
        names = sorted({*known, *offered})
        raise error(
            f"expected {what} to be one of {', '.join(names)}, got {name!r}; did you mean {nearest(name, names)!r}?"
        )
    return known[name]
