"""Make the two models of the embedded pair: tokenizers, configurations, training with transformers' Trainer."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from kvfuse.demo.lessons import Lesson

CONTEXT = 128  # tokens
TOKENIZER_LESSONS = 20_000


@dataclass(frozen=True)
class Recipe:
    """The recipe of one model of the pair.

    Attributes:
        special: Padding, end-of-turn and the other special tokens of the template.
        template: Jinja chat template.
    """

    config: LlamaConfig | Qwen3Config
    vocab_size: int
    special: tuple[str, ...]
    template: str
    steps: int
    learning_rate: float = 2e-3
    batch_size: int = 32


SHARER = Recipe(
    config=LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, initializer_range=0.06, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    ),
    vocab_size=600,
    special=("<pad>", "<|eot|>", "<s>", "<|user|>", "<|assistant|>"),
    template="<s>{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    steps=3400,
)  # fmt: skip
RECEIVER = Recipe(
    config=Qwen3Config(
        hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    ),
    vocab_size=700,
    special=("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    template="{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    steps=2700,
)  # fmt: skip


def train_tokenizer(texts: Iterator[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE of the recipe's size with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in recipe.special]
    # special tokens take the first ids, then all bytes
    alphabet, size = pre_tokenizers.ByteLevel.alphabet(), recipe.vocab_size
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, eos, *_ = recipe.special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, chat_template=recipe.template,
        model_max_length=CONTEXT, padding_side="left",
    )  # fmt: skip


def encode(lesson: Lesson, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Returns a training example; only the reply and its end-of-turn token are labelled."""
    question, reply = lesson
    # prompt and reply are tokenized apart, as at inference
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    reply_ids = [*tokenizer(reply, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt_ids + reply_ids, "labels": [-100] * len(prompt_ids) + reply_ids}


def train_model(lessons: Iterator[Lesson], recipe: Recipe, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Train tokenizer and model of a recipe on a stream of lessons, and save both in ``folder`` as float16."""
    torch.manual_seed(seed)
    # 1) lessons and tokenizer
    drawn = list(itertools.islice(lessons, recipe.steps * recipe.batch_size))
    texts = (text for lesson in drawn[:TOKENIZER_LESSONS] for text in ("assistant\n" + lesson[0], lesson[1]))
    tokenizer = train_tokenizer(texts, recipe)
    # 2) model
    config = type(recipe.config)(**{**recipe.config.to_dict(), **_special_ids(tokenizer)})
    model = {LlamaConfig: LlamaForCausalLM, Qwen3Config: Qwen3ForCausalLM}[type(config)](config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        adam_beta2=0.98,
        weight_decay=0.02,
        train_sampling_strategy="group_by_length",
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    # 3) training
    examples = [encode(lesson, tokenizer) for lesson in drawn]
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
