"""Things found by name: built in, registered by hand, or offered by installed packages as entry points."""

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from kvfuse.errors import KVFuseError, nearest

T = TypeVar("T")


def find_plugin(
    name: str,
    *,
    option: str,
    group: str,
    known: Mapping[str, T],
    register: Callable[[str, Any], None],
    error: type[KVFuseError],
) -> T:
    """Look up a thing by name; a package's is imported when it is first asked for.

    Args:
        name: The name.
        option: The option that names it, for the message.
        group: The group of entry points.
        known: Those registered, by name; ``register`` adds to it.
        register: Checks and registers what a package offers.
        error: The class of the error to raise.

    Raises:
        KVFuseError: The name is unknown (the nearest is named), or a package offers something else.
    """
    # a package is imported only if its name is asked for
    offered = {point.name: point for point in entry_points(group=group)}
    if name not in known and name in offered:
        register(name, offered[name].load())
    if name not in known:
        names = sorted({*known, *offered})
        raise error(
            f"expected {option} to be one of {', '.join(names)}, got {name!r}; did you mean {nearest(name, names)!r}?"
        )
    return known[name]
