"""``kvfuse train --dry-run``: what a recipe will train, for how long and in how much memory, before any weight is loaded."""

import math
import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvfuse.cache.kv import KVSpec
from kvfuse.errors import PairError, first_line
from kvfuse.fusers import fuser_class
from kvfuse.stages.prefill import probe
from kvfuse.support.processes import processes
from kvfuse.training.data.prepare import Prepared, split
from kvfuse.training.recipe import Recipe

ADAM_BYTES = 16  # per parameter of the fuser: weight, gradient and two moments in float32
SPEED_SIZE = 1024


@dataclass(frozen=True)
class Shape:
    """A model without its weights.

    Attributes:
        name: What the recipe calls it.
        parameters: How many it has.
        bytes: Of one of them.
        kv: Of one token.
        vocabulary: How many logits a token has.
    """

    name: str
    parameters: int
    bytes: int
    kv: KVSpec
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.name}: {self.parameters:,} parameters, {self.kv}"


@dataclass(frozen=True)
class Plan:
    """Estimates; time is that of the products alone, at the speed this machine has shown just now.

    Attributes:
        receiver: The model that answers.
        sharer: The model that only reads.
        trainable: Parameters of the fuser.
        examples: How many are learnt from.
        tokens: Mean length of a prompt and of a response, the receiver's tokens.
        steps: Optimizer steps.
        memory: Bytes of weights, optimizer and the caches and logits of one batch.
        seconds: Of the whole run.
    """

    receiver: Shape
    sharer: Shape
    trainable: int
    examples: int
    tokens: tuple[float, float]
    steps: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        prompt, response = self.tokens
        return "\n".join(
            [
                f"receiver {self.receiver}",
                f"sharer   {self.sharer}",
                f"fuser    {self.trainable:,} trainable parameters",
                f"data     {self.examples:,} examples of {prompt:.0f} prompt and {response:.0f} response tokens on average",
                f"run      {self.steps:,} steps; about {self.memory / 2**20:,.0f} MiB, and {self.seconds / 60:,.1f} minutes or more",
            ]
        )


def plan(recipe: Recipe, prepared: Prepared) -> Plan:
    """Estimate a run.

    Args:
        recipe: See :class:`Recipe`.
        prepared: Its data, encoded.

    Raises:
        PairError: A model is not there, or its shape cannot be told without its weights.
    """
    receiver, sharer = shape_of(recipe.receiver, recipe.dtype), shape_of(recipe.sharer, recipe.dtype)
    pair = {
        whose: {"name": one.name, "kv": vars(one.kv)} for whose, one in (("receiver", receiver), ("sharer", sharer))
    }
    with torch.device("meta"):
        cls = fuser_class(recipe.fuser.kind)
        fuser = cls(cls.config_class(**pair, **recipe.fuser.options))
    trainable = sum(parameter.numel() for parameter in fuser.parameters())
    training, _ = split(prepared.examples, recipe.data.validation_share)
    response = sum(map(len, training["response"][:])) / len(training)
    prompt = sum(training["length"][:]) / len(training) - response
    steps, batch = _steps(recipe, len(training)), recipe.train.batch_size
    memory = _weights(receiver) + _weights(sharer) + ADAM_BYTES * trainable
    memory += int(
        batch * ((prompt + response) * (_kv_bytes(receiver) + _kv_bytes(sharer)) + 8 * response * receiver.vocabulary)
    )
    seconds = (
        steps
        * recipe.train.accumulation
        * batch
        * _products(receiver, sharer, trainable, prompt, response)
        / _products_per_second()
    )
    return Plan(receiver, sharer, trainable, len(training), (prompt, response), steps, memory, seconds)


def shape_of(name: str, dtype: str) -> Shape:
    """A model's shape, from its configuration alone: it is built, and run, without memory for its weights."""
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).eval()
    except (OSError, ValueError, KeyError) as error:
        raise PairError(
            f"expected a causal language model at {name!r}, got: {first_line(error)}; check the name"
        ) from error
    stored = getattr(torch, dtype, None) or config.dtype or torch.float32
    return Shape(name, model.num_parameters(), stored.itemsize, probe(model), config.get_text_config().vocab_size)


def _steps(recipe: Recipe, examples: int) -> int:
    per_step = recipe.train.batch_size * processes().num_processes
    updates = max(1, math.ceil(math.ceil(examples / per_step) / recipe.train.accumulation))
    return recipe.train.steps or math.ceil(recipe.train.epochs * updates)


def _weights(model: Shape) -> int:
    return model.parameters * model.bytes


def _kv_bytes(model: Shape) -> int:
    """Of one token's keys and values."""
    return model.kv.num_layers * model.kv.num_kv_heads * (model.kv.key_dim + model.kv.value_dim) * model.bytes


def _products(receiver: Shape, sharer: Shape, fuser: int, prompt: float, response: float) -> float:
    """Multiply-adds of one example: both prefills, the fuser forward and twice back, the receiver on the response and once back."""
    return prompt * (receiver.parameters + sharer.parameters + 3 * fuser) + 2 * response * receiver.parameters


def _products_per_second() -> float:
    matrix = torch.rand(SPEED_SIZE, SPEED_SIZE, device=processes().device)
    float((matrix @ matrix).sum())  # the first is slow
    start = time.perf_counter()
    float(sum((matrix @ matrix).sum() for _ in range(3)))
    return 3 * SPEED_SIZE**3 / (time.perf_counter() - start)
