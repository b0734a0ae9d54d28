"""The spot watcher: waits for the cloud's notice that this machine is to be taken away, and drains its Ray node.

    python -m alpaca_ray.cluster.preemption --cloud auto

Nothing in Ray reads these notices. After a drain Ray Train writes a checkpoint before the deadline, and Serve moves its
replicas. cluster.yaml starts it on each worker node. One line of JSON for each change of state goes to standard output.
"""

import argparse
import datetime
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from alpaca_ray.cluster.notices import CLOUDS, Notice, fetch_by_http, find_cloud
from alpaca_ray.config import UserError

# Google and Azure give 30 s, so no pause is long; a metadata server takes hundreds of requests a second.
POLL_EVERY_S = 1.0
LONGEST_PAUSE_S = 4.0  # while the metadata server fails: a notice may stand there when it is back
DRAIN_EVERY_S = 0.5
FIND_TRIES = 10  # about half a minute: the network of a machine that boots is there by then
TAKE_OVER_EVERY_S = 0.1

DRAINED, WRONG_USE, NO_CLOUD, NOT_DRAINED = 0, 2, 3, 4  # exit codes; 1 is Python's, for an error of ours

Say = Callable[..., None]  # (event, **what it is about)


class NotDrainedError(Exception):
    """Ray did not take the drain; says why."""


class Node(Protocol):
    """The Ray node on this machine."""

    def find(self) -> str:
        """Its id. Raises NotDrainedError while it, or Ray's head, is not there, UserError if that cannot change."""
        ...

    def drain(self, notice: Notice) -> str:
        """Tell Ray that the node goes; its id. Raises like `find`, and NotDrainedError if Ray refuses."""
        ...


@dataclass(frozen=True)
class Watch:
    """Time and where the log lines go."""

    now_s: Callable[[], float]  # since 1970
    pause: Callable[[float], None]
    say: Say

    def until_notice(self, ask: Callable[[float], Notice | None], is_drained_on_advice: bool = False) -> Notice:
        """Ask until the machine is to go. A server that fails, or makes no sense, is asked again, ever more slowly."""
        failures, why = 0, ""
        advices: set[str] = set()
        while True:
            try:
                notice = ask(self.now_s())
            except (OSError, ValueError) as error:
                failures += 1
                if str(error) != why:
                    why = str(error)
                    self.say("metadata_fails", why=why)
                self.pause(min(POLL_EVERY_S * 2 ** (failures - 1), LONGEST_PAUSE_S))
                continue
            if failures:
                self.say("metadata_answers", failures=failures)
                failures, why = 0, ""
            if notice is not None and (not notice.is_advice or is_drained_on_advice):
                self.say("notice", what=notice.what, left_s=round(notice.deadline_s - self.now_s(), 1))
                return notice
            if notice is not None and notice.what not in advices:
                advices.add(notice.what)
                self.say("advice", what=notice.what, advices=len(advices))
            self.pause(POLL_EVERY_S)

    def drain(self, node: Node, notice: Notice) -> int:
        """Once, and until Ray has taken it: its head may be starting again. An exit code."""
        why = ""
        while True:
            try:
                node_id = node.drain(notice)
            except (NotDrainedError, UserError) as error:
                if str(error) != why:
                    why = str(error)
                    self.say("drain_fails", why=why)
            else:
                self.say("draining", node_id=node_id, left_s=round(notice.deadline_s - self.now_s(), 1))
                return DRAINED
            if self.now_s() >= notice.deadline_s:
                self.say("not_drained", why=why)
                return NOT_DRAINED
            self.pause(DRAIN_EVERY_S)

    def find(self, name: str, url: dict[str, str]) -> str | None:
        """The cloud's name; for `auto` the one that answers, None if none does."""
        if name != "auto":
            return name
        for _ in range(FIND_TRIES):
            if found := find_cloud(fetch_by_http, url):
                return found
            self.pause(POLL_EVERY_S)
        return None


class RayNode:
    """By Ray's own client, as `ray drain-node` has it: there is no public call. Nothing is kept between two tries."""

    def __init__(self, address: str | None, node_id: str | None) -> None:
        self._address, self._node_id = address, node_id

    def find(self) -> str:
        with _told():
            return self._find(self._client())

    def drain(self, notice: Notice) -> str:
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
        with _told():
            client = self._client()
            node_id = self._find(client)
            accepted, why = client.drain_node(
                node_id, reason, f"the cloud takes this machine back ({notice.what})", int(notice.deadline_s * 1000)
            )
        if not accepted:
            raise NotDrainedError(f"Ray does not drain node {node_id}: {why}")
        return node_id

    def _client(self) -> Any:
        from ray._private.services import canonicalize_bootstrap_address_or_die
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        return GcsClient(address=canonicalize_bootstrap_address_or_die(self._address or "auto"))

    def _find(self, client: Any) -> str:
        import ray.util
        from ray.core.generated import gcs_pb2

        here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        is_alive = gcs_pb2.GcsNodeInfo.ALIVE  # type: ignore[attr-defined]
        alive = {i.hex(): node for i, node in client.get_all_node_info().items() if node.state == is_alive}
        if self._node_id:
            ids = [i for i in alive if i == self._node_id]
        else:
            ids = [i for i, node in alive.items() if node.node_manager_address == here]
        if len(ids) > 1:
            raise UserError(f"{len(ids)} Ray nodes run on {here}: name one by --node-id")
        if not ids:
            raise NotDrainedError(f"no Ray node {self._node_id or f'on {here}'} is alive")
        return str(ids[0])


@contextmanager
def _told() -> Iterator[None]:
    """What Ray's client raises, as NotDrainedError."""
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, RuntimeError, OSError) as error:
        raise NotDrainedError(str(error).partition("\n")[0] or type(error).__name__) from None


class PrintedNode:
    """In place of RayNode for --dry-run."""

    def find(self) -> str:
        return "none: a dry run"

    def drain(self, notice: Notice) -> str:
        return self.find()


def take_over(path: Path, pause: Callable[[float], None]) -> IO[str]:
    """Hold the lock file, by the result, until this process ends; a watcher that holds it now is ended."""
    held = path.open("a+", encoding="utf-8")
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            held.seek(0)
            with suppress(ValueError, ProcessLookupError):  # it has not written its id yet, or is gone
                os.kill(int(held.read()), signal.SIGTERM)
            pause(TAKE_OVER_EVERY_S)
    held.truncate(0)
    held.write(str(os.getpid()))
    held.flush()
    return held


def say_by_json(event: str, **about: object) -> None:
    """One line to standard output."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "event": event, **about}), flush=True)


def run(options: argparse.Namespace, watch: Watch, node: Node) -> int:
    """From the start to an exit code. Raises UserError for what no waiting mends."""
    url = {"url": options.metadata_url} if options.metadata_url else {}
    cloud = watch.find(options.cloud, url)
    if cloud is None:
        watch.say("no_cloud", why=f"no metadata server of {', '.join(CLOUDS)} answers: nothing to watch here")
        return NO_CLOUD
    try:
        node_id = node.find()  # now, so that a wrong address or token shows while there is time to mend it
    except NotDrainedError as error:
        watch.say("no_node_yet", why=str(error))
        node_id = None
    watch.say("watching", cloud=cloud, node_id=node_id)
    return watch.drain(node, watch.until_notice(CLOUDS[cloud](fetch_by_http, **url).ask, options.drain_on_advice))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Drain this machine's Ray node when its cloud takes it back.",
        epilog="exit codes: 0 drained, 2 wrong use, 3 no cloud's metadata server answers, 4 Ray took no drain in time",
    )
    parser.add_argument("--cloud", choices=("auto", *CLOUDS), default="auto", help="(default: %(default)s)")
    parser.add_argument("--drain-on-advice", action="store_true", help="drain when the cloud says that it may take it")
    parser.add_argument("--metadata-url", help="of the metadata server; None: the cloud's own")
    parser.add_argument("--address", help="of Ray's head, HOST:PORT; None: that of the node on this machine")
    parser.add_argument("--node-id", help="None: the node on this machine")
    parser.add_argument("--lock", type=Path, help="a file; a watcher that was started with it before is ended")
    parser.add_argument("--dry-run", action="store_true", help="say what there is, and drain nothing")
    options = parser.parse_args()
    # Ray's client ends its process when the head is away for longer than this. Ours waits until the deadline.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "86400")
    try:
        lock = take_over(options.lock, time.sleep) if options.lock else None
        node = PrintedNode() if options.dry_run else RayNode(options.address, options.node_id)
        code = run(options, Watch(time.time, time.sleep, say_by_json), node)
        if lock is not None:
            lock.close()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
