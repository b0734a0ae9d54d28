"""Where a secret lies that should lie nowhere: files, command lines, what a dashboard answers."""

import base64
import json
import stat
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

# All that Ray's dashboard serves of a cluster, but profilers and training runs. {job} and {node} are filled in.
DASHBOARD = (
    "/nodes?view=summary", "/nodes?view=hostNameList", "/nodes/{node}", "/logical/actors", "/test/dump",
    "/api/cluster_status", "/api/v0/cluster_metadata", "/api/jobs/", "/api/jobs/{job}", "/api/jobs/{job}/logs",
    "/api/component_activities", "/api/serve/applications/", "/events", "/api/v0/cluster_events",
    "/api/data/datasets/{job}", "/api/v0/actors?detail=1", "/api/v0/jobs?detail=1",
    "/api/v0/nodes?detail=1", "/api/v0/placement_groups?detail=1", "/api/v0/workers?detail=1",
    "/api/v0/tasks?detail=1", "/api/v0/objects?detail=1", "/api/v0/runtime_envs?detail=1", "/api/v0/tasks/timeline",
)  # fmt: skip


def in_files(secrets: dict[str, str], directories: Iterable[Path]) -> Iterator[str]:
    """`name of the secret: file`, of every regular file below."""
    for directory in directories:
        for path in sorted(directory.rglob("*")):
            try:
                if stat.S_ISREG(path.lstat().st_mode):
                    yield from (f"{name}: {path}" for name in held(secrets, path.read_bytes()))
            except FileNotFoundError:  # the cluster is at work in there
                continue


def in_command_lines(secrets: dict[str, str], root: psutil.Process) -> Iterator[str]:
    """Of a process and all below it: any user of a machine sees them."""
    for process in (root, *root.children(recursive=True)):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        yield from (f"{name}: {line}" for name in held(secrets, line.encode()))


def in_dashboard(secrets: dict[str, str], dashboard: str, token: str) -> Iterator[str]:
    """Of every page of `DASHBOARD`, of all jobs and nodes, and of the nodes' metrics."""

    def ask(path: str) -> bytes:
        request = urllib.request.Request(dashboard + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as response:  # raises for an error's page
            return bytes(response.read())

    jobs = [job["submission_id"] for job in json.loads(ask("/api/jobs/")) if job["submission_id"]]
    nodes = json.loads(ask("/api/v0/nodes"))["data"]["result"]["result"]
    assert jobs, "nothing ran here: nothing can be found"
    assert nodes
    for pattern in DASHBOARD:
        filled = {pattern.format(job=job, node=node["node_id"]) for job in jobs for node in nodes}
        for path in sorted(filled):
            yield from (f"{name}: {path}" for name in held(secrets, ask(path)))
    pages = {target: metrics_of(target) for target in json.loads(ask("/api/prometheus/sd"))[0]["targets"]}
    assert any(b"ray_" in page for page in pages.values())
    for target, page in pages.items():
        yield from (f"{name}: metrics of {target}" for name in held(secrets, page))


def metrics_of(target: str) -> bytes:
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=60) as response:
        return bytes(response.read())


def held(secrets: dict[str, str], data: bytes) -> Iterator[str]:
    """The names of those that stand in `data`, as they are or in base64."""
    for name, secret in secrets.items():
        if any(form in data for form in _forms(secret.encode())):
            yield name


def _forms(secret: bytes) -> Iterator[bytes]:
    yield secret
    for shift in range(3):  # where it begins inside a longer text that was encoded
        whole = base64.b64encode(b"\0" * shift + secret)
        yield whole[4 if shift else 0 : -4]
