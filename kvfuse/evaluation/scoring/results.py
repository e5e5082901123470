"""Read results off replies (a number, a formula, a text) and compare them."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from kvfuse.evaluation.scoring.extraction import ANSWERS, own_turn, strip_thoughts

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)"
NUMBER = re.compile(
    r"(?<![\d.)])[-+]?\d+ \d+/\d+(?![\d/])|(?<![\d.)])[-+]?\d+/[1-9]\d*(?![\d/])|"  # 1 1/2, 1/2
    r"(?<![\w.])[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<![\d.)])[-+]?(?:\d+\.?\d*|\.\d+)|\d+(?:\.\d+)?"
)
ANSWER = re.compile(r"(?i)\banswer\b[\s*_#(]*(?=[-+]?[\d.$\\])([^\n]+)")
"""The word with a number right after it, as below a heading."""

STATED = re.compile(
    rf"(?i)(?:\b(?:final |correct )?(?:{ANSWERS}))(?:\s*(?:to|for|of)\b[^.:\n]{{0,80}}?)?[*_\s]*"
    r"(?:\b(?:is|was|are|would be|must be|should be|equals|es|est|ist|é)\b|是|为|は|[:=：])[*_\s]*[:=]?[*_\s]*([^\n]+)"
)
GSM8K_END = re.compile(r"####(?![ \t]*\d+[.):][ \t]+[A-Za-z*])[ \t]*(?=[-+]?[ \t]*\.?\d)([^\n]+)")
"""GSM8K's mark of the result. A heading of this level, as in "#### 2. Add" or "#### Step 2", is none."""

TERM = rf"[(\s]*[-+]?(?:{DIGITS}%?|[A-Za-z]\b)(?:\^\d+)?(?:[ \t]+[A-Za-z]+){{0,3}}[)\s]*"
OPERATOR = r"(?:[-+*/×÷x·]|\\times|\\cdot|\\div|per|of|times|plus|minus)"
EQUATION = re.compile(rf"\s*(?:{TERM}(?:{OPERATOR}{TERM})+|[A-Za-z]\w*(?:\^\d+)?\s*)=\s*")
"""The left side of an equation: a calculation, or a variable."""

BETWEEN = re.compile(r"\s*(?:between|either)\b", re.IGNORECASE)
ALTERNATIVE = re.compile(rf"(?:[ \t]+[a-z]+)?[ \t]*(?:\b(?:or|to)\b|[–—]|(?<=\d)-)[ \t]*[-+]?{DIGITS}(?![^\n]*=)")
"""What makes of a number one of two, or the end of a range."""

MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def same_answer(reply: str, answer: str) -> bool:
    """Returns whether a reply is the right answer; thoughts, surrounding white space and case do not count."""
    return strip_thoughts(reply).casefold() == answer.strip().casefold()


def extract_number(text: str) -> str | None:
    """Returns the number that a reply ends in, in plain digits; a fraction stays one, as in "1/2".

    It is the number after ``####``, else in the last box, else where the answer is stated last, else the last one. Of
    an equation it is the right side. A stated range, or a choice of two numbers, is none. Currency, units, thousands
    separators and questions that the model asks itself afterwards are not part of it.
    """
    reply = own_turn(_plain_numbers(strip_thoughts(text)), lambda part: NUMBER.search(part) is not None)
    # 1) the first mark of GSM8K, which ends a reply
    if end := GSM8K_END.search(reply):
        return _leading_number(end[1])
    # 2) the last box; the last stated answer with a number; the last mention of an answer with one
    boxed = _boxed(reply)
    for marked in ([boxed] if boxed else [], STATED.findall(reply), ANSWER.findall(reply)):
        if numeric := [part for part in marked if NUMBER.search(part)]:
            return _leading_number(numeric[-1])
    # 3) the last number of all
    found = NUMBER.findall(reply)
    return _plain_digits(found[-1]) if found else None


def equal_numbers(reply: str, answer: str) -> bool:
    """Returns whether two numbers of :func:`extract_number` are equal in value."""
    value = _value(reply)
    return reply == answer or (value is not None and value == _value(answer))


def extract_result(text: str) -> str | None:
    """Returns the formula that a reply ends in: in the last box, where the answer is stated last, or in the last math.

    Math is ``$...$``, ``\\(...\\)`` or ``\\[...\\]``. Questions that the model asks itself afterwards are not read.
    """
    reply = own_turn(strip_thoughts(text), lambda part: _find_result(part) is not None)
    return _find_result(reply)


def _find_result(reply: str) -> str | None:
    stated = (STATED.findall(reply) or ANSWER.findall(reply))[-1:]
    math = [match[match.lastindex or 0] for match in MATH.finditer(reply)][-1:]
    candidates = [_boxed(reply), *map(_only_math, stated), *math]
    found = next(filter(None, candidates), None)
    return _without_delimiters(found) if found else None


def _only_math(stated: str) -> str:
    """Returns the math in a sentence, where there is one formula in it, and words only around it."""
    math = list(MATH.finditer(stated))
    in_words = len(math) == 1 and not re.search(r"[\d\\]", MATH.sub("", stated))
    return math[0][0] if in_words else stated


def _without_delimiters(formula: str) -> str:
    # a space before "**" would be a product's
    formula = re.sub(r"(?<! )[*_]+\Z|\A[*_]+", "", formula.strip().rstrip(".")).strip().rstrip(".")
    return re.sub(r"\A\\[(\[](.*)\\[)\]]\Z", r"\1", formula, flags=re.DOTALL).strip()


def same_result(reply: str, answer: str) -> bool:
    """Returns whether two LaTeX formulas are equal in spelling, in value, or by algebra if math_verify is installed."""
    first, second = _normalized(reply), _normalized(answer)
    if first == second or (_value(first) is not None and _value(first) == _value(second)):
        return True
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    return bool(verify(parse(f"${answer}$"), parse(f"${reply}$")))


def _boxed(text: str) -> str | None:
    """Returns the content of the last ``\\boxed{}``, with the braces within it; None where a brace is missing."""
    _, box, content = text.rpartition("\\boxed{")
    depth = 1  # of braces
    for end, character in enumerate(content if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return content[:end]
    return None


def _plain_numbers(text: str) -> str:
    """Returns a reply without what stands around and within numbers: currency, calculators' notes, what is denied."""
    reply = unicodedata.normalize("NFKC", text.replace("−", "-")).replace("\\$", "$")
    # 1) currency, with the sign of an amount kept at its digits
    reply = re.sub(r"(?<![\w)$.])-[ \t]*[$€£¥₹][ \t]*(?=\d)", "-", reply)
    reply = re.sub(r"[$€£¥₹]", " ", reply)
    # 2) LaTeX: separators of thousands, fractions; \\text{} around units
    reply = re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!,?|,\\!)(?=\d{3})", ",", reply)
    reply = re.sub(r"\\[dt]?frac\s*(?:\{(-?\d+)\}\s*\{(\d+)\}|(\d)(\d))", r" \1\3/\2\4", reply)
    reply = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r"\1", reply)
    # 3) calculators' notes of GSM8K, and "not 12 but"
    reply = re.sub(r"<<[^<>\n]*>>", "", reply)
    reply = re.sub(rf"(?i)(?:\bnot|n't)[ \t]+[*_]*{DIGITS}(?![\d/])", " ", reply)
    return re.sub(r"(?i)\bnegative[ \t]+(?=\d)", "-", reply)


def _leading_number(text: str) -> str | None:
    """Returns the number that a text begins with, or comes to by an equation; None for a choice of two."""
    # 1) to the right of the equation that stands first, or starts with the first number
    while (found := NUMBER.search(text)) and (equation := EQUATION.match(text) or EQUATION.match(text, found.start())):
        text = text[equation.end() :]
    # 2) the number there
    if found is None or BETWEEN.match(text) or ALTERNATIVE.match(text, found.end()):
        return None
    return _plain_digits(found[0])


def _plain_digits(number: str) -> str:
    if "/" in number:
        return _plain_fraction(number)
    value = Decimal(number.replace(",", ""))
    # "18.00" is "18"; a model that loops writes more digits than a Decimal's context has
    digits = format(value, "f")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) if value else "0"


def _plain_fraction(number: str) -> str:
    """Returns "1 1/2" as "3/2"; a fraction alone is not reduced, since it may be asked for as it is."""
    *whole, fraction = number.split(" ")
    numerator, denominator = fraction.split("/")
    if not whole:
        return f"{_plain_digits(numerator)}/{denominator}"
    sign = "-" if whole[0].startswith("-") else ""
    return f"{sign}{abs(int(whole[0])) * int(denominator) + int(numerator)}/{denominator}"


def _normalized(formula: str) -> str:
    """Returns one spelling of what LaTeX can spell in several ways."""
    formula = unicodedata.normalize("NFKC", formula).strip().strip("$").rstrip(".")
    # 1) markup without meaning: text commands, sizes, spaces, units
    formula = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", formula)
    formula = re.sub(r"\\(?:left|right|,|;|!|:|quad|displaystyle|\$|%)|\^\\circ|\^\{\\circ\}|[\s$%]|°", "", formula)
    # 2) fractions as a/b
    formula = re.sub(r"\\[dt]frac", r"\\frac", formula).replace("−", "-")
    formula = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"\\frac\{(-?\w+)\}\{(\w+)\}", r"\1/\2", formula)
    # 3) thousands separators, "x =" or a calculation before the result, roots without braces
    formula = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", formula)
    formula = re.sub(r"\A(?:[a-zA-Z]|[-+*/.()\d]+)=", "", formula)
    return re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", formula)


def _value(formula: str) -> Fraction | None:
    try:
        return Fraction(formula)
    except (ValueError, ZeroDivisionError):
        return None
