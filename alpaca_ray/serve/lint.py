"""[RAY SERVE] The strict check of serve_config.yaml: Serve itself takes unknown keys in silence, at every level.

Names are checked against the fields of Ray's own schema, types by Ray's own validation, `args` against ServeArgs.
Left open, as Ray leaves them: user_config, args of other applications, resources, labels, kwargs of policies.
"""

import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from alpaca_ray.config import AdmissionConfig, ServeArgs, UserError, nearest
from alpaca_ray.serve.exposure import check_exposure
from alpaca_ray.serve.keys import load_keys

OURS = ("alpaca_ray.serve.app:build", "alpaca_ray.serve.app.build")
DEFAULT_HOST = "0.0.0.0"  # of ray.serve.schema.HTTPOptionsSchema, unlike serve.start
Location = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong on a line of the file."""

    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.line}: {self.field}: {self.message}" if self.field else f"{self.line}: {self.message}"


def lint(text: str, environ: Mapping[str, str]) -> list[Problem]:
    """All that is wrong with a serve_config.yaml, by line. `environ`: where keys may be named."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return [Problem(1 if mark is None else mark.line + 1, "", f"not valid YAML: {error.problem}")]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return [Problem(1, "", f"not valid YAML: {error}")]
    if not isinstance(values, dict) or root is None:
        return [Problem(1, "", "not a mapping of fields")]
    check = _Check(root)
    check.schema(values, ServeDeploySchema, ())
    for index, application in _mappings(values.get("applications")):
        check.application(values, application, ("applications", index), environ)
    check.grpc(values)
    return sorted(set(check.problems))


def lint_file(file: Path, environ: Mapping[str, str]) -> list[str]:
    """A line for each problem: file, line, field, what is wrong. Raises UserError if the file cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a serve_config.yaml") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None
    return [f"{file}:{problem}" for problem in lint(text, environ)]


class _Check:
    """The problems of one file, and on which line each of its fields stands."""

    def __init__(self, root: yaml.Node) -> None:
        self.problems: list[Problem] = []
        self._lines: dict[Location, int] = {(): root.start_mark.line + 1}
        self._unknown: set[Location] = set()
        self._index(root, (), ())

    def say(self, path: Location, message: str) -> None:
        """A problem with the field at `path`, or with the nearest one around it that is in the file."""
        known = path
        while known not in self._lines:
            known = known[:-1]
        self.problems.append(Problem(self._lines[known], _dotted(path), message))

    def schema(self, values: Any, model: type[BaseModel], path: Location) -> None:
        """Names and types of a mapping that `model` describes."""
        if isinstance(values, dict):
            self._names(values, model, path)
        self._types(values, model, path)

    def application(
        self, values: Mapping[str, Any], application: Mapping[str, Any], path: Location, environ: Mapping[str, str]
    ) -> None:
        """What only we know of an application of ours; one without an import path is taken for one."""
        import_path = application.get("import_path", OURS[0])
        if import_path in OURS:
            self.schema(application.get("args") or {}, ServeArgs, (*path, "args"))
            self.keys(values, application, (*path, "args"), environ)
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

    def _index(self, node: yaml.Node, path: Location, above: tuple[int, ...]) -> None:
        if id(node) in above:  # an alias of what it is in
            return
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._lines.setdefault((*path, index), item.start_mark.line + 1)
                self._index(item, (*path, index), above)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*path, str(key.value))
                if here in self._lines:
                    self.problems.append(Problem(key.start_mark.line + 1, _dotted(here), "given twice"))
                self._lines.setdefault(here, key.start_mark.line + 1)
                self._index(value, here, above)

    def _names(self, values: Mapping[Any, Any], model: type[BaseModel], path: Location) -> None:
        for name, value in values.items():
            here = (*path, str(name))
            field = model.model_fields.get(name) if isinstance(name, str) else None
            if field is None:
                self._no_such(here, list(model.model_fields))
            elif name == "runtime_env" and isinstance(value, dict):
                self._only(value, sorted(RuntimeEnv.known_fields), here)
            elif name == "autoscaling_policy" and isinstance(value, dict):
                self.schema(value, AutoscalingPolicy, here)
            else:
                self._inside(value, field.annotation, here)

    def _inside(self, value: Any, annotation: Any, path: Location) -> None:
        options = list(_options(annotation))
        models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if isinstance(value, dict) and models:
            self._names(value, models[0], path)
            if len(options) > len(models):  # Ray would take any mapping here, and fail when it deploys
                self._types(value, models[0], path)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                for option in options:
                    for inner in typing.get_args(option)[:1]:
                        self._inside(item, inner, (*path, index))

    def _only(self, values: Mapping[Any, Any], valid: Sequence[str], path: Location) -> None:
        for name in values:
            if name not in valid:
                self._no_such((*path, str(name)), valid)

    def _no_such(self, path: Location, valid: Sequence[str]) -> None:
        self._unknown.add(path)
        self.say(path, f"no such field{nearest(str(path[-1]), valid)}")

    def _types(self, values: Any, model: type[BaseModel], path: Location) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):  # fields that Ray will drop some day
                model.model_validate(values)
        except ValidationError as error:
            for item in error.errors(include_input=False, include_url=False):
                self._explain(item["type"], (*path, *item["loc"]), item["msg"])
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # a policy that Ray tries to import
            self.say(path, str(error))

    def _explain(self, kind: str, location: Location, message: str) -> None:
        if kind == "extra_forbidden" and location in self._unknown:
            return
        # Pydantic puts the names of a union's members between the fields.
        path: Location = ()
        for part in location:
            path = (*path, part) if (*path, part) in self._lines else path
        missing = kind == "missing"
        self.say((*path, location[-1]) if missing else path, "missing" if missing else _first_line(message))


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union, without None."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _options(member)
    elif origin is Annotated:
        yield from _options(typing.get_args(annotation)[0])
    elif annotation is not types.NoneType:
        yield annotation


def _mappings(values: Any) -> Iterator[tuple[int, dict[Any, Any]]]:
    if isinstance(values, list):
        yield from ((index, value) for index, value in enumerate(values) if isinstance(value, dict))


def _variables(application: Mapping[str, Any]) -> set[str]:
    environment = application.get("runtime_env")
    variables = environment.get("env_vars") if isinstance(environment, dict) else None
    return set(variables) if isinstance(variables, dict) else set()


def _dotted(path: Location) -> str:
    return ".".join(str(part) for part in path)


def _first_line(message: str) -> str:
    return message.removeprefix("Value error, ").strip().split("\n")[0]
