"""Extract the option that a reply chooses. A reply that names no option, or two, chooses none."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

ANSWERS = (
    "answer|antwort|respuesta|réponse|resposta|risposta|jawaban|jibu|idahun|"
    "答え|答案|正解|정답|답|الإجابة|الجواب|उत्तर|जवाब|উত্তর"
)
CHOOSING = (
    r"\bit(?:'s| is| must be| has to be)|"
    r"\b(?:i'd |i )?(?:choose|chose|pick|select|go with|going with|settle on|guess)\b|故选|选择|选|"
    r"\bi(?:'d| would) say\b|"
    r"\b(?:best|correct|right|closest)\s+(?:one|match|fit|statement|description|explanation|response|term|word)\s+is\b"
)
LINKS = "is|was|are|be|would be|must be|should be|ist|es|est|é|è|ni|adalah|应该是|应为|は|が|은|는|是|为|هي|هو|[:=-]"
FILLERS = "the|most|likely|probably|clearly|definitely|thus|therefore|option|choice|letter|opción|opção|选项"
CONJUNCTIONS = "or|and|und|oder|y|o|et|ou"
WORDS_AFTER = "because|since|as|which|is|was|and|or|for|due|given|but|that|would|will|seems|based"
"""Words that may follow the option A or I; before any other word, A is an article and I a pronoun."""

NEXT_TURN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|user|end)\|>|</s>|<(?:end|start)_of_turn>|\[INST\]|"
    # labels of a question or a role, at the start of a line
    r"^[ \t>#*_]*(?:"
    r"(?:(?:next|new|another|follow-up|example)\s+)?"
    r"(?:question|problem|exercise|instruction)(?:\s*\#?\d+)?[*_ \t]*[:.)]|"
    r"(?:next|new|another)\s+(?:question|problem|exercise)\b|"
    r"(?:question|problem|exercise)(?:\s*\#?\d+)?[*_ \t]*$|"
    r"Q\d*[*_]*[:.]|(?:human|user)\b[*_]*(?:\s*:|[ \t]*$)|"
    r"(?:问题|题目|問題|质问|質問|문제|질문|सवाल|प्रश्न)\s*\d*\s*[:：]|"
    r"(?:pregunta|pergunta|domanda|frage)(?:\s*\d+)?\s*:"
    r")",
    re.MULTILINE | re.IGNORECASE,
)
"""What a base model writes where it should have ended: the next question, or the next turn of a chat."""


def strip_thoughts(text: str) -> str:
    """Returns the reply without ``<think>`` blocks; an unclosed block ends with the reply."""
    text = re.sub(r"(?is)<think>.*?</think>", " ", text)
    return re.sub(r"(?is)<think>.*\Z|\A.*</think>", "", text).strip()


def own_turn(text: str, answered: Callable[[str], bool]) -> str:
    """Returns a reply up to the first question that the model asked itself after its answer.

    Args:
        text: The reply.
        answered: Whether a part of it has an answer; a reply may repeat the question first, which is no run-on.
    """
    for start in NEXT_TURN.finditer(text):
        if answered(head := text[: start.start()]):
            return head
    return text


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
    # 1) without a next question, and without what is ruled out
    reply = _ruled_in(own_turn(strip_thoughts(text), lambda part: _names_any(part, patterns, options or ())), patterns)
    # 2) a stated answer, or a letter at the start, unless the reply only lists all options, or else alone on its line
    listed = len(set(patterns["listed"].findall(reply))) > 1
    named = sorted(
        (match for name in ("stated", "declared", "concluded") for match in patterns[name].finditer(reply)),
        key=lambda match: match.start("letter"),
    )
    if not named and not listed:
        named = list(patterns["leading"].finditer(reply))
    if not named and len(by_itself := list(patterns["by itself"].finditer(reply))) == 1:
        named = by_itself
    # 3) the only letter anywhere
    if not named:
        named = list(patterns["anywhere"].finditer(reply))
        if len({match["letter"] for match in named}) > 1:
            return None
    # 4) the text of an option
    if not named:
        index = _quoted(reply, options or ())
        return None if index is None else letters[index]
    return None if patterns["another"].match(reply, named[-1].end()) else named[-1]["letter"].upper()


def _ruled_in(text: str, patterns: Mapping[str, re.Pattern[str]]) -> str:
    return patterns["denied"].sub(" ", _plain(text))


def _names_any(text: str, patterns: Mapping[str, re.Pattern[str]], options: Sequence[str]) -> bool:
    reply = _ruled_in(text, patterns)
    named = any(patterns[name].search(reply) for name in ("anywhere", "leading"))
    return named or _quoted(reply, options) is not None


def _plain(text: str) -> str:
    """Returns the reply in half-width characters, without emphasis and LaTeX around letters; a box is an answer."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mathsf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r" answer: \1 . ", text)
    text = re.sub(r"(?is)<answer>(.*?)</answer>", r" answer: \1 . ", text)
    text = re.sub(r"(?i)</?(?:b|i|em|strong|p|br|span|u)\s*/?>", "", text)
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
    about = r"(?:\s*(?:to|for)\b[^.\n]{0,60}?\b|\s*,[^,.\n]{1,40},)?"
    cue = rf"(?i:(?:{ANSWERS}){about}\s*(?:{LINKS})?|(?:{CHOOSING})|\b(?:option|choice)\s*(?:is|[:=]))"
    fillers = rf"(?i:[\s:]*(?:(?:{FILLERS})[\s:]+)*)"
    # 3) what joins it to another one: "or B", ", B and C"
    comma = rf",(?=\s*[{letters}]\s*(?:,|and\b|or\b|[.)]*\s*\Z))"
    joint = rf"[\s)\]\"'.]*(?i:\b(?:{CONJUNCTIONS})\b|[/&或和、]|{comma})[\s(\[\"']*"
    denial = r"(?i:\b(?:not|neither|nor|exclude|eliminate|rule out)|n't)\s+(?i:option |choice )?"
    patterns = {
        "denied": rf"{denial}\(?[{letters}]\b\)?",
        "stated": rf"{cue}{fillers}{opened}{letter}",
        # "B is the correct answer"
        "declared": rf"(?<![A-Za-z0-9À-ɏ'])\(?(?P<letter>[{letters}])\)?[ \t]+"
        r"(?i:(?:is|would be|seems|must be)\s+(?:the\s+)?(?:most\s+)?"
        r"(?:correct|right|best|true|likely|accurate|appropriate)\b)",
        # "Therefore, B."
        "concluded": rf"(?i:\b(?:therefore|thus|hence|so)\b)[\s,:]*{fillers}\(?(?P<letter>[{letters}])\)?"
        r"(?=[ \t]*[.!]?[ \t]*$)",
        "by itself": rf"^[\s(\[\"']*(?P<letter>[{letters}])[)\]\"'.!]*[ \t]*$",
        "listed": rf"^\s*\(?([{letters}])(?:[.):]|[ \t]*$)",
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
