"""Extract the option that a reply chooses. A reply that names no option, or two, chooses none."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

ANSWERS = (
    "answer|antwort|respuesta|réponse|resposta|risposta|jawaban|jibu|idahun|"
    "答え|答案|正解|정답|답|الإجابة|الجواب|उत्तर|जवाब|উত্তর"
)
CHOOSING = (
    r"\bit(?:'s| is| must be| has to be)|"
    r"\b(?:i'd |i )?(?:choose|chose|pick|select|go with|going with|settle on|guess)\b|故选|选择|选"
)
LINKS = "is|was|are|be|would be|must be|should be|ist|es|est|é|è|ni|adalah|应该是|应为|は|が|은|는|是|为|هي|هو|[:=-]"
FILLERS = "the|most|likely|probably|clearly|definitely|thus|therefore|option|choice|letter|opción|opção|选项"
CONJUNCTIONS = "or|and|und|oder|y|o|et|ou"
WORDS_AFTER = "because|since|as|which|is|was|and|or|for|due|given|but|that|would|will|seems|based"
"""Words that may follow the option A or I; before any other word, A is an article and I a pronoun."""


def strip_thoughts(text: str) -> str:
    """Returns the reply without ``<think>`` blocks; an unclosed block ends with the reply."""
    text = re.sub(r"(?is)<think>.*?</think>", " ", text)
    return re.sub(r"(?is)<think>.*\Z|\A.*</think>", "", text).strip()


def extract_option(text: str, letters: str, options: Sequence[str] | None = None) -> str | None:
    """Returns the letter of the option that a reply settles on; where it changes its mind, the last one.

    Args:
        text: The reply.
        letters: The letters of the options, upper case, e.g. ``ABCD``.
        options: Their texts, in the same order: a reply may quote one in place of its letter.

    Returns:
        None where no option is named, or several, as in "A or B".
    """
    patterns = _patterns(letters)
    reply = patterns["denied"].sub(" ", _plain(strip_thoughts(text)))
    # 1) a stated answer, or a letter at the start, unless the reply only lists all options
    listed = len(set(patterns["listed"].findall(reply))) > 1
    named = list(patterns["stated"].finditer(reply)) or ([] if listed else list(patterns["leading"].finditer(reply)))
    # 2) the only letter anywhere
    if not named:
        named = list(patterns["anywhere"].finditer(reply))
        if len({match["letter"] for match in named}) > 1:
            return None
    # 3) the text of an option
    if not named:
        index = _quoted(reply, options or ())
        return None if index is None else letters[index]
    return None if patterns["another"].match(reply, named[-1].end()) else named[-1]["letter"].upper()


def _plain(text: str) -> str:
    """Returns the reply in half-width characters, without emphasis and LaTeX around letters; a box is an answer."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mathsf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r" answer: \1 . ", text)
    return re.sub(r"[*`$_]|\\[()\[\]]", "", text).strip()


@lru_cache
def _patterns(letters: str) -> dict[str, re.Pattern[str]]:
    """Returns the patterns of a letter being named.

    A letter is a word. In lower case it counts only before punctuation, at the end of its line, or in brackets.
    """
    # 1) a letter, and what may surround it
    follows = rf"(?![ \t]+(?!(?:{WORDS_AFTER})\b)[A-Za-z])"
    upper = "|".join(letter + follows if letter in "AI" else letter for letter in letters)
    end = r"(?![A-Za-z0-9À-ɏ'])"
    letter = rf"(?P<letter>{upper}|[{letters.lower()}](?=[ \t]*(?:[])}}.,;:!?。、]|$))){end}"
    opened = r"[\s\"'(\[{「『【《:]*"
    # 2) what announces it: "the answer to question 5 is most likely", "I choose option"
    about = r"(?:\s*(?:to|for)\b[^.\n]{0,60}?\b)?"
    cue = rf"(?i:(?:{ANSWERS}){about}\s*(?:{LINKS})?|(?:{CHOOSING})|\b(?:option|choice)\s*(?:is|[:=]))"
    fillers = rf"(?i:[\s:]*(?:(?:{FILLERS})[\s:]+)*)"
    # 3) what joins it to another one: "or B", ", B and C"
    comma = rf",(?=\s*[{letters}]\s*(?:,|and\b|or\b|[.)]*\s*\Z))"
    joint = rf"[\s)\]\"'.]*(?i:\b(?:{CONJUNCTIONS})\b|[/&或和、]|{comma})[\s(\[\"']*"
    denial = r"(?i:\b(?:not|neither|nor|exclude|eliminate|rule out)|n't)\s+(?i:option |choice )?"
    patterns = {
        "denied": rf"{denial}\(?[{letters}]\b\)?",
        "stated": rf"{cue}{fillers}{opened}{letter}",
        "listed": rf"^\s*\(?([{letters}])[.):]",
        "leading": rf"\A(?i:(?:option|choice)\s+)?{opened}{letter}(?=\s*[])}}.,:;\"'」』】》]|\s*$)",
        "anywhere": rf"(?<![A-Za-z0-9À-ɏ'])(?P<letter>{upper}|(?<=\()[{letters.lower()}](?=\))){end}",
        "another": rf"{joint}(?i:option )?[{letters}](?![A-Za-z0-9])",
    }
    return {name: re.compile(pattern, re.MULTILINE) for name, pattern in patterns.items()}


def _quoted(reply: str, options: Sequence[str]) -> int | None:
    """Returns the index of the only option whose text the reply contains; of texts within each other, the longest."""
    words = f" {_words(reply)} "
    texts = [_words(option) for option in options]
    found = {text for text in texts if text and f" {text} " in words}
    longest = max(found, key=len, default="")
    unique = longest and texts.count(longest) == 1 and all(text in longest for text in found)
    return texts.index(longest) if unique else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", _plain(text).casefold()))
