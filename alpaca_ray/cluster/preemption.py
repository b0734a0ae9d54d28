"""Watches for the cloud's notice that this spot machine is to be taken away, and drains its Ray node.

    python -m alpaca_ray.cluster.preemption --cloud aws

Run it on each spot node: nothing in Ray reads these notices. Training then writes a checkpoint before the deadline.
"""

import argparse
import datetime
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

import ray.util
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # as `ray drain-node`: there is no public call
from ray.core.generated import autoscaler_pb2, gcs_pb2

log = logging.getLogger("alpaca_ray")

POLL_EVERY_S = 5.0  # AWS asks for this pace; its notice is 120 s, Google's 30 s
GOOGLE_NOTICE_S = 30.0
TIMEOUT_S = 2.0  # a metadata server answers within milliseconds or is not there
AWS_URL = "http://169.254.169.254"
GOOGLE_URL = "http://metadata.google.internal"

# (method, URL, headers) -> (status, body). Raises OSError where nobody answers.
Fetch = Callable[[str, str, dict[str, str]], tuple[int, str]]


@dataclass(frozen=True)
class Notice:
    """The machine goes at `deadline_s`, in seconds since 1970."""

    deadline_s: float


def aws_notice(fetch: Fetch, now_s: float, url: str = AWS_URL) -> Notice | None:
    """IMDSv2: a token, then `spot/instance-action`, which is there from the notice on (404 before)."""
    _, token = fetch("PUT", f"{url}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    headers = {"X-aws-ec2-metadata-token": token}
    status, body = fetch("GET", f"{url}/latest/meta-data/spot/instance-action", headers)
    if status != 200:
        return None
    return Notice(datetime.datetime.fromisoformat(json.loads(body)["time"]).timestamp())


def google_notice(fetch: Fetch, now_s: float, url: str = GOOGLE_URL) -> Notice | None:
    """`preempted` turns to TRUE; the machine goes 30 s later."""
    status, body = fetch("GET", f"{url}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return Notice(now_s + GOOGLE_NOTICE_S) if status == 200 and body.strip() == "TRUE" else None


CLOUDS = {"aws": aws_notice, "gcp": google_notice}


def wait_for_notice(
    ask: Callable[[float], Notice | None], now_s: Callable[[], float], pause: Callable[[float], None]
) -> Notice:
    """Ask until there is one. An endpoint that does not answer, or not sensibly, is asked again."""
    while True:
        try:
            notice = ask(now_s())
        except (OSError, ValueError, KeyError) as error:
            log.warning("no answer about preemption: %s", error)
            notice = None
        if notice is not None:
            return notice
        pause(POLL_EVERY_S)


def fetch_by_http(method: str, url: str, headers: dict[str, str]) -> tuple[int, str]:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def drain(gcs: GcsClient, node_id: str, deadline_s: float) -> None:
    """Tell Ray that the node goes at `deadline_s`. Raises RuntimeError if Ray refuses."""
    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
    accepted, why = gcs.drain_node(node_id, reason, "the cloud takes this spot machine back", int(deadline_s * 1000))
    if not accepted:
        raise RuntimeError(f"Ray does not drain node {node_id}: {why}")


def node_here(gcs: GcsClient) -> str:
    """The id of the live node with this machine's address. Raises RuntimeError if there is none, or several."""
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    alive = gcs_pb2.GcsNodeInfo.ALIVE  # type: ignore[attr-defined]
    nodes = gcs.get_all_node_info().items()
    ids = [i.hex() for i, node in nodes if node.node_manager_address == here and node.state == alive]
    if len(ids) != 1:
        raise RuntimeError(f"{len(ids)} Ray nodes run on {here}: name one by --node-id")
    return str(ids[0])


def main() -> None:
    parser = argparse.ArgumentParser(description="Drain this machine's Ray node when its cloud takes it back.")
    parser.add_argument("--cloud", choices=CLOUDS, required=True)
    parser.add_argument("--metadata-url", help="of the metadata server; None: the cloud's own")
    parser.add_argument("--address", help="of Ray's head, HOST:PORT; None: that of the node on this machine")
    parser.add_argument("--node-id", help="None: the node on this machine")
    options = parser.parse_args()
    url = {"url": options.metadata_url} if options.metadata_url else {}
    gcs = GcsClient(address=canonicalize_bootstrap_address_or_die(options.address))
    node_id = options.node_id or node_here(gcs)
    notice = wait_for_notice(lambda now_s: CLOUDS[options.cloud](fetch_by_http, now_s, **url), time.time, time.sleep)
    drain(gcs, node_id, notice.deadline_s)
    print(f"draining node {node_id}: it goes in {notice.deadline_s - time.time():.0f} s")


if __name__ == "__main__":
    main()
