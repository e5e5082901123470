"""Which sharer layer feeds each receiver layer (paper, A.1.1)."""

from collections.abc import Sequence

from kvfuse.errors import PairError

LAYER_ALIGNMENTS = ("terminal", "depth-normalized")


def align_layers(num_receiver: int, num_sharer: int, how: str | Sequence[int] = "terminal") -> list[int]:
    """Name a sharer layer for every receiver layer.

    Args:
        num_receiver: Number of receiver layers with a KV-cache.
        num_sharer: Number of sharer layers with a KV-cache.
        how: ``terminal`` pairs last with last and goes down, the shallow end repeats (used for every published fuser);
            ``depth-normalized`` pairs layers of equal relative depth (Eq. 5); or one sharer layer per receiver layer.

    Raises:
        PairError: An unknown name, or a list that does not fit the models.

    >>> align_layers(3, 6)
    [3, 4, 5]
    >>> align_layers(4, 2)
    [0, 0, 0, 1]
    >>> align_layers(3, 5, "depth-normalized")
    [0, 2, 4]
    """
    if how == "terminal":
        return [max(layer + num_sharer - num_receiver, 0) for layer in range(num_receiver)]
    if how == "depth-normalized":
        return [round(layer * (num_sharer - 1) / max(num_receiver - 1, 1)) for layer in range(num_receiver)]
    if isinstance(how, str):
        raise PairError(
            f"expected layer_alignment to be one of {', '.join(LAYER_ALIGNMENTS)} or a list, got {how!r}; choose one"
        )
    if len(how) != num_receiver or not all(0 <= layer < num_sharer for layer in how):
        raise PairError(
            f"expected {num_receiver} sharer layers between 0 and {num_sharer - 1}, got {list(how)}; "
            "name one per receiver layer"
        )
    return list(how)
