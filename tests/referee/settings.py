"""What the referee can be told, at its start and by POST /referee/config. Unknown names and wrong types are refused."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Range = tuple[NonNegativeFloat, NonNegativeFloat]  # least and most
Count = tuple[PositiveInt, PositiveInt]  # least and most


class Strict(BaseModel):
    """Frozen; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(Strict):
    """Per sliding window, whatever its length; None: no limit."""

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    window_s: PositiveFloat = 60.0
    headers: bool = True  # x-ratelimit-*, on answers and refusals
    retry_after: bool = True  # whole seconds, rounded up
    retry_after_ms: bool = False


class Price(Strict):
    """US dollars per million tokens."""

    input_usd_per_million: NonNegativeFloat = 1.5
    output_usd_per_million: NonNegativeFloat = 2.0
    batch_factor: Share = 0.5


class Answers(Strict):
    """How an answer looks and how long it takes; both are drawn from the request."""

    num_tasks: Count = (7, 9)
    output_words: Count = (15, 60)
    bad_share: Share = 0.1  # of tasks that repeat a known one, speak of pictures, or have a broken heading
    latency_s: Range = (0.0, 0.0)


class Batches(Strict):
    """A batch goes a step on (validating, in progress, done) after so many polls of it and so many seconds."""

    polls_per_step: Annotated[int, Field(ge=0)] = 1
    seconds_per_step: NonNegativeFloat = 0.0
    expires_after_rows: Annotated[int, Field(ge=0)] | None = None  # the rest is reported as expired; None: all is done


class FaultKind(StrEnum):
    """The first group is refused and costs nothing, `reset` and `login_page` too. The others are billed."""

    UNAUTHORIZED = "unauthorized"  # 401
    FORBIDDEN = "forbidden"  # 403
    MODEL_NOT_FOUND = "model_not_found"  # 404
    INSUFFICIENT_QUOTA = "insufficient_quota"  # 429 that no waiting mends
    RATE_LIMITED = "rate_limited"  # 429; with Retry-After where retry_after_s is set
    SERVER_ERROR = "server_error"  # 500
    UNAVAILABLE = "unavailable"  # 503; with Retry-After where retry_after_s is set
    CONTENT_FILTER_REFUSAL = "content_filter_refusal"  # 400, code content_filter

    RESET = "reset"  # before the first byte
    LOGIN_PAGE = "login_page"  # 200 and HTML, as of a proxy

    TIMEOUT = "timeout"  # no byte until the client leaves, for duration_s at most
    RESET_IN_BODY = "reset_in_body"
    SLOW_BODY = "slow_body"  # whole and right, but trickles for duration_s
    TRUNCATED_JSON = "truncated_json"  # an honest Content-Length over half a body
    SHORT_BODY = "short_body"  # Content-Length of the whole, half of the body, end of the connection
    EMPTY_CHOICES = "empty_choices"
    WRONG_MODEL = "wrong_model"
    CONTENT_FILTER = "content_filter"  # 200, finish_reason content_filter, empty text
    NULL_TEXT = "null_text"
    NO_USAGE = "no_usage"


class Fault(Strict):
    """One way to fail, and for which requests: exactly one of `share`, `first`, `seeds` and `every`.

    `share` is decided by a hash of the body and its attempt number. `attempts`: it plays on that many first attempts
    of the same body, so that a retry succeeds; None means 1 for `share` and `seeds`, and no end for the others.
    Attempts are counted over requests that the limits let through. The first fault of the list that applies plays.
    """

    kind: FaultKind
    share: Share | None = None
    first: PositiveInt | None = None  # requests, of whatever body
    seeds: frozenset[int] | None = None  # values of the body's field `seed`
    every: bool = False
    attempts: PositiveInt | None = None
    retry_after_s: NonNegativeFloat | None = None
    duration_s: PositiveFloat | None = None  # None: 600 for a timeout, 1 for a slow body

    @model_validator(mode="after")
    def _has_one_choice(self) -> "Fault":
        if sum(choice is not None for choice in (self.share, self.first, self.seeds, self.every or None)) != 1:
            raise ValueError("a fault takes exactly one of share, first, seeds and every")
        return self


class Settings(Strict):
    """The whole."""

    key: str = "good-key"
    models: tuple[str, ...] = ("gpt-3.5-turbo-instruct", "gpt-4o-mini", "referee")
    limits: Limits = Limits()
    price: Price = Price()
    answers: Answers = Answers()
    batches: Batches = Batches()
    faults: tuple[Fault, ...] = ()
    ledger: str | None = None  # a path, appended to

    def changed(self, changes: dict[str, Any]) -> "Settings":
        """With some values replaced; a section keeps the values that are not named. Raises ValidationError."""
        values = self.model_dump()
        for name, value in changes.items():
            values[name] = values[name] | value if isinstance(values.get(name), dict) else value
        return Settings.model_validate(values)
