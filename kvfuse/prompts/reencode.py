"""The paper's token alignment: every receiver token of a message, decoded alone, encoded again as one sharer token.

Kept for fusers trained that way. Text is lost where a token has no single counterpart: a piece of a character is decoded to
U+FFFD, and of several sharer tokens only one is kept. A table receiver id -> sharer id, built once per pair, says all of it.

The reference pads the shorter of two template sections, so that a message has the same positions in both models. Here nothing
is padded, but the same positions are skipped, for both models' keys are rotated by them. (At the end of a prompt the reference
may pad the receiver too, and then generates from padding; here it never does.)
"""

from threading import Lock
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase

REENCODINGS = ("reencode-first", "reencode-longest")
ROLES = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")

_Tables = WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, int, int], np.ndarray]]
_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, _Tables] = WeakKeyDictionary()
_LOCK = Lock()


def reencoding(receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, how: str) -> np.ndarray:
    """The sharer id that stands for each receiver id; built in a few seconds, then kept while both tokenizers live.

    Args:
        receiver: The receiver's fast tokenizer.
        sharer: The sharer's.
        how: One of :data:`REENCODINGS`: of several sharer tokens the first, or the one whose text is longest (ties to the first).

    Returns:
        ``(receiver's vocabulary,)`` int64, read-only.
    """
    key = (how, len(receiver), len(sharer))  # tokens may be added to a tokenizer
    with _LOCK:
        tables = _TABLES.setdefault(receiver, WeakKeyDictionary()).setdefault(sharer, {})
        if key not in tables:
            tables[key] = _build(receiver, sharer, how)
        return tables[key]


def splice(
    ids: np.ndarray, places: np.ndarray, their_ids: np.ndarray, their_places: np.ndarray, table: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sharer's own template tokens, with the receiver's message tokens, re-encoded, between them.

    Args:
        ids: ``(n,)`` int64, the receiver's.
        places: ``(n,)`` int64, never decreasing: 2k for a template token before message k, 2k + 1 for a token of message k.
        their_ids: ``(m,)`` int64, the sharer's reading of the same prompt.
        their_places: ``(m,)`` int64, likewise.
        table: :func:`reencoding`.

    Returns:
        What the sharer reads; where each of these tokens stands, like ``places``; and for each receiver token the one of them
        to read, ``(n,)``: its own counterpart, or for a template token the sharer's last template token at the same place
        (-1: none so far). All int64.
    """
    template, message = their_places % 2 == 0, places % 2 == 1
    merged = np.concatenate([their_places[template], places[message]])
    order = np.argsort(merged, kind="stable")
    index = np.searchsorted(merged[order], places, side="right") - 1
    index[message] = np.flatnonzero(order >= template.sum())
    return np.concatenate([their_ids[template], table[ids[message]]])[order], merged[order], index


def common_positions(places: np.ndarray, their_places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of both tokenizations where each section takes up as many as the longer of the two.

    Args:
        places: ``(n,)`` int64, never decreasing, where the receiver's tokens stand.
        their_places: ``(m,)`` int64, likewise the sharer's.

    Returns:
        ``(n,)`` and ``(m,)`` int64.
    """
    last = max(places.max(initial=0), their_places.max(initial=0))
    sizes = np.maximum(*(np.bincount(one, minlength=last + 1) for one in (places, their_places)))
    starts = np.cumsum(sizes) - sizes
    mine, theirs = (starts[one] + np.arange(len(one)) - np.searchsorted(one, one) for one in (places, their_places))
    return mine, theirs


def _build(receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, how: str) -> np.ndarray:
    unknown = sharer.unk_token_id or 0
    lengths = [len(text) if how == "reencode-longest" else 0 for text in _texts(sharer)]  # all equal: the first
    table = np.array(
        [max(pieces, key=lengths.__getitem__, default=unknown) for pieces in _encode(sharer, _texts(receiver))]
    )
    for token in receiver.all_special_ids:
        table[token] = _counterpart(token, receiver, sharer, unknown)
    table.flags.writeable = False  # shared by all threads
    return table


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each id, alone; the backend is three times as fast as ``batch_decode``."""
    size = max(tokenizer.get_vocab().values()) + 1
    return tokenizer.backend_tokenizer.decode_batch([[token] for token in range(size)], skip_special_tokens=False)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    backend = tokenizer.backend_tokenizer
    if backend.padding or backend.truncation:  # left over from an earlier call; the next call sets its own
        backend.no_padding()
        backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _counterpart(token: int, receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, unknown: int) -> int:
    """The sharer's special token of the same role, else of the same name."""
    for role in ROLES:
        if getattr(receiver, role) == token and getattr(sharer, role) is not None:
            return getattr(sharer, role)
    return sharer.get_vocab().get(receiver.convert_ids_to_tokens(token), unknown)
