"""Word patterns as a Moderator of last resort: no model, no network. What they cover stands in local_patterns.yaml.

No package was fit to take their place (looked at in November 2026): alt-profanity-check 1.9.1 knows profanity alone and
pins scikit-learn to one version for its pickle, hatesonar 0.1.0 knows hate in tweets alone and wants onnxruntime,
skl2onnx and pandas, detoxify 0.5.4 loads its weights at run time. None knows of self-harm or of illicit advice.
"""

import asyncio
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib import resources

import yaml
from pydantic import BaseModel

from alpaca_ray.safety.verdict import Verdict

NAME = "local"
MAX_INLINE_CHARS = 10_000  # 3 ms (2 cores, 2.1 GHz); more would hold up the event loop
_GAP = re.compile(r"[\s\-_\u2010-\u2015]+")
_QUOTES = str.maketrans("\u2018\u2019\u02bc", "'''")


class _RuleText(BaseModel, extra="forbid"):
    categories: list[str]
    follow: list[str]
    gap_chars: int


class _Patterns(BaseModel, extra="forbid"):
    harmless: list[str]
    words: dict[str, list[str]]
    rules: list[_RuleText]


class _Rule:
    """Words of each list, one list after the other."""

    def __init__(self, rule: _RuleText, words: dict[str, list[str]]) -> None:
        self.categories = rule.categories
        groups = [words[name] for name in rule.follow]
        # Looking for plain strings first is 20 times faster than the expression, and most texts hold none of them.
        self._needed = [[phrase.rstrip("*") for phrase in group] for group in groups[::-1]]
        gap = rf"[^.!?]{{0,{rule.gap_chars}}}?"
        self._expression = re.compile(gap.join(_any_of(group) for group in groups))

    def holds(self, text: str) -> bool:
        """`text`: as `normalised` leaves it."""
        return (
            all(any(phrase in text for phrase in group) for group in self._needed)
            and self._expression.search(text) is not None
        )


class LocalModerator:
    """Judges by word patterns. Every verdict is degraded."""

    def __init__(self) -> None:
        _compiled()  # 0.2 s that no request should wait for

    async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
        """See `Moderator`. Always answers."""
        if sum(map(len, texts)) <= MAX_INLINE_CHARS:
            return [judge(text) for text in texts]
        return await asyncio.to_thread(lambda: [judge(text) for text in texts])


def judge(text: str) -> Verdict:
    """The categories of all rules that hold."""
    harmless, rules = _compiled()
    text = harmless.sub(" ", normalised(text))
    found = {category for rule in rules if rule.holds(text) for category in rule.categories}
    return Verdict(bool(found), tuple(sorted(found)), NAME, degraded=True)


def normalised(text: str) -> str:
    """Lower case, compatibility characters replaced, invisible ones taken out, each gap one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
        text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    return _GAP.sub(" ", text.casefold())


@cache
def _compiled() -> tuple[re.Pattern[str], list[_Rule]]:
    text = (resources.files("alpaca_ray") / "safety" / "local_patterns.yaml").read_text(encoding="utf-8")
    patterns = _Patterns.model_validate(yaml.safe_load(text))
    return re.compile(_any_of(patterns.harmless)), [_Rule(rule, patterns.words) for rule in patterns.rules]


def _any_of(phrases: Sequence[str]) -> str:
    """An expression for one of the phrases, whole words, the longest first."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return (
        r"\b(?:"
        + "|".join(re.escape(p.rstrip("*")) + (r"\w*" if p.endswith("*") else "") for p in longest_first)
        + r")\b"
    )
