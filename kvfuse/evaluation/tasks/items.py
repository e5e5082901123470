"""A row of each data set -> a question in the one form that all tasks ask: which rows count, and which answer is right."""

import hashlib
import random
import string
from collections.abc import Sequence
from typing import Any

from kvfuse.evaluation.tasks.longbench import family_of

Row = dict[str, Any]
Item = dict[str, Any]
"""``question``, ``kind`` and ``answer``: a text, or where there are ``choices``, named by ``letters``, the place of the right one."""

UNANSWERABLE = ("no_correct_answer", "expert")
NUMBERED_IN_ARC = """
    c4f3cab5 68301aab 4e9b91ce abdfc20d 77f1a4ff 957b47e3 ef19489a d743fadf
    34316346 9007d973 c5d06491 d67818c9 f0a41a3b 82e935ef 4a1b7c65 6ebb44ba
    9ed75e60 94170caa 47782863 07bd0c0f 2abc6ecd 37935a5f
"""
"""SHA-256, eight digits, of the 22 questions of ARC-Challenge's test split whose options are officially numbered, not lettered:
those of New York's examinations for grade 8. Copies with letters in place of the numbers are known by them."""


def mmlu_redux(row: Row, subject: str) -> Item | None:
    """MMLU-Redux: 5,632 of its 5,700 questions.

    Left out are the 35 without a correct option, the 32 that only an expert could check, and one without a question. Where
    the answer was found wrong, the corrected one counts if it names an option; 5 have none, and keep the old. The errors
    that leave a right answer (unclear, or several right) are asked as they are. Version 2.0 on the Hub, revised since, has
    other counts.
    """
    if row["error_type"] in UNANSWERABLE or not row["question"].strip():
        return None
    corrected = str(row["correct_answer"]) if row["error_type"] == "wrong_groundtruth" else ""
    place = "ABCD0123".index(corrected) % 4 if corrected in tuple("ABCD0123") else int(row["answer"])
    return choice(row["question"], row["choices"], place, row.get("subject") or subject)


def openbookqa(row: Row, subject: str) -> Item:
    """OpenBookQA, without the fact that it comes with."""
    return _labelled(row["question_stem"], row)


def arc_challenge(row: Row, subject: str) -> Item | None:
    """ARC-Challenge: 1,150 of its 1,172 questions, those whose options have letters, as the paper counts them.

    Three of them have three options and three have five.
    """
    numbered = hashlib.sha256(row["question"].encode()).hexdigest()[:8] in NUMBERED_IN_ARC
    return None if numbered or row["answerKey"].isdigit() else _labelled(row["question"], row)


def ceval(row: Row, subject: str) -> Item:
    """C-Eval: a column per option."""
    return choice(row["question"], [row[letter] for letter in "ABCD"], "ABCD".index(row["answer"]), subject)


def mmmlu(row: Row, subject: str) -> Item:
    """MMMLU, its kind the language."""
    return choice(
        row["Question"],
        [row[letter] for letter in "ABCD"],
        "ABCD".index(row["Answer"]),
        subject.removeprefix("mmlu_").replace("-", "_"),
    )


def mmlu_pro(row: Row, subject: str) -> Item:
    """MMLU-Pro: up to ten options."""
    return choice(row["question"], row["options"], string.ascii_uppercase.index(row["answer"]), row["category"])


def gpqa(row: Row, subject: str) -> Item:
    """GPQA, which lists the right answer first: the options in an order drawn by the question."""
    options = [
        row[name].strip()
        for name in ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    ]
    order = random.Random(row["Question"]).sample(range(4), 4)
    return choice(
        row["Question"], [options[place] for place in order], order.index(0), row.get("High-level domain") or ""
    )


def gsm8k(row: Row, subject: str) -> Item:
    """GSM8K: the answer is what stands behind ``####``."""
    return _open(row["question"], row["answer"].rpartition("####")[2].strip().replace(",", ""), "")


def math500(row: Row, subject: str) -> Item:
    """MATH-500, its kind the subject."""
    return _open(row["problem"], row["answer"], row["subject"])


def longbench(row: Row, subject: str) -> Item:
    """LongBench and LongBench-E, its kind the length: 0-4k, 4-8k or 8k+ words, or characters of Chinese."""
    data_set = row.get("dataset") or subject
    bucket = "0-4k" if row["length"] < 4000 else "4-8k" if row["length"] < 8000 else "8k+"
    question = row["input"] if "input" in row else row["question"]
    more = {"context": row["context"], "family": family_of(data_set), "classes": list(row["all_classes"] or ())}
    return {
        "question": question,
        "kind": bucket,
        "answers": list(row["answers"]),
        "data_set": data_set.removesuffix("_e"),
        **more,
    }


def choice(question: str, choices: Sequence[str], answer: int, kind: str) -> Item:
    """A question with options. Raises ValueError where the answer is none of them."""
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} to {len(choices)} options")
    letters = string.ascii_uppercase[: len(choices)]
    return {"question": question, "choices": list(choices), "letters": letters, "answer": answer, "kind": kind}


def _labelled(question: str, row: Row) -> Item:
    return choice(question, row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]), "")


def _open(question: str, answer: str, kind: str) -> Item:
    return {"question": question, "answer": answer, "kind": kind}
