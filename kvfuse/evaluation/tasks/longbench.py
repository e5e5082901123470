"""LongBench's scores (Bai et al., arXiv 2308.14508): overlap of words, ROUGE-L, classes, paragraphs, counts, code."""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from kvfuse.evaluation.scoring.extraction import strip_thoughts

FAMILIES = {
    "question": "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader",
    "examples": "trec lsht triviaqa samsum",
    "summary": "gov_report qmsum multi_news vcsum",
    "retrieval": "passage_retrieval_en passage_retrieval_zh",
    "count": "passage_count",
    "code": "lcc repobench-p",
}
"""Data sets by the form of their prompts; ``examples`` have worked examples in their text."""
PUNCTUATION = string.punctuation + "。，、；：？！“”‘’（）《》"
ARTICLES = ("a", "an", "the")


def family_of(data_set: str) -> str:
    """Returns the key of :data:`FAMILIES` that a data set belongs to. Raises ValueError if it is not of LongBench."""
    name = data_set.removesuffix("_e")
    for family, names in FAMILIES.items():
        if name in names.split():
            return family
    raise ValueError(f"data set {data_set!r}, none of LongBench")


def score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns the best score over the right answers, 0 to 1.

    After worked examples only the reply's first line counts, since models continue with more examples.
    """
    reply = strip_thoughts(results[0]).lstrip("\n")
    if doc["family"] == "examples":
        reply = reply.split("\n")[0]
    scorer = next(scorer for scorer, names in SCORERS.items() if doc["data_set"] in names.split())
    return {"score": max(scorer(reply, answer, doc["classes"]) for answer in doc["answers"])}


def word_f1(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns the harmonic mean of the shares of common words; in Chinese, each character is a word."""
    # as in SQuAD: common words counted with their multiplicity
    said, wanted = _words(reply), _words(answer)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def rouge_l(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns the F-measure of the longest common subsequence of words."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer()).score(answer, reply)["rougeL"].fmeasure


def class_share(reply: str, answer: str, classes: Sequence[str]) -> float:
    """Returns one over the number of classes in the reply if the right one is among them.

    Classes whose name is part of the right one's do not count.
    """
    named = [name for name in classes if name in reply and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def number_share(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns the share of the reply's numbers (of a paragraph, or of paragraphs) that are the answer's."""
    # a reply that lists all paragraphs gets a fraction
    wanted, named = re.findall(r"\d+", answer), re.findall(r"\d+", reply)
    return named.count(wanted[0]) / len(named) if named and wanted else 0.0


def code_similarity(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns the similarity of the first line of code, 0 to 1, past lines of Markdown or comment."""
    # models wrap code in Markdown fences, or begin with a comment
    lines = [line for line in reply.split("\n") if line.strip() and not any(mark in line for mark in ("`", "#", "//"))]
    return round(difflib.SequenceMatcher(None, lines[0] if lines else "", answer).ratio(), 2)


SCORERS: dict[Callable[[str, str, Sequence[str]], float], str] = {
    word_f1: "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique triviaqa",
    rouge_l: "dureader gov_report qmsum multi_news vcsum samsum",
    class_share: "trec lsht",
    number_share: "passage_count passage_retrieval_en passage_retrieval_zh",
    code_similarity: "lcc repobench-p",
}


class _Tokenizer:
    """Words, and single characters of Chinese; rouge_score's own tokenizer drops everything but ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[一-鿿]|[^\W一-鿿]+", text.lower())


def _words(text: str) -> list[str]:
    """Returns words in lower case without articles and punctuation."""
    letters = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    return [word for word in _Tokenizer().tokenize(letters) if word not in ARTICLES]
