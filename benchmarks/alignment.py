"""Speed of token alignment next to the tokenizers' own time, on texts of 1,000 to 1,000,000 characters.

python -m benchmarks.alignment --receiver FOLDER --sharer FOLDER [--json FILE]
"""

import random
import time
from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Annotated, Any
from unittest.mock import patch

import typer

from benchmarks.rows import JsonFile, Row, report, row
from kvfuse.language_model import load_tokenizer
from kvfuse.prompts.alignment import align
from kvfuse.prompts.tokenized import encode

SIZES = (1_000, 10_000, 100_000, 1_000_000)
STRATEGIES = ("span", "reencode-longest")
PHRASES = {
    "english": [
        "The quick brown fox ",
        "jumps over it; ",
        "communication, ",
        "internationalization ",
        "isn't 12,345. ",
    ],
    "code": [
        "def fuse(self, x):\n",
        "    return self.gate * x[..., :2**n] + y  # why?\n",
        "    if not x:\n        raise ValueError()\n",
    ],
    "chinese": ["你好，", "世界", "模型", "缓存。", "今天天气很好，", "我们", "去散步。"],
    "emoji": ["👍🏽", "👩‍👩‍👧 ", "🇳🇴", "🎉 ", "❤️", "naïve ", "cafe\u0301 "],
}


class TimedEncode:
    """Replaces :func:`kvfuse.prompts.tokenized.encode` and adds up the seconds until ids and offsets are there."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, *args: Any, **options: Any) -> SimpleNamespace:
        start = time.perf_counter()
        encoded = encode(*args, **options)
        read = SimpleNamespace(ids=encoded.ids, offsets=encoded.offsets)
        self.seconds += time.perf_counter() - start
        return read


def mixed_text(size: int, seed: int = 0) -> str:
    """Returns ``size`` characters of English, code, Chinese and emoji by turns."""
    chance, parts, length = random.Random(seed), [], 0
    while length < size:
        kind = chance.choice(list(PHRASES))
        parts.append("".join(chance.choices(PHRASES[kind], k=chance.randint(5, 20))) + "\n")
        length += len(parts[-1])
    return "".join(parts)[:size]


def alignment_rows(text: str, strategy: str, repeats: int, *, receiver: Any, sharer: Any) -> Iterator[Row]:
    """The quickest of ``repeats`` runs: seconds within the tokenizers, and in alignment besides."""
    align(text[:100], receiver, [(sharer, strategy)])  # builds the table of re-encoding
    # alignment tokenizes too: its own time is the rest
    tokenizing, aligning = [], []
    for _ in range(repeats):
        with patch("kvfuse.prompts.tokenized.encode", TimedEncode()) as timed:
            start = time.perf_counter()
            aligned = align(text, receiver, [(sharer, strategy)])
            aligning.append(time.perf_counter() - start - timed.seconds)
        tokenizing.append(timed.seconds)
    tokens = len(aligned.receiver.ids)
    setting = f"{strategy}, {len(text):,} characters, {tokens:,} tokens"
    yield row("tokenizers", setting, min(tokenizing), None, "s")
    yield row("alignment", setting, min(aligning), None, "s")
    yield row("aligned tokens a second", setting, tokens / min(aligning), None, "1/s")


def main(
    receiver: Annotated[str, typer.Option(help="Folder or Hub id.")],
    sharer: Annotated[str, typer.Option(help="Folder or Hub id.")],
    json_file: JsonFile = None,
    repeats: Annotated[int, typer.Option(help="Number of runs, of which the quickest counts.")] = 5,
) -> None:
    """Measure each alignment strategy at each size and print."""
    names = {"receiver": receiver, "sharer": sharer}
    tokenizers = {role: load_tokenizer(name) for role, name in names.items()}
    cases = (
        alignment_rows(mixed_text(size), strategy, repeats, **tokenizers) for strategy in STRATEGIES for size in SIZES
    )
    report(chain.from_iterable(cases), json_file)


if __name__ == "__main__":
    typer.run(main)
