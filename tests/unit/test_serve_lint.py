"""`alpaca-ray lint`: each mistake in a serve_config.yaml is found, with its line, its field and the nearest name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.cli import main
from alpaca_ray.serve.keys import make_key
from alpaca_ray.serve.lint import lint
from alpaca_ray.yaml_lines import Problem

SHIPPED = (Path(__file__).parents[2] / "serve_config.yaml").read_text(encoding="utf-8")
# Every part of Ray's schema that a file of ours may use.
FULL = """\
proxy_location: EveryNode
http_options:
  host: 127.0.0.1
  port: 8000
  keep_alive_timeout_s: 5
grpc_options:
  port: 9000
controller_options:
  runtime_env: {env_vars: {A: b}}
logging_config:
  encoding: JSON
  additional_log_standard_attrs: [name]
target_capacity: 100
applications:
  - name: alpaca
    route_prefix: /
    import_path: alpaca_ray.serve.app:build
    runtime_env:
      env_vars: {A: b}
    args:
      model: embedded:smollm2-135m
      dtype: float32
      max_length: 2048
      autoscaling: {min_replicas: 1, max_replicas: 3}
      admission:
        max_waiting: 4
      placement:
        num_cpus: 1
        label_selector: {any: thing}
    deployments:
      - name: EngineReplica
        max_ongoing_requests: 8
        max_surge_percent: 100
        autoscaling_config:
          min_replicas: 0
          max_replicas: 4
          policy:
            policy_function: ray.serve.autoscaling_policy:default_autoscaling_policy
            policy_kwargs: {any: thing}
        backpressure_config:
          status_code: 429
          retry_after_s: 2
        ray_actor_options:
          num_cpus: 1
          resources: {any: 1}
          runtime_env: {env_vars: {A: b}}
        user_config: {any: thing}
        request_router_config:
          request_routing_stats_period_s: 10
        logging_config:
          log_level: DEBUG
"""
# what stands in FULL, what stands there by mistake, what is said and of which field
APPLICATION = "applications.0"
ARGS, DEPLOYMENT = f"{APPLICATION}.args", f"{APPLICATION}.deployments.0"
MISTAKES = [
    ("proxy_location: ", "proxy_locaton: ", "proxy_locaton", "did you mean 'proxy_location'"),
    ("EveryNode", "EveryNod", "proxy_location", "'HeadOnly'"),
    ("  host: ", "  hots: ", "http_options.hots", "did you mean 'host'"),
    ("port: 8000", "port: eight", "http_options.port", "valid integer"),
    ("keep_alive_timeout_s: 5", "keepalive_timeout_s: 5", "http_options.keepalive_timeout_s", "keep_alive_timeout_s"),
    ("port: 9000", "prot: 9000", "grpc_options.prot", "did you mean 'port'"),
    ("port: 9000", "grpc_servicer_functions: [a.b]", "grpc_options.grpc_servicer_functions", "no API key"),
    ("options:\n  runtime_env:", "options:\n  runtime:", "controller_options.runtime", "did you mean 'runtime_env'"),
    ("encoding: JSON", "encodign: JSON", "logging_config.encodign", "did you mean 'encoding'"),
    ("encoding: JSON", "encoding: XML", "logging_config.encoding", "XML"),
    ("target_capacity: 100", "target_capacity: 101", "target_capacity", "less than or equal to 100"),
    ("    route_prefix: /", "    route_prefx: /", f"{APPLICATION}.route_prefx", "did you mean 'route_prefix'"),
    ("serve.app:build", "server.app:build", f"{APPLICATION}.import_path", "did you mean 'alpaca_ray.serve.app:build'"),
    ("alpaca_ray.serve.app:build", "other:build:x", f"{APPLICATION}.import_path", "at most one colon"),
    ("    import_path: ", "    importpath: ", f"{APPLICATION}.importpath", "did you mean 'import_path'"),
    (
        "      env_vars: {A: b}\n    args",
        "      env_var: {A: b}\n    args",
        f"{APPLICATION}.runtime_env.env_var",
        "env_vars",
    ),
    ("      model: ", "      modle: ", f"{ARGS}.modle", "did you mean 'model'"),
    ("dtype: float32", "dtype: float16", f"{ARGS}.dtype", "'float32'"),
    ("max_length: 2048", "max_length: 0", f"{ARGS}.max_length", "greater than 0"),
    ("min_replicas: 1, ", "min_replica: 1, ", f"{ARGS}.autoscaling.min_replica", "did you mean 'min_replicas'"),
    ("min_replicas: 1", "min_replicas: 4", f"{ARGS}.autoscaling.min_replicas", "max_replicas (3)"),
    ("max_waiting: 4", "max_wating: 4", f"{ARGS}.admission.max_wating", "did you mean 'max_waiting'"),
    ("max_waiting: 4", "max_waiting: -1", f"{ARGS}.admission.max_waiting", "greater than or equal to 0"),
    ("max_waiting: 4", "key_file: keys", f"{ARGS}.admission.key_file", "absolute path"),
    (
        "        num_cpus: 1\n        label",
        "        num_cpu: 1\n        label",
        f"{ARGS}.placement.num_cpu",
        "num_cpus",
    ),
    ("max_ongoing_requests: 8", "max_concurrent_queries: 8", f"{DEPLOYMENT}.max_concurrent_queries", "no such"),
    ("max_surge_percent: 100", "max_surge_percent: lots", f"{DEPLOYMENT}.max_surge_percent", "integer"),
    ("min_replicas: 0", "min_replica: 0", f"{DEPLOYMENT}.autoscaling_config.min_replica", "min_replicas"),
    ("max_replicas: 4", "max_replicas: four", f"{DEPLOYMENT}.autoscaling_config.max_replicas", "integer"),
    ("policy_kwargs:", "policy_args:", f"{DEPLOYMENT}.autoscaling_config.policy.policy_args", "kwargs"),
    ("status_code: 429", "status_code: 418", f"{DEPLOYMENT}.backpressure_config.status_code", "429"),
    ("retry_after_s: 2", "retry_after: 2", f"{DEPLOYMENT}.backpressure_config.retry_after", "retry_after_s"),
    (
        "          num_cpus: 1\n          res",
        "          cpus: 1\n          res",
        f"{DEPLOYMENT}.ray_actor_options.cpus",
        "num_cpus",
    ),
    (
        "          runtime_env: {env_vars",
        "          runtime_env: {envvars",
        f"{DEPLOYMENT}.ray_actor_options.runtime_env.envvars",
        "env_vars",
    ),
    (
        "request_routing_stats_period_s: 10",
        "request_routing_period_s: 10",
        f"{DEPLOYMENT}.request_router_config.request_routing_period_s",
        "request_routing_stats_period_s",
    ),
    (
        "request_routing_stats_period_s: 10",
        "request_routing_stats_period_s: 0",
        f"{DEPLOYMENT}.request_router_config.request_routing_stats_period_s",
        "greater than 0",
    ),
    ("log_level: DEBUG", "log_levl: DEBUG", f"{DEPLOYMENT}.logging_config.log_levl", "log_level"),
    ("user_config: {any: thing}", "user_config: [any]", f"{DEPLOYMENT}.user_config", "dictionary"),
    ("      dtype: float32\n", "      dtype: float32\n      dtype: bfloat16\n", f"{ARGS}.dtype", "given twice"),
    ("host: 127.0.0.1", "host: 0.0.0.0", "http_options.host", "no API keys"),
    ("host: 127.0.0.1", "host: 127.0.0.1\n  1: 2", "http_options.1", "no such field"),
]


def test_what_ships_and_the_full_file_are_right() -> None:
    assert lint(SHIPPED, {}) == []
    assert lint(FULL, {}) == []


@pytest.mark.parametrize(("right", "wrong", "named", "message"), MISTAKES)
def test_each_mistake_is_found_on_its_line(right: str, wrong: str, named: str, message: str) -> None:
    assert FULL.count(right) == 1
    text = FULL.replace(right, wrong)
    differing = [i for i, (a, b) in enumerate(zip(FULL.splitlines(), text.splitlines(), strict=False), 1) if a != b]

    found = lint(text, {})

    about = [problem for problem in found if problem.field == named and message in problem.message]
    assert len(about) == 1, found
    assert about[0].line == differing[0]
    assert str(about[0]).startswith(f"{differing[0]}: {named}: ")
    # Else only what a misspelt name leaves undone: its field is missing, the default host is in force.
    assert all(p.message == "missing" or "no API keys" in p.message for p in found if p != about[0])


def test_replicas_are_counted_once() -> None:
    text = FULL.replace("max_replicas: 3}", "max_replicas: 3}\n      num_replicas: 2")
    assert [(problem.field, "not both" in problem.message) for problem in lint(text, {})] == [(ARGS, True)]


def test_all_mistakes_are_listed_at_once() -> None:
    text, expected = FULL, set[str]()
    for right, wrong, named, message in MISTAKES:
        if message.startswith(("did you mean", "no such")) and text.count(right) == 1:
            text, expected = text.replace(right, wrong), expected | {named}
    assert len(expected) >= 9
    assert expected <= {problem.field for problem in lint(text, {})}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [", 1),
        ("a: 1\nb: }", 2),
        ("", 1),
        ("- a", 1),
        ("a: !!python/object:os.system {}", 1),
        ("? [a]\n: 1", 1),
        ("a: \0", 1),
    ],
)
def test_what_is_no_mapping_is_one_problem(text: str, line: int) -> None:
    (problem,) = lint(text, {})
    assert (problem.line, problem.field) == (line, "")


def test_the_single_application_form_is_named_for_what_it_is() -> None:
    assert Problem(1, "applications", "missing") in lint("import_path: alpaca_ray.serve.app:build\n", {})


PUBLIC = FULL.replace("127.0.0.1", "0.0.0.0")


def test_all_interfaces_need_a_key(tmp_path: Path) -> None:
    def problems(text: str, environ: dict[str, str]) -> list[str]:
        return [problem.field for problem in lint(text, environ)]

    line = make_key("a", ["generate"]).line
    there = PUBLIC.replace("max_waiting: 4", f"key_file: {tmp_path}/keys")
    in_application = PUBLIC.replace(
        "      env_vars: {A: b}\n    args", "      env_vars: {ALPACA_RAY_API_KEYS: ''}\n    args"
    )

    assert problems(PUBLIC, {}) == ["http_options.host"]
    assert problems(PUBLIC.replace("  host: 0.0.0.0\n", ""), {}) == ["http_options.host"], "Ray's default"
    assert problems(PUBLIC.replace("EveryNode", "Disabled"), {}) == []
    assert problems(PUBLIC, {"ALPACA_RAY_API_KEYS": line}) == []
    assert problems(in_application, {}) == []
    assert problems(there, {}) == [], "it lies where the replicas run, and they do not start without it"
    (tmp_path / "keys").write_text("nonsense")
    assert problems(there, {}) == ["applications.0.args.admission.key_file"]
    (tmp_path / "keys").write_text(line)
    (tmp_path / "keys").chmod(0o600)
    assert problems(there, {}) == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in places(item, (*path, key)))][bool(not path) :]


@settings(deadline=None)
@given(st.data())
def test_no_value_anywhere_makes_it_fail(data: st.DataObject) -> None:
    values = yaml.safe_load(FULL)
    *above, last = data.draw(st.sampled_from(places(values)))
    target = values
    for key in above:
        target = target[key]
    target[last] = data.draw(VALUES)
    for problem in lint(yaml.safe_dump(values), {}):
        assert problem.line >= 1
        assert problem.message


def test_the_command_lists_all_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(FULL)
    bad.write_text(FULL.replace("  host: ", "  hots: ").replace("modle", "model"))

    assert main(["lint", str(good)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert main(["lint", str(good), str(bad)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == f"{bad}:3: http_options.hots: no such field; did you mean 'host'?"
    assert shown[0].startswith(f"{bad}:2: http_options.host: ")
    assert main(["lint", str(tmp_path / "none.yaml")]) == 2
