"""Which option a model chose, read off what it wrote. A reply that names none, or two, chose none."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

ANSWERS = "answer|antwort|respuesta|réponse|resposta|risposta|jawaban|jibu|idahun|答え|答案|正解|정답|답|الإجابة|الجواب|उत्तर|जवाब|উত্তর"
CHOOSING = r"\bit(?:'s| is| must be| has to be)|\b(?:i'd |i )?(?:choose|chose|pick|select|go with|going with|settle on|guess)\b|故选|选择|选"
LINKS = "is|was|are|be|would be|must be|should be|ist|es|est|é|è|ni|adalah|应该是|应为|は|が|은|는|是|为|هي|هو|[:=-]"
FILLERS = "the|most|likely|probably|clearly|definitely|thus|therefore|option|choice|letter|opción|opção|选项"
WORD_JOINTS = "or|and|und|oder|y|o|et|ou"
WORDS_AFTER = "because|since|as|which|is|was|and|or|for|due|given|but|that|would|will|seems|based"
"""What may follow the letter A, or I, where it is an option; before any other word it is an article, or a person."""


def strip_thoughts(text: str) -> str:
    """The reply without ``<think>`` blocks; a block that never ends is all that follows it."""
    text = re.sub(r"(?is)<think>.*?</think>", " ", text)
    return re.sub(r"(?is)<think>.*\Z|\A.*</think>", "", text).strip()


def extract_option(text: str, letters: str, options: Sequence[str] | None = None) -> str | None:
    """The letter of the option that a reply settles on; where it changes its mind, the last.

    Args:
        text: The reply.
        letters: The letters there are, upper case, e.g. ``ABCD``.
        options: What they stand for, in the same order: a reply may quote one in place of its letter.

    Returns:
        None where no option is named, or several, as in "A or B".
    """
    patterns = _patterns(letters)
    reply = patterns["denied"].sub(" ", _plain(strip_thoughts(text)))
    listed = len(set(patterns["listed"].findall(reply))) > 1
    named = list(patterns["stated"].finditer(reply)) or ([] if listed else list(patterns["leading"].finditer(reply)))
    if not named:
        named = list(patterns["anywhere"].finditer(reply))
        if len({match["letter"] for match in named}) > 1:
            return None
    if not named:
        place = _quoted(reply, options or ())
        return None if place is None else letters[place]
    return None if patterns["another"].match(reply, named[-1].end()) else named[-1]["letter"].upper()


def _plain(text: str) -> str:
    """The reply in plain characters: half-width, without emphasis and LaTeX around a letter; what is boxed is the answer."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mathsf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r" answer: \1 . ", text)
    return re.sub(r"[*`$_]|\\[()\[\]]", "", text).strip()


@lru_cache
def _patterns(letters: str) -> dict[str, re.Pattern[str]]:
    """The ways to name one of the letters.

    A letter stands alone. In lower case it is one only before punctuation, the end of its line, or in brackets.
    """
    upper = "|".join(
        rf"{letter}(?![ \t]+(?!(?:{WORDS_AFTER})\b)[A-Za-z])" if letter in "AI" else letter for letter in letters
    )
    alone = r"(?![A-Za-z0-9À-ɏ'])"
    letter = rf"(?P<letter>{upper}|[{letters.lower()}](?=[ \t]*(?:[])}}.,;:!?。、]|$))){alone}"
    opened = r"[\s\"'(\[{「『【《:]*"
    about = r"(?:\s*(?:to|for)\b[^.\n]{0,60}?\b)?"
    cue = rf"(?i:(?:{ANSWERS}){about}\s*(?:{LINKS})?|(?:{CHOOSING})|\b(?:option|choice)\s*(?:is|[:=]))"
    fillers = rf"(?i:[\s:]*(?:(?:{FILLERS})[\s:]+)*)"
    last = rf",(?=\s*[{letters}]\s*(?:,|and\b|or\b|[.)]*\s*\Z))"
    return {
        "denied": re.compile(
            rf"(?i:\b(?:not|neither|nor|exclude|eliminate|rule out)|n't)\s+(?i:option |choice )?\(?[{letters}]\b\)?"
        ),
        "stated": re.compile(rf"{cue}{fillers}{opened}{letter}", re.MULTILINE),
        "listed": re.compile(rf"^\s*\(?([{letters}])[.):]", re.MULTILINE),
        "leading": re.compile(
            rf"\A(?i:(?:option|choice)\s+)?{opened}{letter}(?=\s*[])}}.,:;\"'」』】》]|\s*$)", re.MULTILINE
        ),
        "anywhere": re.compile(rf"(?<![A-Za-z0-9À-ɏ'])(?P<letter>{upper}|(?<=\()[{letters.lower()}](?=\))){alone}"),
        "another": re.compile(
            rf"[\s)\]\"'.]*(?i:\b(?:{WORD_JOINTS})\b|[/&或和、]|{last})[\s(\[\"']*(?i:option )?[{letters}](?![A-Za-z0-9])"
        ),
    }


def _quoted(reply: str, options: Sequence[str]) -> int | None:
    """The place of the one option whose text the reply contains; of texts within each other, the longest."""
    words = f" {_words(reply)} "
    texts = [_words(option) for option in options]
    found = {text for text in texts if text and f" {text} " in words}
    longest = max(found, key=len, default="")
    return (
        texts.index(longest)
        if longest and all(text in longest for text in found) and texts.count(longest) == 1
        else None
    )


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", _plain(text).casefold()))
