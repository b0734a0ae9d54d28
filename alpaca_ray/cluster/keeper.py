"""Start the head's GCS again when it dies, so that the cluster goes on where it was.

    python -m alpaca_ray.cluster.keeper --port 6379

`ray start` starts the GCS and then looks after nothing. Raylets, drivers and Serve's replicas wait a minute for it, on
the workers of cluster.yaml ten, and it finds its tables on disk again (RAY_gcs_storage=rocksdb). The keeper ends when
the head's raylet is gone: after `ray stop`, which ends the GCS last. When it starts, it sees to it that jobs of an
earlier head are looked after. One line of JSON for each change of state.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from alpaca_ray.cluster.job_table import AGENT_PORT, look_after_jobs
from alpaca_ray.cluster.preemption import Say, say_by_json, take_over

POLL_EVERY_S = 0.2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0  # before a new try, while the GCS ends at once
STEADY_S = 30.0  # a GCS that has lived so long is well

AGENT_TIMEOUT_S = 120.0  # the agent is the last of a head's processes that answers

ENDED, NO_GCS = 0, 3  # exit codes


@dataclass(frozen=True)
class Kept:
    """How a GCS was started. The environment may hold secrets: it is never written."""

    pid: int
    command: list[str]
    environment: dict[str, str]


def find_gcs(port: int) -> Kept | None:
    """The GCS of this machine that listens there."""
    process = _find("gcs_server", f"--gcs_server_port={port}")
    try:
        return Kept(process.pid, process.cmdline(), process.environ()) if process else None
    except psutil.NoSuchProcess:
        return None


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def keep(port: int, pause: Callable[[float], None], now_s: Callable[[], float], say: Say) -> int:
    """Until the head has ended. An exit code."""
    kept = find_gcs(port)
    if kept is None:
        say("no_gcs", port=port)
        return NO_GCS
    say("keeping", pid=kept.pid, port=port)
    pid, began_s, pause_s = kept.pid, now_s(), FIRST_PAUSE_S
    while True:
        while is_alive(pid):
            pause(POLL_EVERY_S)
        if _find("raylet", f":{port}") is None:
            say("head_ended")
            return ENDED
        pause_s = FIRST_PAUSE_S if now_s() - began_s > STEADY_S else min(2 * pause_s, LONGEST_PAUSE_S)
        say("gcs_died", pid=pid, again_in_s=pause_s)
        pause(pause_s)
        # Its outputs go to the files that its command names.
        gcs = subprocess.Popen(
            kept.command, env=kept.environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        pid, began_s = gcs.pid, now_s()
        say("gcs_started", pid=pid)


def _authorization() -> dict[str, str]:
    """As the node's token has it; nothing where none is asked for."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    headers: dict[str, str] = get_auth_headers_if_auth_enabled({})
    return headers


def _find(name: str, argument: str) -> psutil.Process | None:
    """A process of Ray's with that name, one of whose arguments ends so."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == name and any(word.endswith(argument) for word in process.info["cmdline"] or []):
            return process
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Start the head's GCS again when it dies.",
        epilog="exit codes: 0 the head has ended, 3 there is no GCS at that port",
    )
    parser.add_argument("--port", type=int, default=6379, help="where the head listens (default: %(default)s)")
    parser.add_argument("--agent-port", type=int, default=AGENT_PORT, help="of the node's agent (default: %(default)s)")
    parser.add_argument("--lock", type=Path, help="a file; a keeper that was started with it before is ended")
    options = parser.parse_args()
    lock = take_over(options.lock, time.sleep) if options.lock else None
    if find_gcs(options.port) is not None:
        has_jobs = look_after_jobs(options.agent_port, _authorization(), AGENT_TIMEOUT_S)
        say_by_json("jobs_looked_after" if has_jobs else "no_agent", port=options.agent_port)
    code = keep(options.port, time.sleep, time.monotonic, say_by_json)
    if lock is not None:
        lock.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
