"""Arithmetic that can be checked: "12 * 7 = 84" in an output, and the answer to "What is 15% of 80?".

Exact, over fractions, and charitable: what is right in some reading is right. Rounding or cutting to the decimals
shown, integer division, percentages as shares or as numbers and chains of steps ("5 * 3 = 15 + 2 = 17") are no errors,
and nothing is checked beside unknowns, units, functions or remainders.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise

from alpaca_ray.generate.parse import Candidate

_NUMBER = r"[$\u20ac\u00a3]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?"
# The signs: times (x between digits, a cross, a dot), divided by, the typographic minus.
_SIGN = r"\*\*|[-+*/^()\u00d7\u00b7\u00f7\u2212]|(?<=\d)x(?=\d)|(?<=\d )x(?= \d)"
_RUN = re.compile(rf"(?:(?:{_NUMBER}|{_SIGN}|=)[ \t]*)+")
_EQUALS = re.compile(r"(?<![<>!=:+*/%^-])=(?![=>])")
_PERCENT_OF = re.compile(rf"(?P<share>{_NUMBER}(?<=%)) of (?P<whole>{_NUMBER})(?P<answer> (?:is|=|equals) {_NUMBER})?")

# What may stand before a statement and behind it. Any other word may belong to it: "the root of", "and 2 left".
_FREE_LEFT = re.compile(
    r"""(?: \n | [.:;!?,][ \t] | [("'`>|] | \*\* | \b(?:is|are|was|so|thus|then|hence|therefore|because|since|as|that|
    which|means|gets?|gives?|have|has|calculate|compute|equation|answer|result|total)[ \t] ) [ \t]*\Z""",
    re.VERBOSE | re.IGNORECASE,
)
_FREE_RIGHT = re.compile(
    r"""[ \t]* (?: \Z | \n | \*\*(?!\s*\d) | [.,;:!?)"'`|] (?!\d) (?![ \t]*(?:r|rem|remainder|with|and|plus|times)\b) )
    | [ \t]+ (?:so|which|because|therefore|then|but|is|are|since|hence)\b""",
    re.VERBOSE | re.IGNORECASE,
)
# Where another arithmetic, an estimate, or an error on purpose is spoken of, nothing is checked.
_OTHER_RULES = re.compile(
    r"""\b(?:mod|modulo|modulus|modular|binary|hex|hexadecimal|octal|base|xor|bitwise|matrix|matrices|vectors?|clock|
    approximate\w*|estimat\w*|round\w*|mistakes?|incorrect\w*|wrong\w*|false|joke|riddle|puzzle|pattern|fallacy)\b""",
    re.VERBOSE | re.IGNORECASE,
)

_QUESTION = re.compile(
    r"""(?:what\s+is|what's|how\s+much\s+is|calculate|compute|evaluate|solve|work\s+out|find) \b \s* (?:the\s+)?
    (?:(?:value|result|answer|sum|product|difference|quotient)\s+of\s+)? (?:the\s+)? (?:following\b\s*)?
    (?:(?:arithmetic|mathematical|math|simple)\s+)? (?:(?:expression|problem|calculation|equation)\b)? \s* :? \s*
    (?P<task>[^:?]*\d[^:?]*?) [\s=?.]*""",
    re.VERBOSE | re.IGNORECASE,
)
_CALCULATES = re.compile(r"\b(?:calculate|compute|evaluate|solve|what is)\b", re.IGNORECASE)
_SIGN_WORDS = {"plus": "+", "minus": "-", "times": "*", "multiplied by": "*", "divided by": "/"}
# Answers in words or with an exponent: their numbers are only parts of the value.
_OTHER_NOTATION = re.compile(r"remainder|thousand|million|billion|hundred|\br ?\d|\de[+\d]|10\^|[\u2070-\u2079]", re.I)

_OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_PLAIN = str.maketrans({"\u00d7": "*", "\u00b7": "*", "x": "*", "\u00f7": "/", "\u2212": "-", "^": "**"})
_MAX_LENGTH, _MAX_EXPONENT, _MAX_BITS = 120, 64, 2_000


def holds_wrong_arithmetic(candidate: Candidate) -> bool:
    """Whether the output states an equation of numbers that does not hold, or answers a sum with other numbers."""
    given = f"{candidate.instruction}\n{candidate.input}"
    if not re.search(r"\d", candidate.output) or _OTHER_RULES.search(f"{given}\n{candidate.output}"):
        return False
    wrong = (statement for statement in _wrong_statements(candidate.output) if statement.strip() not in given)
    return next(wrong, None) is not None or _answers_wrongly(candidate)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of + - * / ^ ( ) over decimal numbers, "%" as hundredths; None where it is anything else."""
    text = re.sub(r"[$\u20ac\u00a3]|(?<=\d),(?=\d{3})", "", expression.strip().translate(_PLAIN))
    text = re.sub(r"(\d+(?:\.\d+)?)%", r"(\1/100)", text)
    if len(text) > _MAX_LENGTH or re.search(r"[^\d\s.+*/()-]|//", text):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
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
    text = f"\n{text}"
    for run in _RUN.finditer(text):
        before = text[max(0, run.start() - 40) : run.start()]  # no more, or many statements take time squared
        parts = _EQUALS.split(_without_marks(run[0], at_line_start=before.rstrip(" \t").endswith("\n")))
        if len(parts) < 2 or not _FREE_RIGHT.match(text, run.end() - (len(run[0]) - len(run[0].rstrip(" \t*")))):
            continue
        if not _FREE_LEFT.search(before):
            parts = parts[1:]  # the first may go on to the left
        for number, (left, right) in enumerate(pairwise(parts), start=2):
            if (_is_sum(left) or _is_sum(right)) and not _holds(left, right, goes_on=number < len(parts)):
                yield run[0]
    for found in _PERCENT_OF.finditer(text):
        if found["answer"] and _FREE_RIGHT.match(text, found.end()):
            answer = re.sub(r"^ \S+", "", found["answer"])
            if not _holds(f"{found['share']} * {found['whole']}", answer, goes_on=False):
                yield found[0]


def _without_marks(run: str, at_line_start: bool) -> str:
    """The run without the bullet that begins its line and without marks of bold type."""
    run = re.sub(r"^[-+*][ \t]+", "", run) if at_line_start else run
    return re.sub(r"^\*\*(?=\S)|(?<=\S)\*\*[ \t]*$", "", run)


def _is_sum(part: str) -> bool:
    """Whether there are two numbers, and not those of a range ("3-5")."""
    is_range = re.fullmatch(r"\s*(\d+)-(\d+)\s*", part)
    return len(re.findall(_NUMBER, part)) > 1 and not (is_range and int(is_range[1]) < int(is_range[2]))


def _holds(left: str, right: str, goes_on: bool) -> bool:
    """Whether both sides are equal in some reading; a side that cannot be read holds.

    `goes_on`: a further step follows, so the right side may have begun it: "5 * 3 = 15 + 2 = 17".
    """
    lefts, rights = _readings(left), _readings(right)
    if goes_on and (first := re.match(rf"\s*{_NUMBER}", right)):
        rights += _readings(first[0])
    if not lefts or not rights:
        return True
    is_exact = not re.search(r"\d\.\d|[%/\u00f7]", left + right)
    return any(
        _is_close(a, b, Fraction(0) if is_exact else max(unit_a, unit_b)) for a, unit_a in lefts for b, unit_b in rights
    )


def _readings(part: str) -> list[tuple[Fraction, Fraction]]:
    """Values that the part may stand for, each with its unit: percentages are hundredths, or numbers."""
    value, unit = evaluate(part), _unit(part)
    if value is None or "%" not in part:
        return [] if value is None else [(value, unit)]
    bare = evaluate(part.replace("%", ""))
    return [(value, unit / 100), (value * 100, unit), *([] if bare is None else [(bare, unit)])]


def _unit(part: str) -> Fraction:
    """One unit of the last decimal shown, where the part is a single number."""
    decimals = re.findall(r"\d+(?:\.(\d+))?", part.replace(",", ""))
    return Fraction(1, 10 ** len(decimals[0])) if len(decimals) == 1 else Fraction(0)


def _is_close(a: Fraction, b: Fraction, unit: Fraction) -> bool:
    """Equal, or rounded or cut off where `unit` is not 0, or as computers show it (0.1 + 0.2 = 0.30000000000000004)."""
    return a == b or abs(a - b) < unit or (unit > 0 and abs(a - b) < abs(a) / 10**12)


def _answers_wrongly(candidate: Candidate) -> bool:
    """Whether the task is a sum and nothing else, and the output holds numbers but none that is its value."""
    value = _asked_value(candidate)
    if value is None or _OTHER_NOTATION.search(candidate.output):
        return False
    output = candidate.output.replace("\u2212", "-")
    fraction = r"(?:\d+\s+)?\d+\s*/\s*\d+"  # with a whole number before it, "1 1/3"
    shown = [re.sub(r"(?<=\d)\s+(?=\d+\s*/)", " + ", found) for found in re.findall(fraction, output)]
    shown += re.findall(rf"(?<![\d.,])-?{_NUMBER}", re.sub(fraction, " ", output))
    answers = [reading for text in shown for reading in _readings(text)]
    is_whole = value.denominator == 1
    return bool(answers) and not any(_is_close(value, a, Fraction(0) if is_whole else unit) for a, unit in answers)


def _asked_value(candidate: Candidate) -> Fraction | None:
    """The value of a task such as "What is 12 + 5 * 2?", or "Evaluate the expression." with one as its input."""
    question = _QUESTION.fullmatch(candidate.instruction.strip())
    task = question["task"] if question else ""
    if candidate.input:
        asks = _CALCULATES.search(candidate.instruction) and not re.search(r"\d", candidate.instruction)
        task = candidate.input.strip().rstrip("=? ") if asks else ""
    for word, sign in _SIGN_WORDS.items():
        task = re.sub(rf"(?<=\d) {word} (?=[\d$])", f" {sign} ", task)
    if share := _PERCENT_OF.fullmatch(task):
        return evaluate(f"{share['share']} * {share['whole']}")
    # Several hyphens make a telephone number or a date; a percentage in a sum can be read in two ways.
    return evaluate(task) if _is_sum(task) and not re.search(r"%|\d-\d+-", task) else None
