"""A row of each data set -> a question in the form that all tasks ask: which rows count, and which answer is right."""

import hashlib
import random
import string
from collections.abc import Sequence
from typing import Any

from kvfuse.evaluation.tasks.longbench import family_of

Row = dict[str, Any]
Item = dict[str, Any]
"""``question``, ``kind`` and ``answer``: a text, or the index of the right one of ``choices``, named by ``letters``."""

UNANSWERABLE = ("no_correct_answer", "expert")
NUMBERED_IN_ARC = """
    c4f3cab5 68301aab 4e9b91ce abdfc20d 77f1a4ff 957b47e3 ef19489a d743fadf
    34316346 9007d973 c5d06491 d67818c9 f0a41a3b 82e935ef 4a1b7c65 6ebb44ba
    9ed75e60 94170caa 47782863 07bd0c0f 2abc6ecd 37935a5f
"""
"""SHA-256, eight digits, of the 22 questions of ARC-Challenge's test split whose options are officially numbered.

They are from New York's grade 8 examinations. Some copies of the data have letters in place of the numbers.
"""
GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
BUCKETS_OF_LENGTH = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}


def mmlu_redux(row: Row, subject: str) -> Item | None:
    """MMLU-Redux: 5,632 of its 5,700 questions.

    Left out are the 35 without a correct option, the 32 that only an expert could check, and one without a question.
    Where the answer was found wrong, the corrected one counts if it names an option; 5 have none, and keep the old.
    Questions with errors that leave a right answer (unclear, or several right) are asked as they are. Version 2.0 on
    the Hub has been revised since and has other counts.
    """
    if row["error_type"] in UNANSWERABLE or not row["question"].strip():
        return None
    # corrections are letters or indices, or say that there is none
    corrected = str(row["correct_answer"]) if row["error_type"] == "wrong_groundtruth" else ""
    answer = "ABCD0123".index(corrected) % 4 if corrected in tuple("ABCD0123") else int(row["answer"])
    return choice(row["question"], row["choices"], answer, row.get("subject") or subject)


def openbookqa(row: Row, subject: str) -> Item:
    """OpenBookQA, without the fact that comes with a question."""
    return _labelled(row["question_stem"], row)


def arc_challenge(row: Row, subject: str) -> Item | None:
    """ARC-Challenge: 1,150 of its 1,172 questions, those whose options have letters, as the paper counts them.

    Three of them have three options and three have five.
    """
    numbered = hashlib.sha256(row["question"].encode()).hexdigest()[:8] in NUMBERED_IN_ARC
    return None if numbered or row["answerKey"].isdigit() else _labelled(row["question"], row)


def arc_easy(row: Row, subject: str) -> Item:
    """ARC-Easy: all of its questions, whatever names its options."""
    return _labelled(row["question"], row)


def piqa(row: Row, subject: str) -> Item:
    """PIQA: two ways to a goal."""
    return choice(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]), "")


def hellaswag(row: Row, subject: str) -> Item:
    """HellaSwag: endings of a text about an activity."""
    return choice(f"{row['activity_label']}: {row['ctx']}", row["endings"], int(row["label"]), "")


def boolq(row: Row, subject: str) -> Item:
    """BoolQ: a passage and a question to answer with yes or no."""
    question = row["question"].strip().removesuffix("?")
    return choice(f"{row['passage']}\nQuestion: {question}?", ["no", "yes"], int(row["answer"]), "")


def ceval(row: Row, subject: str) -> Item:
    """C-Eval: one column per option."""
    return choice(row["question"], [row[letter] for letter in "ABCD"], "ABCD".index(row["answer"]), subject)


def mmmlu(row: Row, subject: str) -> Item:
    """MMMLU; its kind is the language."""
    # mmlu_DE-DE -> DE_DE
    language = subject.removeprefix("mmlu_").replace("-", "_")
    return choice(row["Question"], [row[letter] for letter in "ABCD"], "ABCD".index(row["Answer"]), language)


def mmlu_pro(row: Row, subject: str) -> Item:
    """MMLU-Pro: up to ten options."""
    return choice(row["question"], row["options"], string.ascii_uppercase.index(row["answer"]), row["category"])


def gpqa(row: Row, subject: str) -> Item:
    """GPQA, which lists the right answer first: its options are shuffled, seeded by the question."""
    # the order must not depend on the position in the file
    order = random.Random(row["Question"]).sample(range(4), 4)
    options = [row[GPQA_OPTIONS[index]].strip() for index in order]
    return choice(row["Question"], options, order.index(0), row.get("High-level domain") or "")


def gsm8k(row: Row, subject: str) -> Item:
    """GSM8K: the answer follows ``####``."""
    return _open(row["question"], row["answer"].rpartition("####")[2].strip().replace(",", ""), "")


def math500(row: Row, subject: str) -> Item:
    """MATH-500; its kind is the subject."""
    return _open(row["problem"], row["answer"], row["subject"])


def longbench(row: Row, subject: str) -> Item:
    """LongBench and LongBench-E; their kind is the length in words, or in characters of Chinese."""
    data_set = row.get("dataset") or subject
    return {
        "question": row["input"] if "input" in row else row["question"],
        "kind": next(bucket for bucket, limit in BUCKETS_OF_LENGTH.items() if row["length"] < limit),
        "answers": list(row["answers"]),
        "data_set": data_set.removesuffix("_e"),
        "context": row["context"],
        "family": family_of(data_set),
        "classes": list(row["all_classes"] or ()),
    }


def choice(question: str, choices: Sequence[str], answer: int, kind: str) -> Item:
    """Returns a question with options. Raises ValueError where the answer is none of them."""
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} to {len(choices)} options")
    letters = string.ascii_uppercase[: len(choices)]
    return {"question": question, "choices": list(choices), "letters": letters, "answer": answer, "kind": kind}


def _labelled(question: str, row: Row) -> Item:
    return choice(question, row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]), "")


def _open(question: str, answer: str, kind: str) -> Item:
    return {"question": question, "answer": answer, "kind": kind}
