"""Which requests a fault is for, and what it makes of their answers. How a connection breaks is in server.py."""

import hashlib
from typing import Any

from tests.referee import refusals
from tests.referee.ledger import Entry
from tests.referee.refusals import Refusal
from tests.referee.settings import Fault, FaultKind

UNBILLED = frozenset({FaultKind.RESET, FaultKind.LOGIN_PAGE})  # and every refusal
CUT_BEFORE_THE_FIRST_BYTE = frozenset({FaultKind.RESET, FaultKind.TIMEOUT})
# No answer of a batch can break so: such a row is reported as expired.
LOST_IN_A_BATCH = frozenset(
    {
        FaultKind.RESET,
        FaultKind.LOGIN_PAGE,
        FaultKind.TIMEOUT,
        FaultKind.RESET_IN_BODY,
        FaultKind.TRUNCATED_JSON,
        FaultKind.SHORT_BODY,
    }
)
LOGIN_PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body><form>Please sign in</form></body></html>"


def plays(fault: Fault, entry: Entry, played: int) -> bool:
    """Whether it is for this request; `played`: for how many it was so far."""
    endless = fault.attempts is None and (fault.every or fault.first is not None)
    if not endless and entry.attempt > (fault.attempts or 1):
        return False
    if fault.share is not None:
        digest = hashlib.sha256(f"{fault.kind.value}/{entry.key}/{entry.attempt}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64 < fault.share
    if fault.first is not None:
        return played < fault.first
    return fault.every or (fault.seeds is not None and entry.seed in fault.seeds)


def refusal_of(fault: Fault, model: str) -> Refusal | None:
    """What a fault says in place of an answer; None: it lets the request through."""
    wait = {} if fault.retry_after_s is None else {"retry-after": f"{fault.retry_after_s:g}"}
    return {
        FaultKind.UNAUTHORIZED: refusals.wrong_key(),
        FaultKind.FORBIDDEN: refusals.forbidden(),
        FaultKind.MODEL_NOT_FOUND: refusals.no_such_model(model),
        FaultKind.INSUFFICIENT_QUOTA: refusals.insufficient_quota(),
        FaultKind.RATE_LIMITED: refusals.rate_limited("requests", "Rate limit reached.", wait),
        FaultKind.SERVER_ERROR: refusals.server_error(),
        FaultKind.UNAVAILABLE: refusals.unavailable(wait),
        FaultKind.CONTENT_FILTER_REFUSAL: refusals.content_filtered(),
    }.get(fault.kind)


def choice(chat: bool, index: int, text: str | None, finish_reason: str) -> dict[str, Any]:
    """One choice of a response."""
    if chat:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def spoilt(payload: dict[str, Any], chat: bool, kind: FaultKind) -> dict[str, Any]:
    """A response of status 200 that is no answer."""
    match kind:
        case FaultKind.EMPTY_CHOICES:
            return payload | {"choices": []}
        case FaultKind.WRONG_MODEL:
            return payload | {"model": "another-model"}
        case FaultKind.CONTENT_FILTER:
            return payload | {"choices": [choice(chat, old["index"], "", kind) for old in payload["choices"]]}
        case FaultKind.NULL_TEXT:
            return payload | {"choices": [choice(chat, old["index"], None, "stop") for old in payload["choices"]]}
        case FaultKind.NO_USAGE:
            return {name: value for name, value in payload.items() if name != "usage"}
        case _:
            return payload
