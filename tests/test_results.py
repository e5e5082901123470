import pytest

from kvfuse.evaluation.scoring.results import extract_number, extract_result, same_result


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### $70,000", "70000"),
        ("#### -5", "-5"),
        ("#### 18.00 dollars", "18"),
        ("Answer: 18", "18"),
        ("Answer: $1,234.50", "1234.5"),
        ("The answer is 7 apples out of 12.", "7"),
        ("First 3, then 4.\nAnswer: 12 apples", "12"),
        ("That makes 10-5 = 5", "5"),
        ("The temperature is −3 degrees", "-3"),
        ("So it costs $ 2.5 .", "2.5"),
        ("**Answer:** 42", "42"),
        ("\\boxed{1{,}000}", "1000"),
        ("We find \\boxed{\\$36} in total, over 4 days.", "36"),
        ("<think>#### 1</think> It is 2", "2"),
        ("50%", "50"),
        ("１２", "12"),
        ("The total is 1200.", "1200"),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_a_reply_ends_in(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{1} no, \\boxed{\\text{(}2, \\pi)}", "\\text{(}2, \\pi)"),
        ("We get x.\nAnswer: $3\\sqrt{2}$", "$3\\sqrt{2}$"),
        ("hence $x = 4$.", "x = 4"),
        ("\\boxed{unfinished", None),
        ("no idea", None),
    ],
)
def test_the_formula_a_reply_ends_in(text, result):
    assert extract_result(text) == result


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\frac{1}{2}", "0.5"),
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("10,000", "10000"),
        ("$4$", "x = 4"),
        ("90^\\circ", "90"),
        ("\\text{Evelyn}", "Evelyn"),
        ("2.0", "2"),
        ("50\\%", "50"),
        ("3\\sqrt2", "3\\sqrt{2}"),
    ],
)
def test_one_result_in_two_spellings(one, other):
    assert same_result(one, other)
    assert same_result(other, one)


@pytest.mark.parametrize(
    ("one", "other"), [("1", "2"), ("\\frac{1}{2}", "\\frac{1}{3}"), ("x+1", "x-1"), ("(1,2)", "(2,1)"), ("1/0", "0")]
)
def test_different_results(one, other):
    assert not same_result(one, other)


def test_algebra_where_it_can_be_checked():
    pytest.importorskip("math_verify")
    assert same_result("2x + 1", "1 + 2x")
