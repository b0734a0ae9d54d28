"""What clients of a served model notice when its engine replicas are killed, exchanged, added and taken away.

python benchmarks/serve_kills.py [--quick] [--parts kills update scale keyless] [--seed 0]

kills    20 streams on two engine replicas, of which one is killed: 5 times; held against streams nobody disturbed
update   the model is exchanged for another one under load (a rolling update of everything)
scale    none -> 1 -> 3 -> 1 -> none engine replicas by load, with a request that waits while there is none
keyless  a replica without the watermark's key does not start, and the application says why

On real Ray Serve over HTTP, with a tiny random model in float32. The last line is one JSON object.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import random
import secrets
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil

from alpaca_ray.config import AdmissionConfig, AutoscalingConfig, Placement, ServeArgs, WatermarkConfig
from alpaca_ray.serve.keys import make_key
from tests.crowd import samples
from tests.patience import PATIENT, start_serve
from tests.tiny import READABLE, write_tiny_model

CONTEXT = 200_000  # tokens: more than is decoded here
WATERMARK_KEY = 3_141_592_653_589_793_238
DEADLINE_S = 300.0
POLL_S = 0.05
STALLED = 5.0  # gaps between events above so many of the stream's median are the kill's
# The autoscaler hears of requests so often; Ray's own 10 s would be most of what is waited for here.
PUSH_INTERVAL_S = "1"
SCALE = AutoscalingConfig(
    min_replicas=0, max_replicas=3, target_ongoing_requests=2, upscale_delay_s=1, downscale_delay_s=3,
    downscale_to_zero_delay_s=6, look_back_period_s=3,
)  # fmt: skip


@dataclass
class Heard:
    """A stream as its client had it: the text, when each event came, and how it ended."""

    text: str = ""
    at_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class Service:
    """One application on a Ray cluster of this process's own, and its client."""

    def __init__(self, directory: Path) -> None:
        self.name = f"kills-{os.getpid()}"  # names the replicas' processes, on a machine where others may serve too
        self._directory = directory
        self._deployed: ServeArgs | None = None
        key = make_key("kills", ["generate", "detect"])
        for name, text in (("keys.jsonl", key.line + "\n"), ("watermark_key", str(WATERMARK_KEY))):
            (directory / name).touch(mode=0o600)
            (directory / name).write_text(text)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(api_key=key.secret, base_url=f"{self.url}/v1", max_retries=0, timeout=DEADLINE_S)

    def args(self, weights: int = 0, **overrides: Any) -> ServeArgs:
        """Of the application, with the model of that seed."""
        model = self._directory / f"weights{weights}"
        if not model.exists():
            write_tiny_model(model, seed=weights, alphabet=READABLE, max_length=CONTEXT, ends=False)
        given = {
            "model": str(model),
            "model_name": "patient",  # clients' name for it stays where the path changes
            "prompt_format": "plain",
            "dtype": "float32",
            "max_length": CONTEXT,
            "watermark": WatermarkConfig(key_file=str(self._directory / "watermark_key")),
            "admission": AdmissionConfig(key_file=str(self._directory / "keys.jsonl")),
            "placement": Placement(num_cpus=1),
        }
        return ServeArgs.model_validate(given | overrides)

    def deploy(self, args: ServeArgs) -> None:
        """Roll the application over to these args, if it has others; back when all new replicas run."""
        from ray import serve

        from alpaca_ray.serve.app import build

        if args != self._deployed:
            serve.run(build(args), name=self.name, route_prefix="/")
        self._deployed = args

    def delete(self) -> None:
        """Take the application away, if there is one; back when its replicas are gone."""
        from ray import serve

        serve.delete(self.name)
        self._deployed = None

    def num_running(self) -> int:
        """Engine replicas, as Serve counts them."""
        from ray import serve

        states = serve.status().applications[self.name].deployments["EngineReplica"].replica_states
        return sum(number for state, number in states.items() if state == "RUNNING")

    def engines(self) -> list[psutil.Process]:
        """The processes of the engine replicas, those that start or end too."""
        title = f"ray::ServeReplica:{self.name}:EngineReplica"
        return [p for p in psutil.process_iter(["cmdline"]) if any(title in part for part in p.info["cmdline"] or [])]

    def resumes(self) -> int:
        """How many streams went on at another engine replica, by the service's metric; waits for a first one."""
        import ray

        (node,) = ray.nodes()  # type: ignore[no-untyped-call]  # Ray's
        page_at = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        counts: list[float] = []

        def counted() -> float:
            with urllib.request.urlopen(page_at, timeout=30) as response:
                counts[:] = samples(response.read().decode(), "resumes_total")
            return sum(counts)

        wait(counted, "a resumed stream in the metrics")
        return int(sum(counts))

    def ready(self) -> dict[str, Any]:
        """The body of /ready. Raises openai.APIStatusError if it is not 200."""
        body: dict[str, Any] = self.client.get("/../ready", cast_to=dict[str, Any])
        return body

    def verdict(self, text: str) -> str:
        """The watermark detector's."""
        body: Any = self.client.post("/watermark/detect", body={"text": text}, cast_to=dict[str, Any])
        return str(body["verdict"])

    def ask(self, number: int, max_tokens: int) -> str:
        """The whole answer to request `number`; even numbers are greedy, odd ones sampled with a seed."""
        answer: Any = self.client.completions.create(**asked(number, max_tokens))
        return str(answer.choices[0].text)

    def listen(self, number: int, max_tokens: int, heard: Heard, goes_on: Callable[[], bool] = lambda: True) -> Heard:
        """Stream the answer into `heard`, to its end or as long as it `goes_on`."""
        with self.client.completions.create(**asked(number, max_tokens), stream=True) as events:
            for event in events:
                heard.text += event.choices[0].text
                heard.at_s.append(time.monotonic())
                heard.finish_reason = event.choices[0].finish_reason
                if not goes_on():
                    break
        return heard


def asked(number: int, max_tokens: int) -> dict[str, Any]:
    """What of the OpenAI API request `number` uses."""
    sampling = {"temperature": 0} if number % 2 == 0 else {"temperature": 1.0, "seed": number}
    return {"model": "patient", "prompt": f"Hello {number}", "max_tokens": max_tokens, **sampling}


@contextlib.contextmanager
def service() -> Iterator[Service]:
    """Ray and Serve, without an application yet."""
    directory = Path(tempfile.mkdtemp(prefix="ark", dir="/tmp"))  # short: Unix sockets lie below it
    (directory / "token").write_text(secrets.token_hex(16))
    (directory / "token").chmod(0o600)
    os.environ |= PATIENT | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(directory / "token")}
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_metrics_report_interval_ms": "1000"}
    for what in ("HANDLE", "REPLICA"):
        os.environ[f"RAY_SERVE_{what}_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = PUSH_INTERVAL_S
    import ray
    from ray import serve  # which reads the environment as it is imported

    try:
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=str(directory / "r"))
        found = Service(directory)
        start_serve(found.port)
        yield found
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def wait(holds: Callable[[], object], what: str) -> float:
    """Until something is so; how long that took, in seconds. Raises RuntimeError where it never is."""
    started_s = time.monotonic()
    while not holds():
        if time.monotonic() > started_s + DEADLINE_S:
            raise RuntimeError(f"never seen: {what}")
        time.sleep(POLL_S)
    return time.monotonic() - started_s


@dataclass(frozen=True)
class KillOutcome:
    """Of all rounds together."""

    kills: int
    streams: int
    complete: int
    greedy: int
    same_greedy: int
    seeded: int
    same_seeded: int
    to_next_event_s: list[float]  # of the streams that a kill stalled for longer than they wait for any event
    to_next_replica_s: list[float]
    resumes: int
    verdicts: list[str]


def kill_engines(here: Service, kills: int, num_streams: int, max_tokens: int, seed: int) -> KillOutcome:
    """Rounds of the same streams, an engine replica killed at a random point of each."""
    here.deploy(here.args(num_replicas=2))
    rng, numbers = random.Random(seed), range(num_streams)
    whole = [heard.text for heard in streams(here, numbers, max_tokens)]
    rounds, times = [], list[tuple[float, float]]()
    for number in range(kills):
        # Early: the engines are ahead of what clients have heard, by sentences that moderation holds and by what waits
        # for a busy ingress; one that has given all its tokens leaves nothing to resume.
        point = rng.uniform(0.05, 0.3) * sum(map(len, whole))
        rounds.append(streams(here, numbers, max_tokens, partial(kill, here, rng, point, times)))
        say(f"killed: {number + 1}, next replica after {times[-1][1]:.1f} s")
    stalls = [stall_s(h, killed_s) for heard, (killed_s, _) in zip(rounds, times, strict=True) for h in heard]
    same = [[h.text == text for h, text in zip(heard, whole, strict=True)] for heard in rounds]
    return KillOutcome(
        kills=len(rounds),
        streams=len(rounds) * num_streams,
        complete=sum(h.finish_reason == "length" for heard in rounds for h in heard),
        greedy=sum(len(row[0::2]) for row in same),
        same_greedy=sum(sum(row[0::2]) for row in same),
        seeded=sum(len(row[1::2]) for row in same),
        same_seeded=sum(sum(row[1::2]) for row in same),
        to_next_event_s=[s for s in stalls if s is not None],
        to_next_replica_s=[back_s for _, back_s in times],
        resumes=here.resumes(),
        # Greedy texts of this model go round in circles, and the detector counts a pair of tokens once.
        verdicts=[here.verdict(h.text) for h in rounds[-1][1:4:2]],
    )


def kill(
    here: Service, rng: random.Random, point: float, times: list[tuple[float, float]], heard: Sequence[Heard]
) -> None:
    """End one of two engines after so many characters. `times`: when that was, and seconds until there were two."""
    wait(lambda: sum(len(h.text) for h in heard) > point, "so much text")
    before = here.engines()
    killed_s = time.monotonic()
    rng.choice(before).kill()
    wait(lambda: {p.pid for p in here.engines()} - {p.pid for p in before}, "a new replica")
    wait(lambda: here.num_running() == 2, "two replicas")
    times.append((killed_s, time.monotonic() - killed_s))


def streams(
    here: Service, numbers: Sequence[int], max_tokens: int, meanwhile: Callable[[Sequence[Heard]], None] | None = None
) -> list[Heard]:
    """All at once, to their ends. Raises what a client's call raised."""
    heard = [Heard() for _ in numbers]
    with ThreadPoolExecutor(len(numbers)) as clients:
        futures = [clients.submit(here.listen, n, max_tokens, h) for n, h in zip(numbers, heard, strict=True)]
        if meanwhile is not None:
            meanwhile(heard)
        return [future.result() for future in futures]


def stall_s(heard: Heard, killed_s: float) -> float | None:
    """Seconds from the kill to the end of the longest gap around it; None where the gap is like all others."""
    gaps = list(itertools.pairwise(heard.at_s))
    if len(gaps) < 3:
        return None
    begin_s, end_s = max((g for g in gaps if g[1] > killed_s), key=lambda g: g[1] - g[0], default=(0.0, 0.0))
    usual_s = statistics.median(end - begin for begin, end in gaps)
    return end_s - killed_s if end_s - begin_s > STALLED * usual_s else None


@dataclass(frozen=True)
class UpdateOutcome:
    """What clients had while everything was exchanged under them."""

    answers: int
    failures: list[str]  # anything but a 2xx and a whole answer
    mixed: int  # answers that neither the old nor the new model gives
    from_old: int
    from_new: int
    update_s: float
    outlived: bool  # a stream that began before went on after it, on the old weights
    drained_s: float  # from that stream's end to the old replica's
    verdicts: list[str]


def update(here: Service, max_tokens: int, longer_s: float) -> UpdateOutcome:
    """Exchange the model while four clients ask and one listens to an endless stream, for `longer_s` more."""
    here.deploy(here.args(num_replicas=2))
    old = [here.ask(number, max_tokens) for number in range(4)]
    old_pids = {process.pid for process in here.engines()}
    is_over, may_end = threading.Event(), threading.Event()
    endless, failures = Heard(), list[str]()
    with ThreadPoolExecutor(7) as clients:
        listening = clients.submit(here.listen, 0, CONTEXT - 100, endless, lambda: not may_end.is_set())
        wait(lambda: endless.text, "the endless stream")
        asking = [clients.submit(ask_on, here, n, max_tokens, is_over, failures) for n in range(4)]
        probing = clients.submit(probe_on, here, is_over, failures)
        started_s = time.monotonic()
        # It is not done before the old replicas are gone, which is when their last stream ends.
        deploying = clients.submit(here.deploy, here.args(1))
        wait(lambda: here.ask(1, max_tokens) != old[1], "an answer of the new model")
        update_s, length = time.monotonic() - started_s, len(endless.text)
        say(f"updated in {update_s:.1f} s")
        is_over.set()
        answers = [future.result() for future in asking]
        probing.result()
        went_on_s = wait(lambda: endless.at_s[-1] > started_s + update_s + longer_s or listening.done(), "more of it")
        say(f"the endless stream went on for {went_on_s:.1f} s more")
        outlived = len(endless.text) > length and not listening.done() and endless.text.startswith(old[0])
        may_end.set()
        listening.result(DEADLINE_S)  # a stream that was cut raises here
        deploying.result(DEADLINE_S)
        drained_s = wait(lambda: not old_pids & {p.pid for p in here.engines()}, "the old replica's end")
    new = [here.ask(number, max_tokens) for number in range(4)]
    # To some prompts both may say the same: the tiny models repeat a token for ever where it is green behind itself.
    given = [(text, old[n], new[n]) for n, texts in enumerate(answers) for text in texts]
    from_old = sum(text == old != new for text, old, new in given)
    from_new = sum(text == new != old for text, old, new in given)
    return UpdateOutcome(
        answers=len(given),
        failures=failures,
        mixed=sum(text not in (old, new) for text, old, new in given),
        from_old=from_old,
        from_new=from_new,
        update_s=update_s,
        outlived=outlived,
        drained_s=drained_s,
        verdicts=[here.verdict(text) for text in (old[1], new[1])],
    )


def ask_on(here: Service, number: int, max_tokens: int, is_over: threading.Event, failures: list[str]) -> list[str]:
    """The same request again and again, streamed and whole in turn."""
    answers = list[str]()
    while not is_over.is_set():
        try:
            if len(answers) % 2:
                answers.append(here.ask(number, max_tokens))
            else:
                heard = here.listen(number, max_tokens, Heard())
                answers.append(heard.text)
                if heard.finish_reason != "length":
                    failures.append(f"a stream ended with {heard.finish_reason}")
        except openai.OpenAIError as error:
            failures.append(repr(error))
    return answers


def probe_on(here: Service, is_over: threading.Event, failures: list[str]) -> None:
    """/ready, ten times a second at most."""
    while not is_over.is_set():
        try:
            here.ready()
        except openai.OpenAIError as error:
            failures.append(f"/ready: {error!r}")
        time.sleep(2 * POLL_S)


@dataclass(frozen=True)
class ScaleOutcome:
    """In the order of what was seen."""

    at_first: int  # replicas right after the deployment
    woken_s: float  # from a request while there is no replica to its answer
    up_s: float  # from the load to three replicas
    counts: list[int]  # of replicas, each change
    to_none_s: float  # from the end of the load
    asleep: list[str]  # what /ready said while there was none
    still_none: bool  # probes woke nobody
    detected: str  # by a request that waited for a replica
    complete: int
    streams: int


def scale(here: Service, max_tokens: int) -> ScaleOutcome:
    """From none to three and back, by streams that go on until there are three."""
    here.delete()  # an update goes on from the replicas that there are
    here.deploy(here.args(autoscaling=SCALE, max_batch_size=4))
    at_first, counts, is_up, is_over = here.num_running(), list[int](), threading.Event(), threading.Event()
    with ThreadPoolExecutor(8) as clients:
        watching = clients.submit(watch_counts, here, counts, is_over)
        started_s = time.monotonic()
        text = here.ask(1, max_tokens)
        woken_s = time.monotonic() - started_s
        say(f"woken in {woken_s:.1f} s")
        started_s = time.monotonic()
        asking = [clients.submit(listen_until, here, n, max_tokens, is_up) for n in range(6)]
        wait(lambda: here.num_running() == 3 or any(f.done() for f in asking), "three replicas")
        up_s = time.monotonic() - started_s
        is_up.set()
        reasons = [reason for future in asking for reason in future.result()]
        say(f"three in {up_s:.1f} s")
        to_none_s = wait(lambda: here.num_running() == 0, "no replica")
        say(f"none in {to_none_s:.1f} s")
        asleep = [here.ready()["status"] for _ in range(20)]
        still_none = here.num_running() == 0
        detected = here.verdict(text)
        wait(lambda: counts[-1] == 1, "the replica that it woke in Serve's own count")  # which comes after the answer
        is_over.set()
        watching.result()
    return ScaleOutcome(
        at_first=at_first,
        woken_s=woken_s,
        up_s=up_s,
        counts=counts,
        to_none_s=to_none_s,
        asleep=sorted(set(asleep)),
        still_none=still_none,
        detected=detected,
        complete=reasons.count("length"),
        streams=len(reasons),
    )


def watch_counts(here: Service, counts: list[int], is_over: threading.Event) -> None:
    while not is_over.is_set():
        now = here.num_running()
        if not counts or counts[-1] != now:
            counts.append(now)
        time.sleep(POLL_S)


def listen_until(here: Service, number: int, max_tokens: int, is_enough: threading.Event) -> list[str | None]:
    """One stream after another; how each ended."""
    reasons = []
    while not is_enough.is_set():
        reasons.append(here.listen(number, max_tokens, Heard()).finish_reason)
    return reasons


def start_keyless(here: Service) -> str:
    """What Serve's status says of an application whose replicas find no watermark key."""
    from ray import serve

    from alpaca_ray.serve.app import build

    args = here.args(watermark=WatermarkConfig(key_env="ALPACA_RAY_NO_SUCH_KEY"))
    with contextlib.suppress(RuntimeError):
        serve.run(build(args), name="keyless", route_prefix="/keyless")
    status = serve.status().applications["keyless"]
    said = [str(status.status.value), status.message, *(d.message for d in status.deployments.values())]
    serve.delete("keyless")
    return "\n".join(said)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def row(name: str, ours: Any, unit: str, goal: str, holds: bool, **more: Any) -> dict[str, Any]:
    return {"name": name, "ours": ours, "unit": unit, "goal": goal, "holds": holds, **more}


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 2) for p in (50, 95)}


def kill_rows(here: Service, quick: bool, seed: int) -> list[dict[str, Any]]:
    wanted, num_streams = (1, 8) if quick else (5, 20)
    found = kill_engines(here, wanted, num_streams, 1000, seed)
    spread, back = quantiles(found.to_next_event_s), statistics.median(found.to_next_replica_s)
    return [
        row("kills_of_engines", found.kills, "SIGKILLs", f"{wanted}", found.kills == wanted),
        row("streams_complete", found.complete, "streams", f"{found.streams}", found.complete == found.streams),
        row("greedy_streams_identical", found.same_greedy, "streams", f"{found.greedy}",
            found.same_greedy == found.greedy, share=found.same_greedy / found.greedy),
        row("seeded_streams_identical", found.same_seeded, "streams", f"{found.seeded}",
            found.same_seeded == found.seeded, share=found.same_seeded / found.seeded),
        row("kill_to_next_event_s", spread["p95"], "s", "<= 10", spread["p95"] <= 10, **spread,
            stalled_streams=len(found.to_next_event_s)),
        row("streams_resumed", found.resumes, "streams", f">= {wanted}", found.resumes >= wanted),
        row("kill_to_next_replica_s", round(back, 2), "s", "<= 60", back <= 60, each=found.to_next_replica_s),
        row("resumed_streams_marked", found.verdicts, "verdicts", "marked", set(found.verdicts) == {"marked"}),
    ]  # fmt: skip


def update_rows(here: Service, quick: bool, seed: int) -> list[dict[str, Any]]:
    found = update(here, 200, longer_s=1.0 if quick else 45.0)
    return [
        row("update_s", round(found.update_s, 1), "s", "<= 120", found.update_s <= 120),
        row("answers_during_update", found.answers, "answers", "> 0 of each model",
            min(found.from_old, found.from_new) > 0, from_old=found.from_old, from_new=found.from_new),
        row("failed_during_update", len(found.failures), "answers", "0", not found.failures, first=found.failures[:3]),
        row("mixed_of_two_models", found.mixed, "answers", "0", found.mixed == 0),
        row("old_stream_outlives_update", found.outlived, "bool", "true", found.outlived),
        row("last_stream_to_old_replica_gone_s", round(found.drained_s, 1), "s", "<= 30", found.drained_s <= 30),
        row("both_models_marked", found.verdicts, "verdicts", "marked", set(found.verdicts) == {"marked"}),
    ]  # fmt: skip


def scale_rows(here: Service, quick: bool, seed: int) -> list[dict[str, Any]]:
    found = scale(here, 200)
    middle = [count for count in found.counts if count != 2]
    return [
        row("replicas_at_first", found.at_first, "replicas", "0", found.at_first == 0),
        row("none_to_first_answer_s", round(found.woken_s, 1), "s", "<= 60", found.woken_s <= 60),
        row("load_to_three_s", round(found.up_s, 1), "s", "<= 120", found.up_s <= 120),
        row("idle_to_none_s", round(found.to_none_s, 1), "s", "<= 60", found.to_none_s <= 60),
        row("numbers_of_replicas", found.counts, "replicas", "0, 1, 3, 1, 0, 1", middle == [0, 1, 3, 1, 0, 1]),
        row("ready_while_asleep", found.asleep, "", "asleep, and wakes nobody",
            found.asleep == ["asleep"] and found.still_none),
        row("detect_waits_for_a_replica", found.detected, "verdict", "marked", found.detected == "marked"),
        row("streams_complete_over_scaling", found.complete, "streams", f"{found.streams}",
            found.complete == found.streams),
    ]  # fmt: skip


def keyless_rows(here: Service, quick: bool, seed: int) -> list[dict[str, Any]]:
    said = start_keyless(here)
    names_it = said.startswith("DEPLOY_FAILED") and "ALPACA_RAY_NO_SUCH_KEY is not set" in said
    return [row("keyless_replica_refused", names_it, "bool", "true", names_it, said=said[-600:])]


PARTS = {"kills": kill_rows, "update": update_rows, "scale": scale_rows, "keyless": keyless_rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kill under 8 streams, a shorter update")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=argparse.FileType("w"), default=sys.stdout, help="file of the JSON object")
    arguments = parser.parse_args()
    rows = []
    with service() as here:
        for name in arguments.parts:
            rows += PARTS[name](here, arguments.quick, arguments.seed)
            say(json.dumps(rows))
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch", "openai")}
    found = {"benchmark": "serve_kills", "machine": machine, "versions": versions, "rows": rows}
    print(json.dumps(found), file=arguments.out, flush=True)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
