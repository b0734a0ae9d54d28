"""Arithmetic that can be checked: "12 * 7 = 84" in an output, and the answer to "What is 15% of 80?".

Exact, over fractions, and charitable: whatever may be read in a way that makes it right is right. Rounding to the
decimals shown, truncation, integer division, percentages as shares or as numbers, chains of steps ("5 * 3 = 15 + 2 =
17"), other bases, units and names of unknowns are no errors.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from alpaca_ray.generate.parse import Candidate

_NUMBER = r"[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?"
_TOKEN = rf"(?:{_NUMBER}|\*\*|[-+*/=^()×÷·\u2212]|(?<=[\d\s])x(?=[\d\s]))"
_RUN = re.compile(rf"(?:{_TOKEN}[ \t]*)+")
_EQUALS = re.compile(r"(?<![<>!=:+*/%^|&~-])=(?![=>~])")

# What may stand before a statement without belonging to it: nothing, punctuation, a word that is no function.
_FREE_LEFT = re.compile(r"(?:^|[\n.:;!?(\"'“|>`$]|,[ \t]|\b[A-Za-z]{2,}[ \t])[ \t]*\Z")
_BOUND_LEFT = re.compile(
    r"\b(?:of|by|over|sqrt|root|log|ln|sin|cos|tan|mod|minus|plus|times|negative|half|twice|double|not|step|and|or|to|"
    r"from|than|version|chapter|page)[ \t]*\Z",
    re.IGNORECASE,
)
# What may stand behind: not another digit, an unknown, a unit (they may change within a statement), a remainder.
_FREE_RIGHT = re.compile(
    r"(?![\d,.]\d|[A-Za-z°!%^_'’²³√/\\\[{<–—]|[ \t]*[A-Za-z](?![A-Za-z])|[ \t]*[%°²³√<>≈±–—/\\{\[]|"
    r"[ \t]*[($€£]|[ \t]*(?:remainder|rem|with|and|mod|thousand|million|billion|dozen|hundred|hours?|hrs?|min(?:ute)?s?|"
    r"sec(?:ond)?s?|days?|weeks?|months?|years?|kg|mg|grams?|kilograms?|km|cm|mm|miles?|met(?:er|re)s?|inch(?:es)?|"
    r"feet|ft|yards?|lit(?:er|re)s?|ml|dollars?|cents?|euros?|percent|degrees?|squared?|pairs?|quarters?|gallons?)\b)"
)
# Where another arithmetic, or an error on purpose, is spoken of, nothing is checked.
_OTHER_RULES = re.compile(
    r"\b(?:mod|modulo|modulus|modular|binary|hex|hexadecimal|octal|base|xor|bitwise|matrix|vector|clock|mistakes?|errors?|"
    r"incorrect\w*|wrong\w*|false|instead|joke|riddle|puzzle|pattern|fallacy|approximat\w*|estimat\w*|synergy)\b",
    re.IGNORECASE,
)

_QUESTION = re.compile(
    r"(?:what(?:'s| is)|how much is|calculate|compute|evaluate|solve|work out|find|determine)\s+"
    r"(?:for\s+)?(?:the\s+)?(?:(?:value|result|answer|sum|product|difference|quotient)\s+(?:of|to)\s+)?"
    r"(?:the\s+)?(?:following\s+)?(?:(?:arithmetic|mathematical|math|simple)\s+)?(?:expression|problem|calculation|sum)?"
    r"\s*:?\s*(?P<task>[^:?]*\d[^:?]*?)\s*[=?.]*\s*",
    re.IGNORECASE,
)
_CALCULATES = re.compile(
    r"\b(?:calculate|compute|evaluate|solve|add|subtract|multiply|divide|what is)\b", re.IGNORECASE
)
_PERCENT_OF = re.compile(rf"(?P<share>{_NUMBER})\s+of\s+(?P<whole>{_NUMBER})")
_WORDS = {"plus": "+", "minus": "-", "times": "*", "multiplied by": "*", "divided by": "/", "over": "/"}

_OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_MAX_LENGTH, _MAX_EXPONENT, _MAX_BITS = 120, 64, 2_000


def holds_wrong_arithmetic(candidate: Candidate) -> bool:
    """Whether the output states an equation between numbers that does not hold, or answers a sum with other numbers."""
    if _OTHER_RULES.search(f"{candidate.instruction}\n{candidate.input}\n{candidate.output}"):
        return False
    given = f"{candidate.instruction}\n{candidate.input}"
    wrong = [found for found in _wrong_statements(candidate.output) if found.strip() not in given]
    return bool(wrong) or _answers_wrongly(candidate)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of + - * / ^ ( ) over decimal numbers, "%" as hundredths; None where it is anything else."""
    text = expression.replace("**", "^").replace("−", "-").strip()
    for sign, plain in (("×", "*"), ("·", "*"), ("x", "*"), ("÷", "/"), ("^", "**")):
        text = text.replace(sign, plain)
    text = re.sub(r"[$€£]|(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"(\d+(?:\.\d+)?)%", r"(\1/100)", text)
    if len(text) > _MAX_LENGTH or re.search(r"[^\d\s.+*/()-]|//", text):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST) -> Fraction:
    """Raises ValueError for anything but arithmetic, and for powers that are too large to be meant."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
    raise ValueError(ast.dump(node))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) > _MAX_EXPONENT or bits * abs(exponent) > _MAX_BITS:
        raise ValueError(f"{base} ** {exponent}")
    return base ** int(exponent)


def _wrong_statements(text: str) -> Iterator[str]:
    """The equations within the text that hold in no reading."""
    for run in _RUN.finditer(text):
        parts = _EQUALS.split(_without_list_mark(text, run))
        if len(parts) < 2 or not _FREE_RIGHT.match(text, len(text[: run.end()].rstrip())):
            continue
        free_left = _FREE_LEFT.search(text[: run.start()]) and not _BOUND_LEFT.search(text[: run.start()])
        for left, right in zip(parts if free_left else parts[1:], parts[1:] if free_left else parts[2:], strict=False):
            if _is_sum(left) | _is_sum(right) and not _holds(left, right):
                yield run[0]


def _without_list_mark(text: str, run: re.Match[str]) -> str:
    """The run without a bullet or bold marks, where it begins a line."""
    at_line_start = not text[: run.start()].rpartition("\n")[2].strip()
    found = re.sub(r"^[-+*][ \t]+", "", run[0]) if at_line_start else run[0]
    return re.sub(r"^\*\*(?=\S)|(?<=\S)\*\*[ \t]*$", "", found)


def _is_sum(part: str) -> bool:
    """Whether there are two numbers with a sign between them that is no range ("3-5") and no sign of a list."""
    numbers = re.findall(_NUMBER, part)
    is_range = re.fullmatch(r"\s*(\d+)-(\d+)\s*", part)
    return len(numbers) > 1 and not (is_range and int(is_range[1]) < int(is_range[2]))


def _holds(left: str, right: str) -> bool:
    """Whether both sides are equal in some reading; a side that cannot be read holds."""
    lefts, rights = _readings(left), _readings(right)
    if not lefts or not rights:
        return True
    tolerance = max(_rounding(left), _rounding(right)) if "/" in left + right or "÷" in left + right else Fraction(0)
    if re.search(r"\.\d|%", left + right):
        tolerance = max(tolerance, min(_rounding(left), _rounding(right)))
    return any(abs(a - b) <= max(tolerance, abs(a) / 10**9) for a in lefts for b in rights)


def _readings(part: str) -> list[Fraction]:
    """Values that the part may stand for: percentages as hundredths or as numbers, a chain's next step left out."""
    first = re.match(rf"\s*-?\s*{_NUMBER}", part)
    texts = [part, part.replace("%", ""), first[0] if first and len(re.findall(_NUMBER, part)) > 1 else ""]
    values = [value for value in map(evaluate, texts) if value is not None]
    return [*values, *(value * 100 for value in values if "%" in part)] if evaluate(part) is not None else []


def _rounding(part: str) -> Fraction:
    """One unit of the last decimal place shown where the part is a single number: rounded or cut off, either is fine."""
    decimals = re.findall(r"\d+(?:\.(\d+))?", part.replace(",", ""))
    return Fraction(1, 10 ** len(decimals[0])) if len(decimals) == 1 else Fraction(0)


def _answers_wrongly(candidate: Candidate) -> bool:
    """Whether the task is a sum and nothing else, and the output holds numbers but none that is its value."""
    value = _asked_value(candidate)
    if value is None or re.search(
        r"(?i)\b(?:remainder|thousand|million|hundred|r ?\d)|\de[+\d]|10\^|[⁰-⁹]", candidate.output
    ):
        return False
    numbers = re.findall(r"(?<![\d.,])-?\s?" + _NUMBER, candidate.output.replace("−", "-"))
    fractions = re.findall(r"\d+\s*/\s*\d+|\d+\s+\d+\s*/\s*\d+", candidate.output)
    answers = [
        (evaluate(text), _rounding(text)) for text in numbers + [re.sub(r"(?<=\d)\s+(?=\d)", "+", f) for f in fractions]
    ]
    known = [(answer, unit) for answer, unit in answers if answer is not None]
    whole = value.denominator == 1
    return bool(known) and not any(
        abs(scaled - value) <= (0 if whole else unit) for answer, unit in known for scaled in (answer, answer * 100)
    )


def _asked_value(candidate: Candidate) -> Fraction | None:
    if candidate.input:
        is_asked = _CALCULATES.search(candidate.instruction) and not re.search(r"\d", candidate.instruction)
        task = candidate.input.strip().rstrip("=? ") if is_asked else ""
    else:
        question = _QUESTION.fullmatch(candidate.instruction.strip())
        task = question["task"] if question else ""
    for word, sign in _WORDS.items():
        task = re.sub(rf"(?<=\d)\s+{word}\s+(?=\d)", f" {sign} ", task)
    if share := _PERCENT_OF.fullmatch(task):
        return evaluate(f"{share['share']} * {share['whole']}") if share["share"].endswith("%") else None
    return evaluate(task) if _is_sum(task) and not re.search(r"%|\d\s*-\s*\d+\s*-|(?<!\S)\d+-\d+(?!\S)", task) else None
