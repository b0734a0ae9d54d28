"""Moderators for tests over real HTTP."""

from collections.abc import Sequence

from pydantic import SecretStr

from alpaca_ray.safety.openai_moderation import OpenAIModerator
from alpaca_ray.safety.verdict import Verdict
from tests.moderation_server import KEY, ModerationServer


class Endpoint:
    """OpenAI's backend at a server: in a hurry while that is told to be slow, else so patient that a busy machine
    fails no test."""

    def __init__(self, server: ModerationServer, key: str = KEY) -> None:
        self._server = server
        self._patient, self._hurried = (
            OpenAIModerator(SecretStr(key), server.base_url, timeout_s=timeout_s) for timeout_s in (60.0, 0.3)
        )

    async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
        return await (self._hurried if self._server.fault == "slow" else self._patient).moderate(texts)

    async def close(self) -> None:
        for moderator in (self._patient, self._hurried):
            await moderator.close()
