"""Every query of the dashboards against a real Prometheus, while the demo runs.

python -m tests.live_dashboards --prometheus /usr/bin/prometheus [--directory .demo]

Starts the demo and Prometheus with the configuration that ships, and asks every panel's query again and again until it
has returned data. All requests are the demo's own; the cluster that it leaves is looked at for some time more, since a
rate is that between two scrapes. Prints a row for each query, which says so where the data was but the zero that stands
for a series not begun; the exit code is 0 if every query has had data.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alpaca_ray.cluster import local

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "deploy" / "monitoring"
ASK_EVERY_S, AFTER_S = 5.0, 60.0
# Ray's counters do not exist before the first thing they count: a backend that failed, a stream that was resumed.
OR_ZERO = " or vector(0)"


@dataclass
class Query:
    """One line of a panel; `after_s`: when it first had data, `is_zero`: it has the zero of a series not begun."""

    board: str
    panel: str
    text: str
    after_s: float | None = None
    is_zero: bool = False


def queries() -> list[Query]:
    """Of all dashboards, in their order."""
    found = []
    for path in sorted((MONITORING / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            found += [Query(path.stem, panel["title"], target["expr"]) for target in panel["targets"]]
    return found


def configuration(directory: Path, temp_dir: str) -> Path:
    """The shipped one, with the temp dir of this cluster in place of Ray's default."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (files,) = config["scrape_configs"][0]["file_sd_configs"]
    files["files"] = [file.replace("/tmp/ray/", f"{temp_dir}/") for file in files["files"]]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def prometheus(program: str, directory: Path, temp_dir: str) -> Iterator[str]:
    """Its address, while it scrapes."""
    (port,) = local.free_ports(1)
    command = [program, f"--config.file={configuration(directory, temp_dir)}", f"--storage.tsdb.path={directory}/tsdb",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def has_data(address: str, query: str) -> bool:
    """Whether it returns a series with a value that is a number. Raises for a query that Prometheus refuses."""
    asked = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(asked, timeout=30) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{query}: {error.read().decode()}") from None
    except OSError:  # it is not up yet
        return False
    return any(series["value"][1] != "NaN" for series in result)


def watch(address: str, wanted: list[Query], demo: "subprocess.Popen[bytes]") -> None:
    """Until all had data, or some time after the demo's end."""
    started_s, ended_s = time.monotonic(), 0.0
    while not ended_s or time.monotonic() < ended_s + AFTER_S:
        for query in [query for query in wanted if query.after_s is None]:
            if has_data(address, query.text.removesuffix(OR_ZERO)):
                query.after_s = time.monotonic() - started_s
            elif query.text.endswith(OR_ZERO):
                query.is_zero = has_data(address, query.text)
        if all(query.after_s is not None for query in wanted):
            break
        if demo.poll() is not None:
            ended_s = ended_s or time.monotonic()
        time.sleep(ASK_EVERY_S)


def running_cluster(directory: Path, demo: "subprocess.Popen[bytes]") -> local.LocalCluster:
    while demo.poll() is None:
        if (cluster := local.running(directory)) is not None:
            return cluster
        time.sleep(1)
    raise SystemExit("the demo ended before its cluster was up")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", required=True, help="the program, as Debian's package prometheus has it")
    parser.add_argument("--directory", default=".demo", type=Path, help="of the demo; should not exist yet")
    options = parser.parse_args()
    directory, wanted = options.directory.absolute(), queries()
    with ExitStack() as held:
        here = Path(held.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, "-m", "alpaca_ray.cli"]
        demo = subprocess.Popen([*command, "demo", "--directory", str(directory)], cwd=ROOT)
        held.callback(subprocess.run, [*command, "down", "--directory", str(directory)], cwd=ROOT, check=False)
        cluster = running_cluster(directory, demo)
        watch(held.enter_context(prometheus(options.prometheus, here, cluster.temp_dir)), wanted, demo)
        code = demo.wait()
    for query in wanted:
        when = f"{query.after_s:.0f} s" if query.after_s is not None else "zero" if query.is_zero else "no data"
        print(f"{query.board:<11} {query.panel:<38} {when:>8}  {query.text}")
    counts = Counter("data" if q.after_s is not None else "zero" if q.is_zero else "no data" for q in wanted)
    print(f"the demo's exit code {code}; {len(wanted)} queries: {dict(counts)}")
    return int(code != 0 or counts["no data"] > 0)


if __name__ == "__main__":
    sys.exit(main())
