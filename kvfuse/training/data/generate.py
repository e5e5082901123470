"""``kvfuse data generate``: a model's own responses to the prompts of any source, as rows to train on."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvfuse.errors import PromptError, RecipeError
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Single
from kvfuse.prompts.chat import Message
from kvfuse.prompts.tokenized import read
from kvfuse.support.rows import decode
from kvfuse.training.data.shapes import to_messages
from kvfuse.training.data.sources import load_rows, parse
from kvfuse.training.recipe import DataSection


@dataclass(frozen=True)
class Sampling:
    """How responses are generated; a temperature of 0 takes the likeliest token every time."""

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
    """Let a model respond to every prompt of a source, and append rows of ``messages`` to a file.

    A prompt is a chat up to the assistant's last turn, which the new response replaces. Each is asked once; those that the file
    holds already are not asked again, so that a killed run goes on where it was. What is being sampled is decided by the seed and
    by how many responses the file holds.

    Args:
        data: The source; its keys are those of a recipe's ``data``.
        model: Who responds.
        out: JSON lines; made where it is not there.
        sampling: How.
        say: Takes lines of progress.

    Returns:
        How many rows were added.

    Raises:
        RecipeError: The source cannot be read, or the file holds something else.
    """
    done = _already_in(out)
    say(f"{len(done)} responses in {out} already")
    asked = [chat for chat in _prompts(data, model, sampling, say) if _key(chat) not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    added = 0
    for start in range(0, len(asked), sampling.batch_size):
        torch.manual_seed(sampling.seed + len(done) + start)
        rows = _respond(asked[start : start + sampling.batch_size], model, sampling)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
        added += len(rows)
        say(f"{min(start + sampling.batch_size, len(asked))} of {len(asked)}")
    say(f"added {added} responses to {out}; {len(asked) - added} were empty")
    return added


def _respond(chats: Sequence[list[Message]], model: LanguageModel, sampling: Sampling) -> list[list[Message]]:
    """The chats with a response each; those that the model has nothing to say to are left out."""
    replies = Single("model", model).reply(chats, **sampling.options)
    said = zip(chats, (reply.text for reply in replies), strict=True)
    return [[*chat, {"role": "assistant", "content": text}] for chat, text in said if text]


def _prompts(
    data: DataSection, model: LanguageModel, sampling: Sampling, say: Callable[[str], None]
) -> list[list[Message]]:
    """Each prompt once, in the order of the source; what cannot be asked is told."""
    chats: dict[str, list[Message]] = {}
    unfit = 0
    for number, row in enumerate(load_rows(data)):
        try:
            source, _, content = parse(row, number, data)
            chat = _prompt(to_messages(decode(source, content), data.format))
            _require_room(chat, model, sampling)
        except ValueError:  # PromptError is one
            unfit += 1
        else:
            chats.setdefault(_key(chat), chat)
    say(f"{len(chats)} prompts in {data.path}; {unfit} rows have none, or one that the model cannot read")
    if not chats:
        raise RecipeError(f"expected prompts of chats in {data.path}, got none; check data.path and data.format")
    return list(chats.values())


def _prompt(chat: list[Message]) -> list[Message]:
    prompt = chat[:-1] if chat and chat[-1]["role"] == "assistant" else chat
    if not prompt:
        raise ValueError("wrong roles: nothing to respond to")
    return prompt


def _require_room(chat: Sequence[Message], model: LanguageModel, sampling: Sampling) -> None:
    length = len(read(chat, model.tokenizer).ids) + sampling.max_new_tokens
    if model.context is not None and length > model.context:
        raise PromptError(
            f"expected prompt and response to fit {model.context} tokens of {model.name}, got {length}; shorten them"
        )


def _already_in(out: Path) -> set[str]:
    """The prompts that a file holds responses to; a last line that a killed run has left half written is cut off."""
    if not out.exists():
        return set()
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    keys = set(_keys(whole, out))
    if len(whole) < len(content):
        os.truncate(out, len(whole))
    return keys


def _keys(lines: bytes, out: Path) -> Iterator[str]:
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            yield _key(to_messages(json.loads(line), "messages")[:-1])
        except ValueError as error:
            raise RecipeError(
                f"expected rows of messages in {out}, got line {number}: {error}; name another file"
            ) from error


def _key(chat: Sequence[Message]) -> str:
    return json.dumps(chat, sort_keys=True)
