"""A cloud's metadata server on this machine: AWS's and Google's answers about a spot machine."""

import datetime
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import TracebackType


class MetadataServer:
    """`with MetadataServer() as server:` answers at `server.url`; `take_back` is the notice."""

    def __init__(self) -> None:
        self.asked = Event()  # somebody has asked and was told that there is no notice
        self._deadline_s: float | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    def __enter__(self) -> "MetadataServer":
        Thread(target=self._server.serve_forever, daemon=True).start()
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

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """As the clouds document it. 401 without AWS's token, 403 without Google's header."""
        if (method, path) == ("PUT", "/latest/api/token"):
            return 200, "the-token"
        if path == "/latest/meta-data/spot/instance-action":
            return (401, "") if headers.get("x-aws-ec2-metadata-token") != "the-token" else self._aws()
        if path == "/computeMetadata/v1/instance/preempted":
            return (403, "") if headers.get("metadata-flavor") != "Google" else self._google()
        return 404, ""

    def _aws(self) -> tuple[int, str]:
        if self._deadline_s is None:
            self.asked.set()
            return 404, ""
        at = datetime.datetime.fromtimestamp(self._deadline_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return 200, json.dumps({"action": "terminate", "time": at})

    def _google(self) -> tuple[int, str]:
        return 200, "FALSE" if self._deadline_s is None else "TRUE"

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
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Answers
