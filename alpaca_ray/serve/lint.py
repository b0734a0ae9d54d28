"""[RAY SERVE] The strict check of serve_config.yaml: Serve itself takes unknown keys in silence, at every level.

Names are checked against the fields of Ray's own schema, types by Ray's own validation, `args` against ServeArgs.
Left open, as Ray leaves them: user_config, args of other applications, resources, labels, kwargs of policies.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from alpaca_ray.config import AdmissionConfig, ServeArgs, UserError, nearest
from alpaca_ray.models import EMBEDDED
from alpaca_ray.serve.exposure import check_exposure
from alpaca_ray.serve.keys import load_keys
from alpaca_ray.yaml_lines import Check, Fields, Location, Problem, mapping, mappings, parse

OURS = ("alpaca_ray.serve.app:build", "alpaca_ray.serve.app.build")
DEFAULT_HOST = "0.0.0.0"  # of ray.serve.schema.HTTPOptionsSchema, unlike serve.start


def lint(text: str, environ: Mapping[str, str]) -> list[Problem]:
    """All that is wrong with a serve_config.yaml, by line. `environ`: where keys may be named."""
    fields = parse(text)
    return [fields] if isinstance(fields, Problem) else check(fields, environ)


def check(fields: Fields, environ: Mapping[str, str]) -> list[Problem]:
    """As `lint`, of a file that is read."""
    found = _Check(fields)
    found.model(fields.values, ServeDeploySchema, ())
    for index, application in mappings(fields.values.get("applications")):
        found.application(fields.values, application, ("applications", index), environ)
    found.grpc(fields.values)
    return found.found()


class _Check(Check):
    """What is wrong with one serve_config.yaml."""

    def is_free(self, name: str, value: Any, path: Location) -> bool:
        """Two of Ray's fields are plain mappings to pydantic, though their names are known."""
        if name == "runtime_env" and isinstance(value, dict):
            self.only(value, sorted(RuntimeEnv.known_fields), path)
        elif name == "autoscaling_policy" and isinstance(value, dict):
            self.model(value, AutoscalingPolicy, path)
        else:
            return False
        return True

    def application(
        self, values: Mapping[str, Any], application: Mapping[str, Any], path: Location, environ: Mapping[str, str]
    ) -> None:
        """What only we know of an application of ours; one without an import path is taken for one."""
        import_path, prefix = application.get("import_path", OURS[0]), application.get("route_prefix")
        if isinstance(prefix, str) and not prefix.startswith("/"):  # Serve says so when it deploys
            self.say((*path, "route_prefix"), f"a path begins with a slash; did you mean {f'/{prefix}'!r}?")
        if import_path in OURS:
            self.model(application.get("args") or {}, ServeArgs, (*path, "args"))
            self.keys(values, application, (*path, "args"), environ)
            model = mapping(application, "args").get("model")
            if isinstance(model, str) and model.startswith("embedded:") and model != EMBEDDED:
                self.say((*path, "args", "model"), f"no such embedded model; did you mean {EMBEDDED!r}?")
        elif str(import_path).startswith("alpaca_ray"):
            self.say((*path, "import_path"), f"no such application{nearest(str(import_path), OURS)}")

    def keys(
        self, values: Mapping[str, Any], application: Mapping[str, Any], path: Location, environ: Mapping[str, str]
    ) -> None:
        """The keys can be read, and without keys nothing but loopback."""
        args = application.get("args")
        try:
            config = AdmissionConfig.model_validate((args if isinstance(args, dict) else {}).get("admission", {}))
        except ValidationError:
            return  # said already
        has_keys = config.key_file is not None or config.keys_env in {*environ, *_variables(application)}
        try:
            if config.key_file is None or Path(config.key_file).exists():  # else it lies where the replicas run
                load_keys(config, environ)
        except UserError as error:
            self.say((*path, "admission", "key_file"), str(error))
        if config.key_file is not None and not Path(config.key_file).is_absolute():
            message = "give an absolute path: replicas start in directories of Ray's own"
            self.say((*path, "admission", "key_file"), message)
        options = values.get("http_options")
        host = (options if isinstance(options, dict) else {}).get("host", DEFAULT_HOST)
        problem = check_exposure(str(host), str(values.get("proxy_location", "EveryNode")), has_keys)
        if problem is not None:
            self.say(("http_options", "host"), problem)

    def grpc(self, values: Mapping[str, Any]) -> None:
        """Serve's gRPC port knows no API keys."""
        options = values.get("grpc_options")
        if isinstance(options, dict) and options.get("grpc_servicer_functions"):
            message = "Serve's gRPC port asks for no API key and listens on all interfaces; leave it out"
            self.say(("grpc_options", "grpc_servicer_functions"), message)


def _variables(application: Mapping[str, Any]) -> set[str]:
    return set(mapping(application, "runtime_env", "env_vars"))
