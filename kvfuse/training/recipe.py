"""What ``kvfuse train`` reads of a recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvfuse.errors import PairError, RecipeError
from kvfuse.fusers import FuserConfig, fuser_class
from kvfuse.support.config import Section, check, override, read_recipe, unknown_key

FOREIGN_SECTIONS = ("evaluation",)


class FuserSection(BaseModel):
    """``fuser``: its kind and its options; which there are depends on the kind (see the fuser's configuration)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str = "c2c"

    @property
    def options(self) -> dict[str, Any]:
        return self.model_extra or {}


class DataSection(Section):
    """``data``: where the examples come from."""

    path: Path
    """A file (.json, .jsonl, .txt, .csv, .parquet), a folder of them, or the name of a data set on the Hub."""
    name: str | None = None
    """Of the Hub data set's configuration."""
    split: str = "train"
    """Of the Hub data set."""
    revision: str | None = None
    """Of the Hub data set."""
    streaming: bool = False
    """Read rows one by one, as many as ``limit`` says, without keeping their files; encoded rows are kept for this run only."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "openbookqa", "mmlu", "longbench", "pairs", "text"] = (
        "auto"
    )
    """What a row looks like (``training/shapes.py``); ``auto`` reads it off its columns. ``text``: documents, cut into examples."""
    loss_on: Literal["last", "all"] = "last"
    """Learn the assistant's last turn, or each of them as an example of its own, which reads a chat again for every turn."""
    max_tokens: int | None = Field(None, ge=2)
    """The longest prompt and response together, for every model that reads both; by default what its context holds."""
    truncation: Literal["refuse", "drop_history"] = "refuse"
    """What becomes of longer ones: bad rows, or shorter ones without their oldest turns; no turn is ever cut."""
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Refuse to train where more of the rows than this are bad; they are listed in ``output/bad_rows.jsonl``."""
    workers: int = Field(1, ge=1)
    """Processes that encode."""
    separator: str = Field("<|endoftext|>", min_length=1)
    """Between two documents of a text file."""
    prompt_characters: int = Field(200, ge=1)
    """Length of a prompt cut from a document, to the next white space."""
    response_characters: int = Field(200, ge=1)
    """Length of the response that follows it, to the next white space."""
    limit: int | None = Field(None, ge=2)
    """Read the first so many rows, and keep at most so many examples of them."""
    validation_share: float = Field(0.05, gt=0, lt=1)
    """The last so much of them is held out."""


class TrainSection(Section):
    """``train``: how long and how fast; defaults are the paper's (A.3.5)."""

    start: Literal["random", "ridge"] = "random"
    """The fuser's first weights: drawn, or of kinds that can, a ridge regression of the receiver's caches on the sharer's."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; by default ``epochs`` over the data."""
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(4, ge=1)
    """Examples per device and forward pass."""
    accumulation: int = Field(1, ge=1)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(1e-4, gt=0)
    gate_learning_rate: float | None = Field(None, gt=0)
    """Of the gate logits; by default 20 x ``learning_rate``, without which they hardly move."""
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; it falls linearly after."""
    max_grad_norm: float = Field(1.0, gt=0)
    bf16: Literal["auto"] | bool = "auto"
    """Compute the fuser in bfloat16, its weights in float32 all the same; ``auto``: on a GPU that can."""
    fsdp: bool = False
    """Spread the fuser, its gradients and its optimizer over the GPUs of several processes, in place of a copy in each."""
    seed: int = 42
    """Of the fuser's first weights, the order of the examples, dropout and gates."""
    group_by_length: bool = False
    """Batches of examples of like length: less padding, but less mixed, and so slower to learn from where length tells the kind."""
    recompute: bool = False
    """Keep less for the backward pass and compute it again there: half the memory or less, about a quarter more time."""
    keep_caches: Literal["none", "sharer", "both"] = "none"
    """Read the prompts once and keep the caches on disk for all epochs: the sharer's, or the receiver's too, which are larger."""
    keep_caches_as: Literal["bfloat16", "int8"] = "bfloat16"
    """The sharer's; the receiver's are kept in bfloat16."""
    save_steps: int = Field(200, ge=1)
    """Steps between checkpoints, of which the best on held-out examples is kept; a killed run goes on from the last."""
    patience: int | None = Field(None, ge=1)
    """End the run after so many checkpoints that are no better than the best; by default it goes on."""
    report_to: str = "none"
    """Where Trainer logs to, every 50 steps: ``tensorboard``, ``trackio``, ``wandb``, …"""


class Recipe(Section):
    """Everything that makes a fuser."""

    receiver: str
    """Folder or Hub id of the model that answers."""
    sharer: str
    """Folder or Hub id of the model that only reads."""
    output: Path
    """Folder for the fuser."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the two models are loaded as; the fuser itself always trains in float32."""
    token_alignment: Literal["auto", "identity", "span", "reencode-first", "reencode-longest"] = "auto"
    """``auto``: identity for identical tokenizers, else span."""
    fuser: FuserSection = FuserSection()
    data: DataSection
    train: TrainSection = TrainSection()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and the ``key=value`` words after it, e.g. ``train.steps=100``; relative paths are those of the shell.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown (the nearest is named), or a value is wrong.
    """
    recipe = check(read_recipe(path, overrides), Recipe, FOREIGN_SECTIONS)
    known = _fuser_options(recipe.fuser.kind)
    for option in recipe.fuser.options:
        if option not in known:
            raise unknown_key(f"fuser.{option}", known)
    return recipe


def load_data(path: str | Path, overrides: Sequence[str] = ()) -> DataSection:
    """A recipe's ``data`` alone, from its path and ``key=value`` words, e.g. ``limit=100``.

    Raises:
        RecipeError: A key is unknown (the nearest is named), or a value is wrong.
    """
    content: dict[str, Any] = {"path": path}
    override(content, overrides)
    return check(content, DataSection)


def _fuser_options(kind: str) -> list[str]:
    try:
        config = fuser_class(kind).config_class
    except PairError as error:
        raise RecipeError(str(error)) from error
    given = {"receiver", "sharer", "token_alignment", "model_type", "weights"}
    mine = [cls for cls in config.__mro__ if issubclass(cls, FuserConfig)]
    return [name for cls in mine for name in cls.__annotations__ if name not in given]
