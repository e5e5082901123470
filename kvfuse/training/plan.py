"""``kvfuse train --dry-run``: shapes, steps, memory and time of a run, estimated before any weight is loaded."""

import math
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from kvfuse.backends.dtypes import fast_dtype, products_per_second
from kvfuse.cache.kv import KVSpec
from kvfuse.errors import PairError, first_line
from kvfuse.fusers import fuser_class
from kvfuse.language_model import load_config
from kvfuse.stages.prefill import probe
from kvfuse.support.processes import processes
from kvfuse.training.data.prepare import Prepared, split
from kvfuse.training.recipe import Recipe

TRAINED_PARAMETER_BYTES = 16  # weight, gradient and two moments in float32
LOGIT_BYTES = 8  # a logit and its gradient in float32


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        name: Folder or Hub id, as in the recipe.
        parameters: Number of parameters.
        dtype: Of its weights and caches.
        kv: Shape of one token's cache.
        vocabulary: Number of logits per token.
    """

    name: str
    parameters: int
    dtype: torch.dtype
    kv: KVSpec
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.name}: {self.parameters:,} parameters, {self.kv}"

    @property
    def itemsize(self) -> int:
        """Bytes per parameter."""
        return self.dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.kv.num_layers * self.kv.num_kv_heads * (self.kv.key_dim + self.kv.value_dim) * self.itemsize


@dataclass(frozen=True)
class Plan:
    """Estimates of a run.

    Attributes:
        receiver: The model that answers.
        sharer: The model that only reads.
        trainable: Parameters of the fuser.
        examples: Number of training examples.
        tokens: Mean length of a prompt and of a response, in the receiver's tokens.
        steps: Optimizer steps.
        memory: Bytes of weights and optimizer, and of one batch's caches and logits.
        seconds: Time of all matrix products at this machine's measured speed: a lower bound.
    """

    receiver: ModelShape
    sharer: ModelShape
    trainable: int
    examples: int
    tokens: tuple[float, float]
    steps: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        prompt, response = self.tokens
        data = f"{self.examples:,} examples of {prompt:.0f} prompt and {response:.0f} response tokens on average"
        cost = f"about {self.memory / 2**20:,.0f} MiB, and {self.seconds / 60:,.1f} minutes or more"
        return (
            f"receiver {self.receiver}\n"
            f"sharer   {self.sharer}\n"
            f"fuser    {self.trainable:,} trainable parameters\n"
            f"data     {data}\n"
            f"run      {self.steps:,} steps; {cost}"
        )


def plan(recipe: Recipe, prepared: Prepared) -> Plan:
    """Estimate a run.

    Args:
        recipe: See :class:`Recipe`.
        prepared: Its data, encoded.

    Raises:
        PairError: A model does not exist, or its shape cannot be measured without its weights.
    """
    # 1) Build both models and the fuser without memory for their weights
    receiver, sharer = shape_of(recipe.receiver, recipe.dtype), shape_of(recipe.sharer, recipe.dtype)
    trainable = _trainable(recipe, receiver=receiver, sharer=sharer)
    # 2) Mean lengths; a column "length" counts prompt and response
    training, _ = split(prepared.examples, recipe.data.validation_share)
    response = sum(map(len, training["response"][:])) / len(training)
    prompt = sum(training["length"][:]) / len(training) - response
    # 3) Memory: weights and optimizer, then one batch's caches and the logits of its responses
    steps, batch = _steps(recipe, len(training)), min(recipe.train.batch_size, len(training))
    per_example = (prompt + response) * (receiver.kv_bytes + sharer.kv_bytes)
    per_example += LOGIT_BYTES * response * receiver.vocabulary
    memory = sum(model.parameters * model.itemsize for model in (receiver, sharer))
    memory += TRAINED_PARAMETER_BYTES * trainable + int(batch * per_example)
    # 4) Time in multiply-adds: both prefills and the fuser forward and twice backward over the prompt, the receiver
    #    forward and once backward over the response
    products = prompt * (receiver.parameters + sharer.parameters + 3 * trainable) + 2 * response * receiver.parameters
    speed = products_per_second(receiver.dtype, processes().device)
    seconds = steps * recipe.train.accumulation * batch * products / speed
    return Plan(receiver, sharer, trainable, len(training), (prompt, response), steps, memory, seconds)


def shape_of(name: str, dtype: str) -> ModelShape:
    """Measure a model's shape from its configuration: it is built and run without memory for its weights."""
    config = load_config(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).eval()
    except (OSError, ValueError, KeyError) as error:
        raise PairError(
            f"expected a causal language model at {name!r}, got: {first_line(error)}; check the name"
        ) from error
    # "auto" is no attribute of torch: it is the dtype that the weights are stored in
    chosen = getattr(torch, dtype, None) or fast_dtype(config.dtype or torch.float32, processes().device)
    return ModelShape(name, model.num_parameters(), chosen, probe(model), config.get_text_config().vocab_size)


def _trainable(recipe: Recipe, *, receiver: ModelShape, sharer: ModelShape) -> int:
    cls = fuser_class(recipe.fuser.kind)
    models = {"receiver": receiver, "sharer": sharer}
    pair = {role: {"name": model.name, "kv": vars(model.kv)} for role, model in models.items()}
    with torch.device("meta"):
        fuser = cls(cls.config_class(**pair, **recipe.fuser.options))
    return sum(parameter.numel() for parameter in fuser.parameters())


def _steps(recipe: Recipe, examples: int) -> int:
    batches = math.ceil(examples / (recipe.train.batch_size * processes().num_processes))
    return recipe.train.steps or math.ceil(recipe.train.epochs * math.ceil(batches / recipe.train.accumulation))
