"""What moderation says of a text, and the one way in which it can fail."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Verdict:
    """`categories` have OpenAI's names, sorted. `degraded`: the judge was not the one that should have judged."""

    flagged: bool
    categories: tuple[str, ...]
    backend: str
    degraded: bool


class ModerationUnavailableError(RuntimeError):
    """No verdict could be had, so the text must not pass. `reason` says why and holds nothing of the text."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the text could not be moderated ({self.reason})"


class UnjudgeableTextError(ModerationUnavailableError):
    """The backend is well but will not judge these very texts. Others that came with them deserve a second try."""


class Moderator(Protocol):
    """What judges texts: a backend, or several behind one another."""

    async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict for each text, in order. Raises ModerationUnavailableError."""
        ...


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of several, one at least: each flag counts, each lack too."""
    assert verdicts
    return Verdict(
        flagged=any(verdict.flagged for verdict in verdicts),
        categories=tuple(sorted({category for verdict in verdicts for category in verdict.categories})),
        backend="+".join(dict.fromkeys(verdict.backend for verdict in verdicts)),
        degraded=any(verdict.degraded for verdict in verdicts),
    )
