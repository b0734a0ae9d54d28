"""What a cloud's metadata server says about this machine's end: AWS, Google, Azure. No Ray here.

Sources: EC2 User Guide, "Spot Instance interruption notices" and "EC2 instance rebalance recommendations"; Compute
Engine, "Preemptible VM instances" and "Query metadata server for maintenance event notices"; Azure, "Scheduled Events
for Linux VMs".
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Protocol

from pydantic import AwareDatetime, BaseModel

TIMEOUT_S = 2.0  # a metadata server answers within milliseconds or is not there
AWS_URL = "http://169.254.169.254"
AZURE_URL = "http://169.254.169.254"
GOOGLE_URL = "http://metadata.google.internal"

AWS_NOTICE_S = 120.0
AWS_TOKEN_S = 21_600  # the longest that AWS gives
GOOGLE_PREEMPTED_S = 30.0
GOOGLE_MAINTENANCE_S = 60.0  # with a GPU up to an hour, which nothing in the answer says
AZURE_STARTED_S = 10.0  # a begun event has no time any more, and Ray ends a node at once whose deadline is past

# (method, URL, headers) -> (status, headers with names in lower case, body). Raises OSError where nobody answers.
Fetch = Callable[[str, str, dict[str, str]], tuple[int, dict[str, str], str]]


class MetadataError(OSError):
    """The metadata server answers, but not what was asked for; says what to do."""


@dataclass(frozen=True)
class Notice:
    """The machine goes at `deadline_s`, in seconds since 1970; an advice says that it may."""

    deadline_s: float
    what: str  # the same words each time that the same thing is told
    is_advice: bool = False


class Cloud(Protocol):
    """A metadata server."""

    def is_here(self) -> bool:
        """Whether this machine is of this cloud. Raises OSError where nobody answers."""
        ...

    def ask(self, now_s: float) -> Notice | None:
        """The end of the machine, or an advice, or nothing.

        Raises OSError (MetadataError where somebody answers) and ValueError for an answer that makes no sense.
        """
        ...


class _Interruption(BaseModel):
    action: str
    time: AwareDatetime


class _Rebalance(BaseModel):
    noticeTime: AwareDatetime


class Aws:
    """IMDSv2. A token opens it for six hours; a 401 means that it has run out."""

    def __init__(self, fetch: Fetch, url: str = AWS_URL) -> None:
        self._fetch, self._url, self._token = fetch, url, ""

    def is_here(self) -> bool:
        status, headers, _ = self._fetch("PUT", f"{self._url}/latest/api/token", _token_headers())
        return status == 200 or headers.get("server") == "EC2ws"  # a 403 alone may be Google's

    def ask(self, now_s: float) -> Notice | None:
        if body := self._read("spot/instance-action"):
            end = _Interruption.model_validate_json(body)
            return Notice(end.time.timestamp(), f"interruption: {end.action}")
        if body := self._read("events/recommendations/rebalance"):
            at = _Rebalance.model_validate_json(body).noticeTime
            return Notice(now_s + AWS_NOTICE_S, f"rebalance recommendation of {at.isoformat()}", is_advice=True)
        return None

    def _read(self, path: str) -> str | None:
        """None for 404: nothing is planned."""
        self._token = self._token or self._new_token()
        status, body = self._get(path)
        if status == 401:
            self._token = self._new_token()
            status, body = self._get(path)
        if status not in (200, 404):
            raise MetadataError(f"AWS's metadata server answers {status} for {path}")
        return body if status == 200 else None

    def _get(self, path: str) -> tuple[int, str]:
        headers = {"X-aws-ec2-metadata-token": self._token}
        status, _, body = self._fetch("GET", f"{self._url}/latest/meta-data/{path}", headers)
        return status, body

    def _new_token(self) -> str:
        modify = "aws ec2 modify-instance-metadata-options --instance-id ID"
        try:
            status, _, token = self._fetch("PUT", f"{self._url}/latest/api/token", _token_headers())
        except TimeoutError:
            raise MetadataError(
                "AWS's metadata server is silent on the request for a token, as it is in a container while the hop "
                f"limit is 1: {modify} --http-put-response-hop-limit 2"
            ) from None
        if status == 403:
            raise MetadataError(
                "AWS's metadata server refuses (403): it is switched off for this instance, or a firewall is between: "
                f"{modify} --http-endpoint enabled"
            )
        if status != 200:
            raise MetadataError(f"AWS's metadata server answers {status} to the request for a token")
        return token


def _token_headers() -> dict[str, str]:
    return {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_S)}


class Google:
    """`preempted` turns to TRUE 30 s before the end. `maintenance-event` names a move of the machine, or its end."""

    def __init__(self, fetch: Fetch, url: str = GOOGLE_URL) -> None:
        self._fetch, self._url = fetch, url

    def is_here(self) -> bool:
        _, headers, _ = self._fetch("GET", f"{self._url}/", {"Metadata-Flavor": "Google"})
        return headers.get("metadata-flavor") == "Google"

    def ask(self, now_s: float) -> Notice | None:
        if self._read("preempted") == "TRUE":
            return Notice(now_s + GOOGLE_PREEMPTED_S, "preempted")
        event = self._read("maintenance-event")
        if event == "NONE":
            return None
        # MIGRATE_ON_HOST_MAINTENANCE: the machine moves while it runs, so nothing of Ray ends.
        is_advice = event != "TERMINATE_ON_HOST_MAINTENANCE"
        return Notice(now_s + GOOGLE_MAINTENANCE_S, f"maintenance: {event}", is_advice)

    def _read(self, name: str) -> str:
        headers = {"Metadata-Flavor": "Google"}
        status, _, body = self._fetch("GET", f"{self._url}/computeMetadata/v1/instance/{name}", headers)
        if status != 200:
            raise MetadataError(f"Google's metadata server answers {status} for {name}")
        return body.strip()


class _Event(BaseModel):
    EventType: str
    EventStatus: str
    Resources: list[str]
    NotBefore: str


class _Events(BaseModel):
    Events: list[_Event]


class Azure:
    """Scheduled Events. They name every machine of the scale set that they concern, so this one's name is asked first.

    None is acknowledged: Azure would then begin before NotBefore, and take away time that a checkpoint may need.
    """

    ENDS = ("Preempt", "Terminate", "Reboot", "Redeploy")  # Ray does not outlive them; Freeze is a pause of seconds

    def __init__(self, fetch: Fetch, url: str = AZURE_URL) -> None:
        self._fetch, self._url, self._name = fetch, url, ""

    def is_here(self) -> bool:
        status, _, _ = self._get("instance/compute/name?api-version=2021-02-01&format=text")
        return status == 200

    def ask(self, now_s: float) -> Notice | None:
        self._name = self._name or self._read("instance/compute/name?api-version=2021-02-01&format=text").strip()
        events = _Events.model_validate_json(self._read("scheduledevents?api-version=2020-07-01")).Events
        notices = [self._notice(event, now_s) for event in events if self._name in event.Resources]
        return min(notices, key=lambda notice: (notice.is_advice, notice.deadline_s), default=None)

    def _notice(self, event: _Event, now_s: float) -> Notice:
        at_s = parsedate_to_datetime(event.NotBefore).timestamp() if event.NotBefore else now_s + AZURE_STARTED_S
        return Notice(at_s, event.EventType, is_advice=event.EventType not in self.ENDS)

    def _read(self, path: str) -> str:
        status, _, body = self._get(path)
        if status != 200:
            raise MetadataError(f"Azure's metadata server answers {status} for {path}")
        return body

    def _get(self, path: str) -> tuple[int, dict[str, str], str]:
        return self._fetch("GET", f"{self._url}/metadata/{path}", {"Metadata": "true"})


CLOUDS: dict[str, Callable[..., Cloud]] = {"aws": Aws, "gcp": Google, "azure": Azure}


def find_cloud(fetch: Fetch, url: dict[str, str]) -> str | None:
    """The name of the cloud whose metadata server answers. `url`: the server's, in place of each cloud's own."""
    for name, cloud in CLOUDS.items():
        try:
            if cloud(fetch, **url).is_here():
                return name
        except OSError:
            continue
    return None


def fetch_by_http(method: str, url: str, headers: dict[str, str]) -> tuple[int, dict[str, str], str]:
    """See Fetch. Never by a proxy: it would tell of its own machine."""
    request = urllib.request.Request(url, method=method, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            return response.status, _lower(response.headers.items()), response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, _lower(error.headers.items()), ""
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else error from None
    except http.client.HTTPException as error:
        raise MetadataError(f"the metadata server's answer is cut off: {error}") from None


def _lower(headers: list[tuple[str, str]]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers}
