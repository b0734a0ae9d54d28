"""The whole path on one machine, as a team walks it on a cluster: submit the stages, deploy the model, ask it.

    alpaca-ray demo      (or: make demo)

The teacher is the embedded small model, served by the same application that later serves the student.
"""

import datetime
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from openai import AuthenticationError, OpenAI

from alpaca_ray.artifacts import RunDirectory, open_run
from alpaca_ray.cluster import local
from alpaca_ray.config import STAGES, UserError
from alpaca_ray.models import EMBEDDED, resolve
from alpaca_ray.serve.keys import make_key
from alpaca_ray.settings import load_config

RECIPE = "tiny_cpu"
TEACHER, STUDENT = "smollm2-135m", "alpaca-smollm2-135m"
# With the temperature of each. The second answer is longer, as a rule: long enough for the detector.
QUESTIONS = {"Explain what a rainbow is.": 0.0, "Describe a day in the life of a farmer.": 1.0}
DEPLOY_TIMEOUT_S, REQUEST_TIMEOUT_S = 300, 120
REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE = 6_000, 6_000_000


def up(directory: Path) -> int:
    """Run the demo and leave the student served. Raises UserError where a step fails; the next try goes on there."""
    if not Path("jobs").is_dir():
        raise UserError("run the demo from the project's checkout: the folder jobs/ is not here")
    directory = directory.absolute()
    started_s = time.monotonic()
    storage_path = str(directory / "runs")
    run = open_run(storage_path, load_config(["--recipe", RECIPE, "--storage-path", storage_path]).name)

    _say("the embedded model (downloaded and unpacked at the first time)")
    resolve(EMBEDDED)
    own = _secrets(directory)
    cluster = _cluster(directory, own)
    short, long = QUESTIONS
    for stage in STAGES:
        overrides = ["--storage-path", storage_path]
        is_done = run.exists(f"{stage}/manifest.json")
        asks_teacher = stage == "generate" and not is_done
        if not is_done:
            # Two cores: nothing is served while models are trained and compared.
            _deploy(cluster, directory, own, (EMBEDDED, TEACHER) if stage == "generate" else None)
        if asks_teacher:
            _ask(cluster, own, TEACHER, short)  # one that does not answer shows here, not in a job's retries
        if stage == "generate":
            overrides += ["--generate.teacher.base-url", f"{cluster.serve_url}/v1"]
            # Our server has no limits and names none. Were they unknown, the first request would go alone, to find out.
            overrides += ["--generate.limits.requests-per-minute", str(REQUESTS_PER_MINUTE)]
            overrides += ["--generate.limits.tokens-per-minute", str(TOKENS_PER_MINUTE)]
        _say(f"{stage}: ray job submit -- python jobs/{stage}.py --recipe {RECIPE}")
        entrypoint = ["python", f"jobs/{stage}.py", "--recipe", RECIPE, *overrides]
        local.submit(cluster, stage, entrypoint, working_dir=Path.cwd())
        if asks_teacher:
            _ask(cluster, own, TEACHER, long)
    _deploy(cluster, directory, own, (run.path("train/model"), STUDENT))
    for question in QUESTIONS:
        _detect(cluster, own, _ask(cluster, own, STUDENT, question))
    print(_summary(run, cluster, own, time.monotonic() - started_s), flush=True)
    return 0


def down(directory: Path) -> int:
    """End the demo's cluster. The runs stay."""
    cluster = local.running(directory.absolute())
    if cluster is None:
        print(f"no demo cluster of {directory} is running")
        return 0
    local.stop(cluster)
    print(f"the demo's cluster is down; its runs stay in {directory / 'runs'}")
    return 0


@dataclass(frozen=True)
class _Secrets:
    """Made at the first time, for this demo alone. `api_key` is a client's, `key_file` what the server knows of it."""

    api_key: Path
    key_file: Path
    watermark_key: Path


def _secrets(directory: Path) -> _Secrets:
    own = _Secrets(directory / "api_key", directory / "api_keys.jsonl", directory / "watermark_key")
    if not own.watermark_key.exists():  # written last
        directory.mkdir(parents=True, exist_ok=True)
        key = make_key("demo", ["generate", "detect"])
        _write_private(own.api_key, key.secret)
        _write_private(own.key_file, key.line + "\n")
        _write_private(own.watermark_key, str(secrets.randbits(62)))
    return own


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def _cluster(directory: Path, own: _Secrets) -> local.LocalCluster:
    cluster = local.running(directory)
    if cluster:
        _say(f"the local Ray cluster runs already: {cluster.dashboard}")
        return cluster
    _say("a local Ray cluster with a temp dir, ports and a token of its own")
    # Nodes know the teacher's key by their environment; the teacher is served by us.
    environment = {"OPENAI_API_KEY": own.api_key.read_text()}
    return local.start(directory, num_cpus=max(2, psutil.cpu_count() or 2), extra_environment=environment)


def _deploy(cluster: local.LocalCluster, directory: Path, own: _Secrets, model: tuple[str, str] | None) -> None:
    """Deploy serve_config.yaml with this model and name on the cluster's port, or nothing at all."""
    config = yaml.safe_load(Path("serve_config.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = cluster.serve_port
    application = config.pop("applications")[0]
    config["applications"] = []
    if model:
        reference, name = model
        _say(f"serve deploy: {name} at {cluster.serve_url}/v1")
        args = application["args"]
        args |= {"model": reference, "model_name": name}
        args["admission"]["key_file"] = str(own.key_file)
        # A student would learn its teacher's mark.
        args["watermark"] |= {"enabled": name != TEACHER, "key_file": str(own.watermark_key)}
        config["applications"] = [application | {"name": name}]
    config_file = directory / "serve_config.yaml"
    config_file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    local.deploy(cluster, config_file, DEPLOY_TIMEOUT_S)
    if model:
        _check_refusal(cluster)


def _check_refusal(cluster: local.LocalCluster) -> None:
    """Raises UserError if a request with a key that is none is answered."""
    base_url, key = f"{cluster.serve_url}/v1", "no-key-of-this-server"
    with OpenAI(base_url=base_url, api_key=key, timeout=REQUEST_TIMEOUT_S) as client:
        try:
            client.models.list()
        except AuthenticationError as error:
            print(f"with another API key: {error.status_code}, {error.body}", flush=True)
        else:
            raise UserError("the service answered a request without its API key: end it with `make down`")


def _ask(cluster: local.LocalCluster, own: _Secrets, model: str, question: str) -> str:
    """The answer, printed as it comes. Raises UserError if there is none."""
    print(f"\nasked:     {question}\n{model}:  ", end="", flush=True)
    answer = ""
    with _client(cluster, own) as client:
        for chunk in client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=200,
            temperature=QUESTIONS[question],
            seed=1,
            stream=True,
        ):
            piece = chunk.choices[0].delta.content or ""
            print(piece, end="", flush=True)
            answer += piece
    print(flush=True)
    if not answer.strip():
        where = "train/metrics.jsonl" if model == STUDENT else "the logs of its replicas"
        raise UserError(f"{model} is served but answered nothing: look at {where}")
    return answer


def _detect(cluster: local.LocalCluster, own: _Secrets, answer: str) -> None:
    """Print what the watermark's detector says of it."""
    with _client(cluster, own) as client:
        found = client.post("/watermark/detect", body={"text": answer}, cast_to=dict[str, Any])
    score = f"z {found['z_score']:.2f}, p-value {found['p_value']:.1e}"
    score += f", {found['num_green']} of {found['num_scored']} tokens green"
    print(f"watermark: {found['verdict']}: {score}", flush=True)


def _client(cluster: local.LocalCluster, own: _Secrets) -> OpenAI:
    key = own.api_key.read_text()
    return OpenAI(base_url=f"{cluster.serve_url}/v1", api_key=key, timeout=REQUEST_TIMEOUT_S)


def _summary(run: RunDirectory, cluster: local.LocalCluster, own: _Secrets, took_s: float) -> str:
    manifests: dict[str, dict[str, Any]] = {stage: run.read_json(f"{stage}/manifest.json") for stage in STAGES}
    lines = ["", f"{'stage':<10} {'seconds':>8}  what it made"]
    for stage, manifest in manifests.items():
        counts = ", ".join(f"{name} {value}" for name, value in manifest["counts"].items() if name != "reasons")
        lines.append(f"{stage:<10} {manifest['wall_time_s']:>8}  {counts}")
        lines.append(f"{'':<10} {'':>8}  {run.path(stage)}")
    lines += [
        "",
        f"The student is served at {cluster.serve_url}/v1 (model {STUDENT}); the API key is in {own.api_key}.",
        f"Ray's dashboard is {cluster.dashboard}.",
        f"The demo took {took_s:.0f} s. `make down` ends it; the runs stay.",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(f"\n==> {datetime.datetime.now():%H:%M:%S} {text}", flush=True)
