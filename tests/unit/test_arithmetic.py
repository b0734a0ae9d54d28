"""Arithmetic in outputs: what is wrong is found, and nothing else is."""

import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.generate.arithmetic import evaluate, holds_wrong_arithmetic
from alpaca_ray.generate.parse import Candidate


def is_wrong(output: str, instruction: str = "Explain how you got there.", input: str = "") -> bool:
    return holds_wrong_arithmetic(Candidate(instruction, input, output))


@pytest.mark.parametrize(
    "output",
    [
        "12 * 7 = 85",
        "So 12 x 7 = 74.",
        "We add them: 17 + 25 = 43, so there are 43.",
        "First, 1,200 \u00f7 4 = 400.",
        "- 3 + 4 = 8",
        "**3 \u00d7 4 = 13**",
        "The total is $3.50 + $2.25 = $5.85.",
        "(2 + 3) * 4 = 24",
        "2^10 = 1000",
        "7 = 3 + 5",
        "x = 3 + 4 = 8",
        "5 * 3 = 15 + 2 = 18",
        "0.1 + 0.2 = 0.4",
        "10 / 4 = 4",
        "The tip is 15% of 80 is 15.",
        "20% + 30% = 60%",
        "First 2 + 2 = 4.\nThen 4 + 4 = 9.",
        "2 + 3 * 4 = 20",
        "5 \u2212 8 = 3",
    ],
)
def test_a_wrong_statement_is_found(output: str) -> None:
    assert is_wrong(output)


@pytest.mark.parametrize(
    "output",
    [
        "12 * 7 = 84", "12x7=84", "So 12 x 7 = 84.", "1,200 \u00f7 4 = 300", "2 + 3 * 4 = 14", "(2 + 3) * 4 = 20",
        "2^10 = 1,024",
        "10 / 3 = 3.33", "10 / 3 = 3.3333", "2 / 3 = 0.66", "2/3 = 0.67", "7 / 2 = 3", "7 / 2 = 4", "2/3 = 66.7%",
        "1/2 = 50%",
        "0.1 + 0.2 = 0.30000000000000004", "1.5 * 1.5 = 2.3", "5 * 3 = 15 + 2 = 17", "100 + 10% = 110", "20% * 50 = 10",
        "15% of 80 is 12.", "12.5% of 80 = 10", "-2 + 5 = 3", "5 \u2212 8 = \u22123", "1/2 + 1/3 = 5/6", "8/12 = 2/3",
    ],
)  # fmt: skip
def test_a_right_statement_passes(output: str) -> None:
    assert not is_wrong(output)


@pytest.mark.parametrize(
    "output",
    [
        # unknowns and functions
        "2x + 3 = 7", "x + 3 * 2 = 10", "y - 3 = 7", "2x + 3 = 2(4) + 3 = 11", "f(3) + 4 = 12", "sqrt(16) + 1 = 5",
        "the root of 16 + 9 = 5", "x * 3 * 2 = 12", "5! + 1 = 121", "3! = 3 * 2 = 6", "4 = 2 * x", "a = 2 * b + 1",
        "20 \u2013 3 = 5",
        # units and remainders
        "30 + 30 = 1 hour", "500 + 500 = 1 kg", "17 / 5 = 3 R 2", "17 / 5 = 3 remainder 2", "17 / 5 = 3, remainder 2",
        "6 + 6 = 1 dozen", "60 * 60 = 3.6 thousand", "25 \u00b0C * 9/5 + 32 = 77 \u00b0F", "5 m + 20 cm = 5.2 m",
        # legends, dates, code
        "90-100 = 4", "1-3 = 5", "10:30 - 9:15 = 1:15", "if a + 1 == 3:", "x += 3 + 4", "3 + 4 != 8", "3 + 4 >= 5",
        "7 // 2 = 3",
        "x = 3 * y = 4", "24/7 = always", "A4 = 210 x 297", "3,5 + 1 = 4,5", "1 1/2 + 2 = 3 1/2", "007 - 1 = 6",
        "2020-01-05 = Sunday",
        # not a decimal system, or a mistake that is spoken of
        "In binary, 101 + 11 = 1000.", "9 + 5 = 2 (mod 12)", "It is wrong that 2 + 2 = 5.",
        "The mistake is 7 * 8 = 54.",
        "9 ** 9 ** 9 ** 9 = 1", "1 / 0 = 1", "((((((((((1 + 1 = 3",
    ],
)  # fmt: skip
def test_what_cannot_be_checked_passes(output: str) -> None:
    assert not is_wrong(output)


def test_a_statement_that_was_given_is_not_held_against_the_output() -> None:
    assert not is_wrong("You wrote 2 + 2 = 5.", instruction="Check my sum: 2 + 2 = 5.")


@pytest.mark.parametrize(
    ("instruction", "input", "right", "wrong"),
    [
        ("What is 12 + 5 * 2?", "", "22", "34"),
        ("Calculate 15% of 80.", "", "15% of 80 is 12.", "15"),
        ("What is 17 times 3?", "", "The answer is 51.", "It is 41."),
        ("Compute the following: 1,000 - 1", "", "999", "1,001"),
        ("Evaluate the expression.", "(3 + 4) * 2", "7 * 2 is 14", "3 + 4 * 2, so 11"),
        ("Solve the math problem.", "144 / 12 = ?", "12", "13"),
        ("What is 10 divided by 4?", "", "2.5", "3.5"),
        ("What is 1 / 3?", "", "0.33", "0.5"),
        ("What is 2/3 + 2/3?", "", "1 1/3", "1/2"),
        ("What is 5 minus 8?", "", "-3", "3"),
    ],
)
def test_the_answer_to_a_sum_is_checked(instruction: str, input: str, right: str, wrong: str) -> None:
    assert not is_wrong(right, instruction, input)
    assert is_wrong(wrong, instruction, input)
    assert not is_wrong("I would use a calculator for that.", instruction, input)


@pytest.mark.parametrize(
    ("instruction", "input", "output"),
    [
        ("What is 3.14159?", "", "The number pi, to 5 digits."),
        ("What is the meaning of 24/7?", "", "All day, 7 days a week."),
        ("Calculate the area of a room of 3 by 4 metres.", "", "13 square metres"),
        ("What is 17 divided by 5?", "", "3 remainder 2"),
        ("What is 1500 * 2000?", "", "3 million"),
        ("Find the largest number.", "3 + 4", "4"),
        ("Solve for x.", "2x + 3 = 7", "x = 2"),
        ("What is 555-0100-12?", "", "A number with 9 digits."),
    ],
)
def test_what_is_no_sum_is_not_answered_wrongly(instruction: str, input: str, output: str) -> None:
    assert not is_wrong(output, instruction, input)


SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
operands = st.integers(0, 10**6)


@settings(deadline=None, max_examples=200)
@given(operands, operands, st.sampled_from(sorted(SIGNS)), st.integers(-1000, 1000), st.booleans())
def test_a_statement_of_integers_is_wrong_exactly_if_it_is(a: int, b: int, sign: str, error: int, commas: bool) -> None:
    value = SIGNS[sign](a, b) + error
    statement = f"{a:,} {sign} {b:,} = {value:,}" if commas else f"{a} {sign} {b} = {value}"
    assert is_wrong(f"So {statement}.") == (error != 0)
    assert evaluate(f"{a} {sign} {b}") == SIGNS[sign](a, b)


@settings(deadline=None, max_examples=200)
@given(operands, st.integers(1, 10**4), st.integers(0, 8))
def test_a_quotient_may_be_rounded_to_any_number_of_decimals(a: int, b: int, decimals: int) -> None:
    assert not is_wrong(f"{a} / {b} = {a / b:.{decimals}f}")


@settings(deadline=None, max_examples=300)
@given(st.text() | st.text("0123456789+-*/^()=x%$., \n"), st.text("0123456789+-*/^()=?% "))
def test_no_text_is_a_failure(output: str, input: str) -> None:
    assert isinstance(is_wrong(output, "Calculate it.", input), bool)
