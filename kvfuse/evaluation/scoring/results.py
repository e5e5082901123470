"""Read results off replies (a number, a formula, a text) and compare them."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from kvfuse.evaluation.scoring.extraction import strip_thoughts

NUMBER = re.compile(r"(?<![\w.])[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<![\d.)])[-+]?(?:\d+\.?\d*|\.\d+)|\d+(?:\.\d+)?")
ANSWER = re.compile(r"(?i)\banswer\s*(?:is)?\s*[:=]?\s*([^\n]+)")


def same_answer(reply: str, answer: str) -> bool:
    """Returns whether a reply is the right answer; thoughts, surrounding white space and case do not count."""
    return strip_thoughts(reply).casefold() == answer.strip().casefold()


def extract_number(text: str) -> str | None:
    """Returns the number that a reply ends in, in plain digits.

    It is the number after ``####``, else in the last box, else on the last line that says "answer", else the last one.
    Currency, units and thousands separators are not part of it.
    """
    reply = unicodedata.normalize("NFKC", strip_thoughts(text)).replace("−", "-").replace("\\$", "$").replace("$", " ")
    reply = reply.replace("{,}", ",")  # LaTeX's thousands separator
    boxed = _boxed(reply)
    # the first number where the answer is marked, else the last of the reply
    marked = reply.split("####")[1:] or ([boxed] if boxed else ANSWER.findall(reply))
    found = (NUMBER.findall(marked[-1])[:1] if marked else []) or NUMBER.findall(reply)[-1:]
    return _plain_digits(found[0]) if found else None


def extract_result(text: str) -> str | None:
    """Returns the formula that a reply ends in: in the last box, after the last "Answer:", or in the last ``$...$``."""
    reply = strip_thoughts(text)
    candidates = [_boxed(reply), *ANSWER.findall(reply)[-1:], *re.findall(r"\$([^$]+)\$", reply)[-1:]]
    found = next(filter(None, candidates), None)
    return found.strip().rstrip(".") if found else None


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


def _plain_digits(number: str) -> str:
    value = Decimal(number.replace(",", ""))
    # "18.00" is "18", and 1E+3 is "1000"
    return str(value.quantize(Decimal(1))) if value == value.to_integral_value() else format(value.normalize(), "f")


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
    # 3) thousands separators, "x =" before the result, roots without braces
    formula = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", formula)
    return re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", re.sub(r"\A[a-zA-Z]=", "", formula))


def _value(formula: str) -> Fraction | None:
    try:
        return Fraction(formula)
    except (ValueError, ZeroDivisionError):
        return None
