"""A Ray head on this machine as a process of its own: its own token, temp dir and ports, ended by its pid.

Nothing here touches another cluster of the machine (`ray stop` would end them all).
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from alpaca_ray.cluster.job_table import look_after_jobs
from alpaca_ray.config import UserError
from alpaca_ray.doctor import is_free

START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 30
GCS_STATE = "gcs"  # in the cluster's directory
DRAIN_TIMEOUT_S = 3  # Ray would wait 30 s for the work to move to another node; there is none


@dataclass(frozen=True)
class LocalCluster:
    """A running head. `directory` holds its record, token and log; `temp_dir` is Ray's, with a short path."""

    directory: str
    temp_dir: str
    pid: int
    process_started_s: float  # with the pid, names one process for good
    dashboard_port: int
    serve_port: int
    gcs_port: int = 0  # 0: recorded before there was this field

    @property
    def dashboard(self) -> str:
        """Address for `ray job submit` and `serve deploy`."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def serve_url(self) -> str:
        """Base URL of what Ray Serve hosts."""
        return f"http://127.0.0.1:{self.serve_port}"

    def environment(self) -> dict[str, str]:
        """This process's environment, with what Ray's command line needs to reach the cluster."""
        return _environment(Path(self.directory)) | {"RAY_API_SERVER_ADDRESS": self.dashboard}


def start(  # noqa: PLR0913 - what differs between the demo's head, the twin's and the tests'
    directory: Path,
    num_cpus: int,
    extra_environment: dict[str, str],
    timeout_s: float = START_TIMEOUT_S,
    further_options: Callable[[int], Sequence[str]] = lambda _: (),
    *,
    is_durable: bool = False,
) -> LocalCluster:
    """Start a head and wait until it answers. `extra_environment` is seen by all its jobs and actors.

    `further_options`: of `ray start`, by the port that the GCS will have. A durable head keeps its state in
    `directory`. If it dies, the next start is the same head again, at the same address: it knows its jobs, and Serve's
    applications go on. `stop` is for good.

    Raises UserError with the end of its log if it does not come up.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_token(directory / "token")
    dead = recorded(directory) if is_durable else None
    if dead is None:
        shutil.rmtree(directory / GCS_STATE, ignore_errors=True)  # of a head whose address nobody knows any more
    # Unix sockets lie below it, and their paths may have 107 characters at most: not inside `directory`.
    temp_dir = tempfile.mkdtemp(prefix="alpaca-ray-") if dead is None else dead.temp_dir
    gcs_port, dashboard_port, agent_port, client_port = free_ports(4)
    if dead is not None:
        gcs_port, dashboard_port = dead.gcs_port, dead.dashboard_port
    if is_durable:
        extra_environment = extra_environment | durable_environment(directory / GCS_STATE)
    command = [
        _script("ray"), "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}",
        f"--temp-dir={temp_dir}", f"--port={gcs_port}", f"--ray-client-server-port={client_port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={agent_port}", *further_options(gcs_port),
    ]  # fmt: skip
    with (directory / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=_environment(directory) | extra_environment, stdout=log, stderr=log, start_new_session=True
        )
    started_s = psutil.Process(process.pid).create_time()
    serve_port = dead.serve_port if dead is not None else 8000 if is_free(8000) else free_ports(1)[0]
    cluster = LocalCluster(str(directory), temp_dir, process.pid, started_s, dashboard_port, serve_port, gcs_port)
    (directory / "cluster.json").write_text(json.dumps(asdict(cluster)))
    _wait_until_up(cluster, process, timeout_s)
    if dead is not None:
        look_after_jobs(agent_port, _authorization(cluster), timeout_s)
    return cluster


def durable_environment(directory: Path) -> dict[str, str]:
    """What a head needs to keep its state in a directory, by the database that is part of Ray's GCS."""
    return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(directory)}


def recorded(directory: Path) -> LocalCluster | None:
    """The cluster that was started with this directory and not stopped since; its head may have died."""
    try:
        return LocalCluster(**json.loads((directory / "cluster.json").read_text()))
    except FileNotFoundError:
        return None


def running(directory: Path) -> LocalCluster | None:
    """The cluster that was started with this directory, if its head still runs."""
    cluster = recorded(directory)
    return cluster if cluster and _head(cluster) else None


def processes(cluster: LocalCluster) -> list[psutil.Process]:
    """The head, all it has started, and what dead parents have left of it."""
    head = _head(cluster)
    roots = [head] if head else []
    roots += [each for each in psutil.process_iter(["cmdline"]) if _is_of(cluster, each)]
    return list(dict.fromkeys(each for root in roots for each in _with_children(root)))


def stop(cluster: LocalCluster) -> None:
    """End the head and all that was started for it, and remove Ray's temp dir and the head's state."""
    end(cluster)
    shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    shutil.rmtree(Path(cluster.directory) / GCS_STATE, ignore_errors=True)
    (Path(cluster.directory) / "cluster.json").unlink(missing_ok=True)


def end(cluster: LocalCluster) -> None:
    """End the head and all that was started for it. What a durable one needs to start again stays.

    Fake nodes are children of the autoscaler: they outlive it, and look for their head for a minute.
    """
    family = processes(cluster)
    head = _head(cluster)
    if head:
        head.terminate()
        psutil.wait_procs([head], timeout=STOP_TIMEOUT_S)
    # Once more: the autoscaler may have started a node meanwhile.
    family = list(dict.fromkeys([*family, *processes(cluster)]))
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def submit(cluster: LocalCluster, name: str, entrypoint: Sequence[str], working_dir: Path) -> None:
    """`ray job submit`, its log on this terminal; returns when the job succeeded. Raises UserError if it did not."""
    submission_id = f"{name}-{secrets.token_hex(4)}"
    command = [
        _script("ray"), "job", "submit", "--address", cluster.dashboard, "--submission-id", submission_id,
        "--log-style", "record", "--log-color", "false", "--working-dir", str(working_dir), "--", *entrypoint,
    ]  # fmt: skip
    try:
        subprocess.run(command, env=cluster.environment(), check=False)
    except KeyboardInterrupt:  # else the job would go on, and a second one beside it
        stop_job = [_script("ray"), "job", "stop", "--address", cluster.dashboard, submission_id]
        subprocess.run(stop_job, env=cluster.environment(), check=False, capture_output=True)
        raise
    # The exit code does not tell: it is 0 for a job that was stopped.
    status = ask_dashboard(cluster, f"/api/jobs/{submission_id}")["status"]
    if status != "SUCCEEDED":
        raise UserError(f"job {submission_id} ended as {status}: its log is above, and in {cluster.temp_dir}")


def deploy(cluster: LocalCluster, config_file: Path, timeout_s: float) -> None:
    """`serve deploy`, then wait until just the applications of the file run.

    Raises UserError with Serve's message if one cannot run, or after `timeout_s`.
    """
    command = [_script("serve"), "deploy", "--address", cluster.dashboard, str(config_file)]
    done = subprocess.run(command, env=cluster.environment(), check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"`serve deploy {config_file}` failed:\n{done.stderr[-2000:]}")
    wanted = {application["name"] for application in yaml.safe_load(config_file.read_text())["applications"]}
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        applications = ask_dashboard(cluster, "/api/serve/applications/")["applications"]
        states = {name: application["status"] for name, application in applications.items()}
        for name in sorted(states.keys() & wanted):
            if states[name] in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise UserError(f"application {name} is {states[name]}: {_reason(applications[name])}")
        if states == dict.fromkeys(wanted, "RUNNING"):
            return
        time.sleep(0.5)
    raise UserError(f"the applications do not run after {timeout_s:.0f} s: {states}; logs in {cluster.temp_dir}")


def _reason(application: dict[str, Any]) -> str:
    """What Serve says of it; of a replica that raised, that stands with the deployment alone."""
    said = [application["message"], *(one["message"] for one in application["deployments"].values())]
    return "\n".join(message[-2000:] for message in said if message)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def ask_dashboard(cluster: LocalCluster, path: str) -> Any:
    """What the dashboard answers to a GET, with the cluster's token. Raises OSError where it does not answer."""
    request = urllib.request.Request(cluster.dashboard + path, headers=_authorization(cluster))
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def _authorization(cluster: LocalCluster) -> dict[str, str]:
    return {"Authorization": f"Bearer {(Path(cluster.directory) / 'token').read_text()}"}


def _environment(directory: Path) -> dict[str, str]:
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_TIMEOUT_S),
        # Serve's proxies drop the headers by which any client could steer them.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "alpaca_ray.serve.request_headers:proxy_middlewares",
        # A proxy that a busy laptop has not ready in 5 s would be killed and begun again, without end.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
        # Entrypoints say `python`: the one of this environment.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | ours


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _write_token(path: Path) -> None:
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))


def _is_of(cluster: LocalCluster, process: psutil.Process) -> bool:
    """By Ray's temp dir: an option of its daemons, and where its agents and workers, which have no options, log."""
    command = process.info["cmdline"] or [""]
    if not command[0].startswith("ray::"):
        return any(part.startswith("--") and cluster.temp_dir in part for part in command)
    try:
        return any(file.path.startswith(cluster.temp_dir) for file in process.open_files())
    except psutil.Error:  # gone, or another user's
        return False


def _with_children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _head(cluster: LocalCluster) -> psutil.Process | None:
    try:
        process = psutil.Process(cluster.pid)
    except psutil.NoSuchProcess:
        return None
    return process if process.create_time() == cluster.process_started_s else None


def _wait_until_up(cluster: LocalCluster, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(OSError):
            ask_dashboard(cluster, "/api/serve/applications/")
            return
        time.sleep(0.5)
    log = (Path(cluster.directory) / "head.log").read_text(errors="replace")[-2000:]
    (end if (Path(cluster.directory) / GCS_STATE).exists() else stop)(cluster)
    raise UserError(f"the Ray head did not come up. The end of its log:\n{log}")
