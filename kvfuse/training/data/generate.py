"""``kvfuse data generate``: a model's own responses to the prompts of a source, as rows to train on."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvfuse.errors import RecipeError
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Single
from kvfuse.prompts.messages import Message
from kvfuse.prompts.tokenized import tokenize
from kvfuse.support.rows import decode
from kvfuse.training.data.encoding import Reader
from kvfuse.training.data.shapes import to_messages
from kvfuse.training.data.sources import load_rows, parse
from kvfuse.training.recipe import DataSection

ROW_START = b'{"messages": ['


@dataclass(frozen=True)
class Sampling:
    """Generation options; a temperature of 0 is greedy decoding."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 8
    seed: int = 42

    @property
    def options(self) -> dict[str, float | int | bool]:
        sampled = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **(sampled if self.temperature > 0 else {"do_sample": False})}


def generate(
    data: DataSection, model: LanguageModel, out: Path, sampling: Sampling, say: Callable[[str], None] = print
) -> int:
    """Generate a response to every prompt of a source, and append rows of ``messages`` to a file.

    A prompt is a chat without the assistant's last turn, which the new response replaces. Each prompt is answered once,
    and prompts that the file already has are skipped, so that a killed run can be resumed. Samples depend on the seed
    and on the number of responses in the file.

    Args:
        data: The source, as in a recipe's ``data``.
        model: The model that responds.
        out: File of JSON lines, created if missing.
        sampling: Generation options.
        say: Takes lines of progress.

    Returns:
        Number of rows added.

    Raises:
        RecipeError: The source cannot be read, or the file holds something else.
    """
    # 1) Find the prompts without a response in the file
    done = _already_in(out)
    say(f"{len(done)} responses in {out} already")
    missing = [chat for chat in _prompts(data, model, sampling, say) if _key(chat) not in done]
    # 2) Respond to them, and append each batch when it is done
    out.parent.mkdir(parents=True, exist_ok=True)
    added = 0
    for start in range(0, len(missing), sampling.batch_size):
        torch.manual_seed(sampling.seed + len(done) + start)  # a resumed run samples as an uninterrupted one
        rows = _respond(missing[start : start + sampling.batch_size], model, sampling)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
        added += len(rows)
        say(f"{min(start + sampling.batch_size, len(missing))} of {len(missing)}")
    say(f"added {added} responses to {out}; {len(missing) - added} were empty")
    return added


def _respond(chats: Sequence[list[Message]], model: LanguageModel, sampling: Sampling) -> list[list[Message]]:
    """The chats with a response each; chats with an empty response are left out."""
    replies = Single("model", model).reply(chats, **sampling.options)
    return [
        [*chat, {"role": "assistant", "content": reply.text}]
        for chat, reply in zip(chats, replies, strict=True)
        if reply.text
    ]


def _prompts(
    data: DataSection, model: LanguageModel, sampling: Sampling, say: Callable[[str], None]
) -> list[list[Message]]:
    """Each prompt once, in the order of the source; rows without a usable prompt are counted."""
    chats: dict[str, list[Message]] = {}
    unusable = 0
    for number, row in enumerate(load_rows(data)):
        try:
            # A prompt must leave room for the response
            source, _, content = parse(row, number, data)
            chat = _prompt(to_messages(decode(source, content), data.format))
            length = len(tokenize(chat, model.tokenizer).ids) + sampling.max_new_tokens
            Reader.of(model).require_room(length, "prompt and response")
        except ValueError:  # also PromptError
            unusable += 1
        else:
            chats.setdefault(_key(chat), chat)
    say(f"{len(chats)} prompts in {data.path}; {unusable} rows have none, or one that the model cannot read")
    if not chats:
        raise RecipeError(f"expected prompts of chats in {data.path}, got none; check data.path and data.format")
    return list(chats.values())


def _prompt(chat: list[Message]) -> list[Message]:
    prompt = chat[:-1] if chat and chat[-1]["role"] == "assistant" else chat
    if not prompt:
        raise ValueError("wrong roles: nothing to respond to")
    return prompt


def _already_in(out: Path) -> set[str]:
    """Keys of the prompts that a file has responses to; cuts off a last line that a killed run left half-written."""
    if not out.exists():
        return set()
    content = out.read_bytes()
    # 1) Whole lines must be rows
    whole, _, half = content.rpartition(b"\n")
    keys = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            keys.add(_key(to_messages(json.loads(line), "messages")[:-1]))
        except ValueError as error:
            raise RecipeError(
                f"expected rows of messages in {out}, got line {number}: {error}; name another file"
            ) from error
    # 2) A half line must be the beginning of a row
    if half[: len(ROW_START)] != ROW_START[: len(half)]:
        raise RecipeError(f"expected rows of messages in {out}, got {half[:20]!r} in its last line; name another file")
    os.truncate(out, len(content) - len(half))
    return keys


def _key(chat: Sequence[Message]) -> str:
    return json.dumps(chat, sort_keys=True)
