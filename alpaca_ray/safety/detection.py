"""What a count of green tokens says: z-score, exact p-value, verdict (Kirchenbauer et al. 2023, section 4). Pure."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["marked", "unmarked", "too short to say"]

MIN_SCORED = 25  # distinct pairs below which nothing is said, whatever their colour
MAX_FALSE_POSITIVE_RATE = 1e-3  # "marked": an unmarked text has this many green tokens at most so often
MAX_MISS_RATE = 1e-2  # "unmarked": a marked text, if only half as green as delta allows, has so few at most so often
SMALLEST_P_VALUE = 2.2250738585072014e-308  # the smallest normal float: a p-value is never shown as 0


@dataclass(frozen=True)
class Detection:
    """What the detector found. `num_scored` counts distinct (previous, token) pairs, `num_green` the green ones.

    `p_value`: how likely so many green ones are in a text that nobody marked; where it falls below 2.2e-308 that
    stands instead, and `log10_p_value` tells the rest. "unmarked" says that a marked text of usual entropy would look
    otherwise; one that had no choice of words (code, recitation) carries no mark that could be found.
    """

    verdict: Verdict
    z_score: float
    p_value: float
    log10_p_value: float
    num_scored: int
    num_green: int

    def to_json(self) -> str:
        """One line of JSON, no NaN in it."""
        return json.dumps(asdict(self))

    def render(self) -> str:
        """A line for people."""
        return (
            f"{self.verdict}: z {self.z_score:.2f}, p-value {power_of_ten(self.log10_p_value)}, "
            f"{self.num_green} of {self.num_scored} tokens green"
        )


def detection(num_green: int, num_scored: int, gamma: float, delta: float) -> Detection:
    """Judge a count of green pairs, each pair counted once."""
    log_p = log_upper_tail(num_green, num_scored, gamma)
    return Detection(
        verdict=verdict(num_green, num_scored, gamma, delta),
        z_score=z_score(num_green, num_scored, gamma),
        p_value=max(math.exp(log_p), SMALLEST_P_VALUE),
        log10_p_value=log_p / math.log(10),
        num_scored=num_scored,
        num_green=num_green,
    )


def verdict(num_green: int, num_scored: int, gamma: float, delta: float) -> Verdict:
    """The count has to rule out one of the two, a text without the mark or one with it; else it is too short."""
    if num_scored < MIN_SCORED:
        return "too short to say"
    if log_upper_tail(num_green, num_scored, gamma) <= math.log(MAX_FALSE_POSITIVE_RATE):
        return "marked"
    red = num_scored - num_green
    if log_upper_tail(red, num_scored, 1 - green_share(gamma, delta / 2)) <= math.log(MAX_MISS_RATE):
        return "unmarked"
    return "too short to say"


def green_share(gamma: float, delta: float) -> float:
    """Expected share of green tokens where all tokens were equally likely: the most that delta can bring."""
    odds = math.exp(delta)
    return gamma * odds / (1 + gamma * (odds - 1))


def z_score(num_green: int, num_scored: int, gamma: float) -> float:
    """Standard deviations above the expected count; 0 where nothing was scored."""
    if num_scored == 0:
        return 0.0
    return (num_green - gamma * num_scored) / math.sqrt(num_scored * gamma * (1 - gamma))


def log_upper_tail(num_green: int, num_scored: int, gamma: float) -> float:
    """ln P(X >= num_green) for X of the binomial distribution (num_scored, gamma), all terms summed."""
    if num_green <= 0:
        return 0.0
    log_odds = math.log(gamma) - math.log1p(-gamma)
    log_all_red = math.lgamma(num_scored + 1) + num_scored * math.log1p(-gamma)
    terms = [
        log_all_red - math.lgamma(k + 1) - math.lgamma(num_scored - k + 1) + k * log_odds
        for k in range(num_green, num_scored + 1)
    ]
    largest = max(terms)
    return min(0.0, largest + math.log(math.fsum(math.exp(term - largest) for term in terms)))


def power_of_ten(exponent: float) -> str:
    """10**exponent with two digits, where a float would be 0 too: -400.5 is 3.2e-401."""
    whole = math.floor(exponent)
    digits = f"{10 ** (exponent - whole):.1f}"
    if digits == "10.0":
        digits, whole = "1.0", whole + 1
    return f"{digits}e{whole}" if whole < -2 else f"{10**exponent:.2g}"
