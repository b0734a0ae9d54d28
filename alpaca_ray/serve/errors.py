"""What a client is told when it gets no answer: OpenAI's error body and codes, and nothing that was not its own."""

import logging
import re
import traceback
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from alpaca_ray.config import nearest
from alpaca_ray.safety.verdict import ModerationUnavailableError, UnjudgeableTextError
from alpaca_ray.serve.engine import ContextLengthError, EngineError, SchemaError
from alpaca_ray.serve.moderated import ContentFilterError
from alpaca_ray.serve.text import PromptError

logger = logging.getLogger(__name__)

PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")  # neither a prompt nor a key that slipped into a field's name
RETRY_AFTER_S = 1  # where nobody knows better: another replica is found at once, a new one takes some seconds


class APIError(Exception):
    """An answer other than 200, in OpenAI's form. `param` names the field that was wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def explain_invalid(errors: Sequence[Any], model: type[BaseModel] | None) -> APIError:
    """The first of pydantic's errors as OpenAI's clients read it; an unknown field comes with its nearest name."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return APIError(400, f"The body is not valid JSON: {error['ctx']['error']}", code="invalid_json")
    location = [str(part) for part in error["loc"] if part != "body"]
    if not all(PLAIN_NAME.fullmatch(part) or part.isdecimal() for part in location):
        return APIError(400, "The body has an unknown field", code="unknown_field")
    param = ".".join(location) or None
    if error["type"] == "extra_forbidden":
        hint = nearest(location[-1], list(model.model_fields) if model is not None and len(location) == 1 else [])
        return APIError(400, f"Unknown field {param}{hint}", param, "unknown_field")
    return APIError(400, f"{param or 'The body'}: {error['msg'].removeprefix('Value error, ')}", param, "invalid_value")


def as_api_error(error: Exception) -> APIError:
    """What the client is told. The text of an error that is not about the request is kept back, in the log too.

    Such texts quote paths, prompts and keys; the log has the kind of the error and where it arose.
    """
    answer = _expected(error)
    if answer is None:
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("a request failed with %s:\n%s", type(error).__qualname__, where)
        answer = APIError(500, "The server failed on this request; its log says where", code="internal_error")
    return answer


def _expected(error: Exception) -> APIError | None:
    match error:
        case APIError():
            answer = error
        case ContextLengthError():
            answer = APIError(400, str(error), code="context_length_exceeded")
        case PromptError():
            answer = APIError(400, str(error), code="invalid_prompt")
        case SchemaError():
            message = f"response_format: the schema cannot be obeyed: {error}"
            answer = APIError(400, message, "response_format", "invalid_value")
        case ContentFilterError():
            answer = APIError(400, str(error), code="content_filter")
        case UnjudgeableTextError():
            answer = APIError(400, "Moderation cannot judge this text, so it is not answered", code="content_filter")
        case ModerationUnavailableError():
            message = "No text can be moderated now, so none is answered: try again"
            answer = APIError(503, message, code="moderation_unavailable", retry_after_s=RETRY_AFTER_S)
        case EngineError():
            answer = APIError(503, "The engine failed: try again", code="engine_error", retry_after_s=RETRY_AFTER_S)
        case _:
            return None
    return answer
