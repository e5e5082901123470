"""How quick token alignment is, beside the tokenizers' own time, on texts of 1,000 to 1,000,000 characters.

python -m benchmarks.alignment --receiver FOLDER --sharer FOLDER [--json FILE]
"""

import json
import random
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import logging

from kvfuse.language_model import load_tokenizer
from kvfuse.prompts.alignment import align

SIZES = (1_000, 10_000, 100_000, 1_000_000)
ROW = (
    "{how:16} {characters:10,} {tokens:8,} {tokenizer_seconds:12.4f} {alignment_seconds:11.5f} {tokens_per_second:10,}"
)
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


class Timed:
    """A tokenizer that adds up the time it takes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.seconds = tokenizer, 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        encoded = self.tokenizer(*args, **options)
        self.seconds += time.perf_counter() - start
        return encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)


def mixed_text(size: int, seed: int = 0) -> str:
    """English, code, Chinese and emoji by turns, ``size`` characters."""
    chance, parts, length = random.Random(seed), [], 0
    while length < size:
        kind = chance.choice(list(PHRASES))
        parts.append("".join(chance.choices(PHRASES[kind], k=chance.randint(5, 20))) + "\n")
        length += len(parts[-1])
    return "".join(parts)[:size]


def measure(text: str, receiver: Any, sharer: Any, how: str, repeats: int) -> dict[str, Any]:
    """The quickest of some runs: seconds within the tokenizers, and in alignment beside them."""
    align(text[:100], receiver, [(sharer, how)])  # builds the table of re-encoding
    runs = []
    for _ in range(repeats):
        receiver.seconds = sharer.seconds = 0.0
        start = time.perf_counter()
        aligned = align(text, receiver, [(sharer, how)])
        total, tokenizing = time.perf_counter() - start, receiver.seconds + sharer.seconds
        runs.append((total - tokenizing, tokenizing))
    alignment, tokenizing = map(min, zip(*runs, strict=True))
    tokens = len(aligned.receiver.ids)
    return {
        "how": how,
        "characters": len(text),
        "tokens": tokens,
        "tokenizer_seconds": tokenizing,
        "alignment_seconds": alignment,
        "tokens_per_second": round(tokens / alignment),
    }


def main(
    receiver: Annotated[str, typer.Option(help="Folder or Hub id.")],
    sharer: Annotated[str, typer.Option(help="Folder or Hub id.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs, of which the quickest counts.")] = 5,
) -> None:
    """Print a row for each way of alignment and size."""
    logging.set_verbosity_error()  # a text longer than the model's context is meant
    mine, theirs = Timed(load_tokenizer(receiver)), Timed(load_tokenizer(sharer))
    typer.echo(f"{'how':16} {'characters':>10} {'tokens':>8} {'tokenizers s':>12} {'alignment s':>11} {'tokens/s':>10}")
    rows = []
    for how in ("span", "reencode-longest"):
        for size in SIZES:
            row = measure(mixed_text(size), mine, theirs, how, repeats)
            rows.append(row)
            typer.echo(ROW.format(**row))
    if json_file:
        json_file.write_text(
            json.dumps({"receiver": receiver, "sharer": sharer, "rows": rows}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    typer.run(main)
