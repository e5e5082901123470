"""The paper's token alignment: every receiver token of a message, decoded alone, encoded again as one sharer token.

Kept for fusers trained that way. Text is lost where a token has no single counterpart: a piece of a character is
decoded to U+FFFD, and of several sharer tokens only one is kept. A table receiver id -> sharer id, built once per pair,
holds all of it.

The reference pads the shorter of two template sections, so that a message has the same positions in both models. Here
nothing is padded, but the same positions are skipped, because both models' keys are rotated by them. (At the end of a
prompt the reference may pad the receiver too, and then generates from padding; here it never does.)
"""

from threading import Lock
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvfuse.prompts.tokenized import backend

REENCODINGS = ("reencode-first", "reencode-longest")
ROLES = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")

_Tables = WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, int, int], np.ndarray]]
_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, _Tables] = WeakKeyDictionary()
_LOCK = Lock()


def reencoding(*, receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, strategy: str) -> np.ndarray:
    """The sharer id that stands for each receiver id; built in a few seconds, then kept while both tokenizers live.

    Args:
        receiver: The receiver's fast tokenizer.
        sharer: The sharer's.
        strategy: One of :data:`REENCODINGS`: of several sharer tokens the first, or the one with the longest text (ties
            to the first).

    Returns:
        ``(receiver's vocabulary,)`` int64, read-only.
    """
    key = (strategy, len(receiver), len(sharer))  # tokens may be added to a tokenizer
    with _LOCK:
        tables = _TABLES.setdefault(receiver, WeakKeyDictionary()).setdefault(sharer, {})
        if key not in tables:
            tables[key] = _build(receiver=receiver, sharer=sharer, strategy=strategy)
        return tables[key]


def splice(
    *,
    receiver_ids: np.ndarray,
    receiver_sections: np.ndarray,
    sharer_ids: np.ndarray,
    sharer_sections: np.ndarray,
    table: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sharer's own template tokens, with the receiver's message tokens, re-encoded, between them.

    Args:
        receiver_ids: ``(n,)`` int64.
        receiver_sections: ``(n,)`` int64, never decreasing: 2k for a template token before message k, 2k + 1 for a
            token of message k.
        sharer_ids: ``(m,)`` int64, the sharer's tokenization of the same prompt.
        sharer_sections: ``(m,)`` int64, likewise.
        table: :func:`reencoding`.

    Returns:
        The ids that the sharer reads; the section of each; and for each receiver token the index of the one to read,
        ``(n,)``: its own counterpart, or for a template token the sharer's last template token of the same section (-1:
        none so far). All int64.
    """
    # 1) Template tokens of the sharer, then message tokens of the receiver, sorted by section
    template, message = sharer_sections % 2 == 0, receiver_sections % 2 == 1
    merged = np.concatenate([sharer_sections[template], receiver_sections[message]])
    order = np.argsort(merged, kind="stable")
    ids = np.concatenate([sharer_ids[template], table[receiver_ids[message]]])[order]
    # 2) A template token reads the last token up to its section, a message token its counterpart
    index = np.searchsorted(merged[order], receiver_sections, side="right") - 1
    index[message] = np.flatnonzero(order >= template.sum())
    return ids, merged[order], index


def common_positions(*, receiver_sections: np.ndarray, sharer_sections: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of both tokenizations where each section takes up as many as the longer of the two.

    Args:
        receiver_sections: ``(n,)`` int64, never decreasing, the section of each receiver token.
        sharer_sections: ``(m,)`` int64, likewise the sharer's.

    Returns:
        ``(n,)`` and ``(m,)`` int64.
    """
    both = receiver_sections, sharer_sections
    last = max(sections.max(initial=0) for sections in both)
    sizes = np.maximum(*(np.bincount(sections, minlength=last + 1) for sections in both))
    starts = np.cumsum(sizes) - sizes
    # the start of a token's section, and its number within the section
    receiver, sharer = (
        starts[sections] + np.arange(len(sections)) - np.searchsorted(sections, sections) for sections in both
    )
    return receiver, sharer


def _build(*, receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, strategy: str) -> np.ndarray:
    unknown = sharer.unk_token_id or 0
    # 1) Each receiver token as text, encoded again: of several pieces the first, or the longest
    lengths = [len(text) if strategy == "reencode-longest" else 0 for text in _texts(sharer)]  # all equal: the first
    encoded = backend(sharer).encode_batch_fast(_texts(receiver), add_special_tokens=False)
    table = np.array([max(pieces.ids, key=lengths.__getitem__, default=unknown) for pieces in encoded])
    # 2) Special tokens are matched by role, else by name
    for token in receiver.all_special_ids:
        role = next(
            (role for role in ROLES if getattr(receiver, role) == token and getattr(sharer, role) is not None), ""
        )
        name = receiver.convert_ids_to_tokens(token)
        table[token] = getattr(sharer, role) if role else sharer.get_vocab().get(name, unknown)
    table.flags.writeable = False  # shared by all threads
    return table


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each id, alone; the backend is three times as fast as ``batch_decode``."""
    size = max(tokenizer.get_vocab().values()) + 1
    return backend(tokenizer).decode_batch([[token] for token in range(size)], skip_special_tokens=False)
