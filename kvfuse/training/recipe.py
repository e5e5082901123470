"""The sections of a recipe that ``kvfuse train`` reads. The texts below fields are their documentation."""

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from kvfuse.errors import PairError, RecipeError
from kvfuse.fusers import FuserConfig, fuser_class
from kvfuse.prompts.chat_options import ChatOptionKeys
from kvfuse.support.config import Section, check, override, read_recipe
from kvfuse.support.rows import DOCUMENT_SEPARATOR

FOREIGN_SECTIONS = ("evaluation",)


class FuserSection(BaseModel):
    """``fuser``: kind and options of the fuser; each kind has its own options (see its configuration)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str = "c2c"

    @property
    def options(self) -> dict[str, Any]:
        return self.model_extra or {}


class _Options(Section):
    """Base of the options of a kind, whose names and types packages choose."""

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())


class DataSection(Section):
    """``data``: the source of the examples."""

    path: Path
    """A file (.json, .jsonl, .txt, .csv, .parquet), a folder of such files, or the name of a data set on the Hub."""
    name: str | None = None
    """Configuration of the Hub data set."""
    split: str = "train"
    """Split of the Hub data set."""
    revision: str | None = None
    """Revision of the Hub data set."""
    streaming: bool = False
    """Read rows one by one, up to ``limit``, without storing their files; encoded rows are kept for this run only."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "openbookqa", "mmlu", "longbench", "mbpp", "pairs", "text"
    ] = "auto"
    """Shape of a row (``training/data/shapes.py``); ``auto``: by its columns; ``text``: documents, cut in pieces."""
    loss_on: Literal["last", "all"] = "last"
    """Learn the assistant's last turn, or all its turns, each as one example, which reads a chat once per turn."""
    max_tokens: int | None = Field(None, ge=2)
    """Longest prompt and response together, for each model that reads both; default: the model's context."""
    truncation: Literal["refuse", "drop_history"] = "refuse"
    """Longer examples are bad rows, or lose their oldest turns; no turn is ever cut."""
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Largest share of bad rows to train with; they are listed in ``output/bad_rows.jsonl``."""
    workers: int = Field(1, ge=1)
    """Processes for encoding."""
    separator: str = Field(DOCUMENT_SEPARATOR, min_length=1)
    """Separator of documents in a text file."""
    prompt_characters: int = Field(200, ge=1)
    """Length of a prompt cut from a document, up to the next white space."""
    response_characters: int = Field(200, ge=1)
    """Length of the response that follows it, up to the next white space."""
    limit: int | None = Field(None, ge=2)
    """Number of rows to read, and of examples to keep of them."""
    validation_share: float = Field(0.05, gt=0, lt=1)
    """Share of the examples, the last ones, to hold out."""


class TrainSection(Section):
    """``train``: length and speed of a run; defaults are the paper's (A.3.5)."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps; default: ``epochs`` over the data."""
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(4, ge=1)
    """Examples per device and forward pass."""
    accumulation: int = Field(1, ge=1)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(1e-4, gt=0)
    gate_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the gate logits; default: 20 x ``learning_rate``, without which they hardly move."""
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; it falls linearly after."""
    max_grad_norm: float = Field(1.0, gt=0)
    bf16: Literal["auto"] | bool = "auto"
    """Compute the fuser in bfloat16, with float32 weights; ``auto``: on GPUs that support it."""
    fsdp: bool = False
    """Shard the fuser, its gradients and its optimizer over the GPUs of several processes; default: a copy in each."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the fuser's first weights, the order of the examples, dropout and gates."""
    group_by_length: bool = False
    """Batch examples of similar length: less padding, but learning slows where length tells the kind of example."""
    recompute: bool = False
    """Recompute activations in the backward pass: half the memory or less, about a quarter more time."""
    keep_caches: Literal["none", "sharer", "both"] = "none"
    """Compute caches once and keep them on disk for all epochs: the sharer's, or the larger receiver's too."""
    keep_caches_as: Literal["bfloat16", "int8"] = "bfloat16"
    """Format of the sharer's caches; the receiver's are kept in bfloat16."""
    save_steps: int = Field(200, ge=1)
    """Steps between checkpoints. The best on held-out examples is kept; a killed run resumes from the last."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many checkpoints without improvement; default: never."""
    report_to: str = "none"
    """Logger of Trainer, written to every 50 steps: ``tensorboard``, ``trackio``, ``wandb``, …"""


class Recipe(ChatOptionKeys):
    """Everything that makes a fuser."""

    receiver: str
    """Folder or Hub id of the model that answers."""
    sharer: str
    """Folder or Hub id of the model that only reads."""
    output: Path
    """Folder for the fuser."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the two models; the fuser always trains in float32."""
    token_alignment: Literal["auto", "identity", "span", "reencode-first", "reencode-longest"] = "auto"
    """``auto``: identity for identical tokenizers, else span."""
    fuser: FuserSection = FuserSection()
    data: DataSection
    train: TrainSection = TrainSection()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and the ``key=value`` words after it, e.g. ``train.steps=100``. Paths are relative to the shell's.

    Raises:
        RecipeError: The file is missing or not YAML, a key is unknown (the nearest is named), or a value is wrong.
    """
    content = read_recipe(path, overrides)
    _drop_start(content)
    recipe = check(content, Recipe, FOREIGN_SECTIONS)
    # Options depend on the kind, so they are checked once it is known
    options = check({"fuser": recipe.fuser.options}, _fuser_options(recipe.fuser.kind)).model_dump(exclude_unset=True)
    return recipe.model_copy(update={"fuser": FuserSection(kind=recipe.fuser.kind, **options["fuser"])})


def load_data(path: str | Path, overrides: Sequence[str] = ()) -> DataSection:
    """A recipe's ``data`` section, from its path and ``key=value`` words, e.g. ``limit=100``.

    Raises:
        RecipeError: A key is unknown (the nearest is named), or a value is wrong.
    """
    content: dict[str, Any] = {"path": path}
    override(content, overrides)
    return check(content, DataSection)


def _drop_start(content: dict[str, Any]) -> None:
    """Accept ``train.start: random``, a key of version 0.1, for one version."""
    train = content.get("train")
    if not isinstance(train, dict) or "start" not in train:
        return
    if train.pop("start") != "random":
        raise RecipeError(
            "expected no key train.start, got one: it was removed, since a few steps of training gain more than a "
            "start from ridge regression; leave it out"
        )
    warnings.warn(
        "train.start has no effect and will be an unknown key; leave it out", DeprecationWarning, stacklevel=3
    )


def _fuser_options(kind: str) -> type[Section]:
    """A section ``fuser`` with the options of a kind, their types and limits."""
    try:
        config = fuser_class(kind).config_class
    except PairError as error:
        raise RecipeError(str(error)) from error
    # Options are the fields of the kind's configuration, except fields that training derives from the pair
    derived = {"receiver", "sharer", "token_alignment", "model_type", "weights"}
    classes = [cls for cls in reversed(config.__mro__) if issubclass(cls, FuserConfig)]
    types = {name: hint for cls in classes for name, hint in inspect.get_annotations(cls, eval_str=True).items()}
    # None stands for an option that the recipe leaves out
    fields: dict[str, Any] = {name: (hint, None) for name, hint in types.items() if name not in derived}
    options = create_model("Options", __base__=_Options, **fields)
    return create_model("FuserOptions", __base__=Section, fuser=(options, ...))
