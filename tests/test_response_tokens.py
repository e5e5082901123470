"""A sharer reads a response token by token as it reads the whole of it in training."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvfuse.prompts.alignment import align
from kvfuse.prompts.response import tokenize_response
from kvfuse.prompts.response_tokens import response_tokens
from kvfuse.testing import CORPUS, SPECIAL, TEMPLATES, tiny_tokenizer

RESPONSES = (
    "Oslo",
    "Oslo is the capital.",
    " They speak Dutch there.",
    "The answer\n\nis  two.",
    "- one\n- two\n",
    "naïve 你好 🙂 end",
    "x = f(1)\n    return x",
    "I",
    "A. Norway",
    "\nquestion",
)
QUESTIONS = ("What is Oslo?", "Which language do people speak there", "user", "answer:\n")


def unigram(normalizer, scheme):
    """A tokenizer whose ids do not tell the text's white space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=[*SPECIAL, "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>",
        chat_template=TEMPLATES["lines"],
    )  # fmt: skip


NORMALIZERS = {
    "collapses": normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.Replace("  ", " ")]),
    "strips": normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.Strip()]),
    "keeps": normalizers.NFKC(),
}


def read_along(row, response, receiver, sharer):
    """The sharer's ids of a response after each of the receiver's tokens."""
    tokens = response_tokens(
        "span",
        receiver=receiver,
        sharer=sharer,
        receiver_ids=row.receiver.ids.tolist(),
        text=row.sharers[0][0].prompt.text,
    )
    held = row.sharers[0][0].ids.tolist()
    for token in response.ids.tolist():
        removed, added = tokens.next(token)
        held = held[: len(held) - removed] + added
    return held


def mismatches(receiver, sharer):
    found = []
    for question in QUESTIONS:
        row = align([{"role": "user", "content": question}], receiver, [(sharer, "span")])
        for text in RESPONSES:
            response = tokenize_response(row, text, receiver, [(sharer, "span")])
            wanted = [*row.sharers[0][0].ids.tolist(), *response.sharers[0][0].tolist()]
            if read_along(row, response, receiver, sharer) != wanted:
                found.append((question, text))
    return found


@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_unigram_sharer_reads_along_as_in_training(normalizer, scheme):
    assert not mismatches(tiny_tokenizer(), unigram(NORMALIZERS[normalizer], scheme))


@pytest.mark.parametrize("template", ["tagged", "lines"])
def test_a_byte_level_sharer_reads_along_as_in_training(template):
    assert not mismatches(tiny_tokenizer(), tiny_tokenizer(300, template))


@pytest.mark.parametrize("name", ["qwen3", "llama-3.2", "phi-4", "mistral-v3"])
def test_real_sharers_read_along_as_in_training(shared, name):
    sharer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    assert not mismatches(tiny_tokenizer(), sharer)
