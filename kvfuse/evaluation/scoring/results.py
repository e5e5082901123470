"""The result of a calculation, read off what a model wrote, and whether two are the same."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from kvfuse.evaluation.scoring.extraction import strip_thoughts

NUMBER = re.compile(r"(?<![\w.])[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<![\d.)])[-+]?(?:\d+\.?\d*|\.\d+)|\d+(?:\.\d+)?")
ANSWER = re.compile(r"(?i)\banswer\s*(?:is)?\s*[:=]?\s*([^\n]+)")


def extract_number(text: str) -> str | None:
    """The number that a reply ends in, in plain digits: the one behind ``####``, else in the last box, else of the last line
    that says "answer", else the last. Currency, units and separators of thousands are not part of it."""
    reply = unicodedata.normalize("NFKC", strip_thoughts(text)).replace("−", "-").replace("\\$", "$").replace("$", " ")
    reply = reply.replace("{,}", ",")
    boxed = _boxed(reply)
    marked = reply.split("####")[1:] or ([boxed] if boxed else ANSWER.findall(reply))
    found = (NUMBER.findall(marked[-1])[:1] if marked else []) or NUMBER.findall(reply)[-1:]
    return _plain_digits(found[0]) if found else None


def extract_result(text: str) -> str | None:
    """The formula that a reply ends in: in its last box, else behind the last "Answer:", else between its last dollar signs."""
    reply = strip_thoughts(text)
    answers = ANSWER.findall(reply)
    dollars = re.findall(r"\$([^$]+)\$", reply)
    found = _boxed(reply) or (answers[-1] if answers else None) or (dollars[-1] if dollars else None)
    return found.strip().rstrip(".") if found else None


def same_result(one: str, other: str) -> bool:
    """Whether two formulas in LaTeX say the same: spelled alike or equal as numbers; where math_verify is installed, also by algebra."""
    mine, theirs = _normalised(one), _normalised(other)
    if mine == theirs or (_value(mine) is not None and _value(mine) == _value(theirs)):
        return True
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    return bool(verify(parse(f"${other}$"), parse(f"${one}$")))


def _boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{}``, braces within it included."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


def _plain_digits(number: str) -> str:
    value = Decimal(number.replace(",", ""))
    return str(value.quantize(Decimal(1))) if value == value.to_integral_value() else format(value.normalize(), "f")


def _normalised(formula: str) -> str:
    """One spelling of what LaTeX can spell in several ways."""
    formula = unicodedata.normalize("NFKC", formula).strip().strip("$").rstrip(".")
    formula = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", formula)
    formula = re.sub(r"\\(?:left|right|,|;|!|:|quad|displaystyle|\$|%)|\^\\circ|\^\{\\circ\}|[\s$%]|°", "", formula)
    formula = re.sub(r"\\[dt]frac", r"\\frac", formula).replace("−", "-")
    formula = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"\\frac\{(-?\w+)\}\{(\w+)\}", r"\1/\2", formula)
    formula = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", formula)
    return re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", re.sub(r"\A[a-zA-Z]=", "", formula))


def _value(formula: str) -> Fraction | None:
    try:
        return Fraction(formula)
    except (ValueError, ZeroDivisionError):
        return None
