"""The service as it is deployed, on a Ray head of its own, and clients of it: patient, leaving, and too many."""

import asyncio
import contextlib
import json
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from prometheus_client.parser import text_string_to_metric_families

from alpaca_ray.cluster import local
from alpaca_ray.config import ServeArgs
from alpaca_ray.serve.keys import NewKey, make_key
from tests.patience import PATIENT

START_TIMEOUT_S, DEPLOY_TIMEOUT_S = 300.0, 300.0  # a busy machine fails no test
POLL_S = 0.1
CONTEXT = 20_000  # far more than a client waits for
WATERMARK_KEY = 3_141_592_653_589_793_238
MODEL = "patient"


@dataclass
class Outcome:
    """What one client got. `event_s`: when each event with text came, after the request went out, in seconds."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    finish_reason: str | None = None
    is_complete: bool = False
    event_s: list[float] = field(default_factory=list)
    body: str = ""  # of a refusal


@dataclass(frozen=True)
class Service:
    """A running one. `key`: of a client; it is not in any file of the service."""

    cluster: local.LocalCluster
    directory: Path
    key: NewKey
    host: str

    def deploy(self, applications: Mapping[str, ServeArgs], timeout_s: float = DEPLOY_TIMEOUT_S) -> None:
        """As `serve deploy` does, by route prefix. Raises UserError with Serve's message."""
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": self.host, "port": self.cluster.serve_port},
            "applications": [
                {
                    "name": prefix.strip("/") or "main",
                    "route_prefix": prefix,
                    "import_path": "alpaca_ray.serve.app:build",
                    "args": args.model_dump(mode="json"),
                }
                for prefix, args in applications.items()
            ],
        }
        file = self.directory / "serve_config.yaml"
        file.write_text(yaml.safe_dump(config))
        local.deploy(self.cluster, file, timeout_s)

    def get(self, path: str) -> str:
        """A page of Ray's dashboard."""
        token = (Path(self.cluster.directory) / "token").read_text()
        request = urllib.request.Request(self.cluster.dashboard + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.read().decode())

    def metrics(self) -> str:
        """What Prometheus would read of the node, where Ray tells it to look."""
        found = json.loads((Path(self.cluster.temp_dir) / "prom_metrics_service_discovery.json").read_text())
        pages = []
        for target in {target for group in found for target in group["targets"]}:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as page:
                pages.append(page.read().decode())
        return "\n".join(pages)

    def logs(self) -> str:
        """All that Ray and the service wrote to files."""
        files = [path for path in Path(self.cluster.temp_dir).rglob("*") if path.is_file() and not path.is_symlink()]
        return "\n".join(path.read_text(errors="replace") for path in [*files, self.directory / "head.log"])


@contextmanager
def service(directory: Path, environment: Mapping[str, str], num_cpus: int, host: str) -> Iterator[Service]:
    """A head with nothing deployed yet, ended with the block."""
    key = make_key("crowd", ["generate", "detect"])
    (directory / "keys.jsonl").write_text(key.line + "\n")
    (directory / "watermark_key").write_text(str(WATERMARK_KEY))
    ours = {
        "RAY_metrics_report_interval_ms": "1000",  # Ray's shortest; 10 s else
    }
    cluster = local.start(directory, num_cpus, PATIENT | ours | dict(environment), START_TIMEOUT_S)
    try:
        yield Service(cluster, directory, key, host)
    finally:
        local.stop(cluster)


def samples(page: str, name: str, **labels: str) -> list[float]:
    """The values of one of our metrics, by its name in the code or with Prometheus's ending."""
    return [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == f"ray_alpaca_ray_serve_{name}" and labels.items() <= sample.labels.items()
    ]


class Crowd:
    """Clients of one application that share a pool of connections. `async with`."""

    def __init__(self, base_url: str, key: str, timeout_s: float = 600.0) -> None:
        self._base_url, self._key, self._timeout_s = base_url, key, timeout_s

    async def __aenter__(self) -> "Crowd":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def complete(
        self,
        *,
        leaves: bool = False,
        begun: asyncio.Event | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> Outcome:
        """A streamed completion. `leaves`: the client closes the connection behind the first event with text.

        `begun`: set when that event is there.
        """
        asked = {"model": MODEL, "prompt": "x", "stream": True, **body}
        outcome, began_s = Outcome(), time.perf_counter()
        async with self._session.post(f"{self._base_url}/v1/completions", json=asked, headers=headers) as response:
            outcome.status, outcome.headers = response.status, response.headers
            if response.status != 200:
                outcome.body = await response.text()
                return outcome
            async for line in response.content:
                if line.startswith(b"data: "):
                    _take(outcome, line.removeprefix(b"data: ").strip(), time.perf_counter() - began_s)
                if begun is not None and outcome.text:
                    begun.set()
                if leaves and outcome.text:
                    response.close()
                    break
        return outcome

    async def ready(self) -> dict[str, Any]:
        """What the engine has in hand."""
        async with self._session.get(f"{self._base_url}/ready") as response:
            found: dict[str, Any] = await response.json()
            return found

    async def until_idle(self, deadline_s: float) -> dict[str, Any]:
        """The last thing that /ready said: of an engine with nothing in hand, or at the deadline."""
        ends_s = time.monotonic() + deadline_s
        while time.monotonic() < ends_s:
            state = await self.ready()
            if state.get("num_running") == state.get("num_waiting") == 0:
                break
            await asyncio.sleep(POLL_S)
        return state

    async def admitted(self, **body: Any) -> Outcome:
        """As `complete`, asked again while the server is full."""
        while (outcome := await self.complete(**body)).status == 429:
            await asyncio.sleep(POLL_S)
        return outcome


def _take(outcome: Outcome, data: bytes, now_s: float) -> None:
    if data == b"[DONE]":
        outcome.is_complete = True
        return
    event = json.loads(data)
    if "error" in event:
        outcome.body += data.decode()
        return
    for choice in event["choices"]:
        outcome.text += choice["text"]
        outcome.finish_reason = choice["finish_reason"] or outcome.finish_reason
        if choice["text"]:
            outcome.event_s.append(now_s)


async def closed_loop(crowd: Crowd, num_clients: int, num_requests: int, **body: Any) -> list[Outcome]:
    """So many clients, each with its next request as soon as it has the answer to the last, accepted or refused."""

    async def client(index: int) -> list[Outcome]:
        return [await crowd.complete(**body, seed=index * num_requests + k) for k in range(num_requests)]

    found: Sequence[list[Outcome]] = await asyncio.gather(*(client(index) for index in range(num_clients)))
    return [outcome for outcomes in found for outcome in outcomes]
