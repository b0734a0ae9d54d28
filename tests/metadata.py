"""A cloud's metadata server on this machine, as strict as the documents: AWS's, Google's, Azure's."""

import datetime
import json
import time
from collections.abc import Callable
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

MACHINE = "workers_7"  # Azure's name of it
Answer = tuple[int, str]


class MetadataServer:
    """`with MetadataServer() as server:` answers at `server.url`; `take_back` is the notice."""

    def __init__(self, clouds: tuple[str, ...] = ("aws", "gcp", "azure")) -> None:
        self.asked = Event()  # somebody has asked and was told that there is no notice
        self.clouds = clouds
        self.rebalance_s: float | None = None  # AWS: when the recommendation was made
        self.maintenance = "NONE"  # Google's word
        self.events: list[dict[str, object]] = []  # Azure's, beside the notice
        self.broken: Answer | None = None  # in place of every answer
        self.refuses_tokens = False
        self.num_tokens = 0
        self.shown_s: float | None = None  # when a notice was first there for whoever asks
        self._token = ""
        self._deadline_s: float | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    def __enter__(self) -> "MetadataServer":
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """In place of the cloud's own."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def take_back(self, deadline_s: float) -> None:
        """The machine goes at `deadline_s`, in seconds since 1970."""
        self._deadline_s = deadline_s
        self.shown_s = time.time()

    def forget_tokens(self) -> None:
        """As when their six hours are over."""
        self._token = ""

    def answer(self, method: str, target: str, headers: dict[str, str]) -> Answer:
        """What the cloud of that path says; 404 for a cloud that is not here."""
        path = urlsplit(target).path
        routes: dict[str, tuple[str, Callable[..., Answer]]] = {
            "/latest/": ("aws", self._aws), "/metadata/": ("azure", self._azure),
            "/computeMetadata/": ("gcp", self._google), "/": ("gcp", self._google),
        }  # fmt: skip
        if self.broken is not None:
            return self.broken
        for prefix, (cloud, route) in routes.items():
            if path.startswith(prefix) and cloud in self.clouds:
                return route(method, path, headers, parse_qs(urlsplit(target).query))
        return 404, ""

    def _aws(self, method: str, path: str, headers: dict[str, str], _: dict[str, list[str]]) -> Answer:
        """400 without a lifetime of 1 s to 6 h for the token, 401 without the token, 404 while nothing is planned."""
        if (method, path) == ("PUT", "/latest/api/token"):
            return self._aws_token(headers)
        if not self._token or headers.get("x-aws-ec2-metadata-token") != self._token:
            return 401, ""
        if path == "/latest/meta-data/spot/instance-action" and self._deadline_s is not None:
            return 200, json.dumps({"action": "terminate", "time": _iso(self._deadline_s)})
        if path == "/latest/meta-data/events/recommendations/rebalance":
            self._tell_asked()
            if self.rebalance_s is not None:
                return 200, json.dumps({"noticeTime": _iso(self.rebalance_s)})
        return 404, ""

    def _aws_token(self, headers: dict[str, str]) -> Answer:
        if self.refuses_tokens:
            return 403, ""
        if not 1 <= int(headers.get("x-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21_600:
            return 400, ""
        self.num_tokens += 1
        self._token = f"token-{self.num_tokens}"
        return 200, self._token

    def _google(self, method: str, path: str, headers: dict[str, str], _: dict[str, list[str]]) -> Answer:
        """403 without Google's header."""
        if headers.get("metadata-flavor") != "Google":
            return 403, ""
        if path == "/computeMetadata/v1/instance/preempted":
            return 200, "FALSE" if self._deadline_s is None else "TRUE"
        if path == "/computeMetadata/v1/instance/maintenance-event":
            self._tell_asked()
            return 200, self.maintenance
        return (200, "computeMetadata/\n") if path == "/" else (404, "")

    def _azure(self, method: str, path: str, headers: dict[str, str], query: dict[str, list[str]]) -> Answer:
        """400 without Azure's header or the version of the interface."""
        if headers.get("metadata") != "true" or "api-version" not in query:
            return 400, ""
        if path == "/metadata/instance/compute/name":
            return 200, MACHINE
        if path != "/metadata/scheduledevents":
            return 404, ""
        self._tell_asked()
        notice = [] if self._deadline_s is None else [azure_event("Preempt", self._deadline_s)]
        return 200, json.dumps({"DocumentIncarnation": 1, "Events": [*self.events, *notice]})

    def _tell_asked(self) -> None:
        if self._deadline_s is None:
            self.asked.set()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply("GET")

            def do_PUT(self) -> None:
                self._reply("PUT")

            def _reply(self, method: str) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                status, body = server.answer(method, self.path, headers)
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(body)))
                if "aws" in server.clouds:
                    self.send_header("Server", "EC2ws")
                if "gcp" in server.clouds:
                    self.send_header("Metadata-Flavor", "Google")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Answers


def azure_event(kind: str, deadline_s: float | None, machine: str = MACHINE) -> dict[str, object]:
    """`deadline_s` None: it has begun."""
    at = (
        ""
        if deadline_s is None
        else format_datetime(datetime.datetime.fromtimestamp(deadline_s, datetime.UTC), usegmt=True)
    )
    return {
        "EventId": "C7061BAC", "EventStatus": "Started" if deadline_s is None else "Scheduled", "EventType": kind,
        "ResourceType": "VirtualMachine", "Resources": [machine], "NotBefore": at,
        "Description": "", "EventSource": "Platform", "DurationInSeconds": -1,
    }  # fmt: skip


def _iso(at_s: float) -> str:
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
