"""A YAML file's fields with the lines they stand on, and the strict check of their names and types.

The names come from a pydantic model or a JSON schema of whoever reads the file. A field that its reader would drop in
silence is a problem here, with its line and the nearest valid name.
"""

import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from pydantic import BaseModel, ValidationError

from alpaca_ray.config import UserError, nearest

Location = tuple[str | int, ...]


def read_documents(file: Path) -> list[dict[str, Any]]:
    """The file's YAML documents. Raises UserError for one that is not there, no YAML, or no mapping."""
    try:
        documents = [found for found in yaml.safe_load_all(file.read_text(encoding="utf-8")) if found is not None]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no YAML: {error}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise UserError(f"{file} holds no mapping")
    return documents


def read_mapping(file: Path) -> dict[str, Any]:
    """As `read_documents`, of a file that holds one."""
    [document, *others] = read_documents(file)
    if others:
        raise UserError(f"{file} holds more than one YAML document")
    return document


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong on a line of the file."""

    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.line}: {self.field}: {self.message}" if self.field else f"{self.line}: {self.message}"


@dataclass(frozen=True)
class Fields:
    """What a file says, and on which line each of its fields stands."""

    values: dict[Any, Any]
    lines: Mapping[Location, int]
    repeated: tuple[Problem, ...]
    text: tuple[str, ...]

    def line(self, path: Location, fragment: str = "") -> int:
        """Of the field at `path`, or of the nearest one around it that is there; where `fragment` stands in it."""
        while path not in self.lines:
            path = path[:-1]
        first = self.lines[path]
        after = min((line for line in self.lines.values() if line > first), default=len(self.text) + 1)
        held = (line for line, text in enumerate(self.text[first - 1 : after - 1], first) if fragment in text)
        return next(held, first)


def read_text(file: Path) -> str:
    """Raises UserError if the file cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a cluster.yaml, a serve_config.yaml or a recipe") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None


def parse(text: str) -> Fields | Problem:
    """The fields of a YAML file, or why it has none."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        index = None if root is None else _Index(root)  # before the values are made, which changes merged mappings
        values = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return Problem(1 if mark is None else mark.line + 1, "", f"not valid YAML: {error.problem}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return Problem(1, "", f"not valid YAML: {error}")
    if not isinstance(values, dict) or index is None:
        return Problem(1, "", "not a mapping of fields")
    if index.loop is not None:
        return Problem(index.loop, "", "an alias of what it stands in")
    return Fields(values, index.lines, tuple(index.repeated), tuple(text.splitlines()))


class _Index:
    """The lines of all fields of a YAML tree."""

    def __init__(self, root: yaml.Node) -> None:
        self.lines: dict[Location, int] = {(): root.start_mark.line + 1}
        self.repeated: list[Problem] = []
        self.loop: int | None = None
        self._add(root, (), ())

    def _add(self, node: yaml.Node, path: Location, above: tuple[int, ...]) -> None:
        if id(node) in above:
            self.loop = node.start_mark.line + 1
            return
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            for position, item in enumerate(node.value):
                self.lines.setdefault((*path, position), item.start_mark.line + 1)
                self._add(item, (*path, position), above)
        elif isinstance(node, yaml.MappingNode):
            self._add_mapping(node, path, above)

    def _add_mapping(self, node: yaml.MappingNode, path: Location, above: tuple[int, ...]) -> None:
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if name in seen:
                self.repeated.append(Problem(key.start_mark.line + 1, dotted((*path, name)), "given twice"))
            seen.add(name)
            self.lines.setdefault((*path, name), key.start_mark.line + 1)
            self._add(value, (*path, name), above)
        for key, value in node.value:  # what `<<: *anchor` brings comes after what stands here
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    self._add(merged, path, above)


class Check:
    """The problems of one file."""

    def __init__(self, fields: Fields) -> None:
        self.values = fields.values
        self.problems: list[Problem] = list(fields.repeated)
        self._fields = fields
        self._unknown: set[Location] = set()

    def say(self, path: Location, message: str, fragment: str = "") -> None:
        """A problem with the field at `path`; `fragment`: the part of a long text that it is about."""
        self.problems.append(Problem(self._fields.line(path, fragment), dotted(path), message))

    def found(self) -> list[Problem]:
        """All problems by line, each once."""
        return sorted(set(self.problems))

    def model(self, values: Any, model: type[BaseModel], path: Location) -> None:
        """Names and types of a mapping that `model` describes."""
        if isinstance(values, dict):
            self._names(values, model, path)
        self._types(values, model, path)

    def schema(self, values: Any, schema: Mapping[str, Any], path: Location) -> None:
        """Names and types of what a JSON schema (draft 7) describes."""
        import jsonschema

        for error in jsonschema.Draft7Validator(schema).iter_errors(_with_text_keys(values)):
            self._explain_schema(error, (*path, *error.absolute_path))

    def only(self, values: Mapping[Any, Any], valid: Sequence[str], path: Location) -> None:
        """No other names than these."""
        for name in values:
            if name not in valid:
                self.no_such((*path, str(name)), valid)

    def no_such(self, path: Location, valid: Sequence[str]) -> None:
        self._unknown.add(path)
        self.say(path, f"no such field{nearest(str(path[-1]), valid)}")

    def is_free(self, name: str, value: Any, path: Location) -> bool:
        """Whether a field of a model is looked at in another way, or left open; for those who know the model."""
        return False

    def _names(self, values: Mapping[Any, Any], model: type[BaseModel], path: Location) -> None:
        for name, value in values.items():
            here = (*path, str(name))
            field = model.model_fields.get(name) if isinstance(name, str) else None
            if field is None:
                self.no_such(here, list(model.model_fields))
            elif not self.is_free(name, value, here):
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

    def _types(self, values: Any, model: type[BaseModel], path: Location) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):  # fields that Ray will drop some day
                model.model_validate(values)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                self._explain(item["type"], (*path, *item["loc"]), item["msg"] + _near_choice(item))
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # a policy that Ray tries to import
            self.say(path, str(error))

    def _explain(self, kind: str, location: Location, message: str) -> None:
        if kind == "extra_forbidden" and location in self._unknown:
            return
        # Pydantic puts the names of a union's members between the fields.
        path: Location = ()
        for part in location:
            path = (*path, part) if (*path, part) in self._fields.lines else path
        words = message.removeprefix("Value error, ").split()
        if kind == "value_error" and words and (*path, words[0]) in self._fields.lines:
            path = (*path, words[0])  # a model's own check begins with the field that it is about
        missing = kind == "missing"
        self.say((*path, location[-1]) if missing else path, "missing" if missing else _first_line(message))

    def _explain_schema(self, error: Any, path: Location) -> None:
        if error.validator == "additionalProperties":
            valid = sorted(error.schema.get("properties", {}))
            for name in set(error.instance) - set(valid):
                self.no_such((*path, name), valid)
        elif error.validator == "required":
            for name in set(error.validator_value) - set(error.instance):
                self.say((*path, name), "missing")
        elif error.validator == "type":
            self.say(path, f"{_shown(error.instance)} is no {_either(error.validator_value)}")
        elif error.validator == "enum":
            self.say(
                path,
                f"{_shown(error.instance)} is none of its values{nearest(str(error.instance), error.validator_value)}",
            )
        else:
            self.say(path, _first_line(error.message))


def mappings(values: Any) -> Iterator[tuple[Any, dict[Any, Any]]]:
    """The mappings in a list or a mapping, each with its place in it; nothing of anything else."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    yield from ((place, value) for place, value in inner if isinstance(value, dict))


def mapping(values: Any, *path: str) -> dict[Any, Any]:
    """The mapping at `path`; an empty one where there is none, or something else."""
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def texts(values: Any, path: Location = ()) -> Iterator[tuple[Location, str]]:
    """Every text in a tree, with its place."""
    if isinstance(values, str):
        yield path, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from texts(value, (*path, str(name)))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from texts(value, (*path, index))


def dotted(path: Location) -> str:
    return ".".join(str(part) for part in path)


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


def _near_choice(item: Mapping[str, Any]) -> str:
    if item["type"] not in ("literal_error", "enum"):
        return ""
    return nearest(str(item["input"]), re.findall(r"'([^']*)'", item["msg"]))


def _with_text_keys(values: Any) -> Any:
    """YAML has keys that are no text, JSON schemas only those that are."""
    if isinstance(values, dict):
        return {str(name): _with_text_keys(value) for name, value in values.items()}
    return [_with_text_keys(value) for value in values] if isinstance(values, list) else values


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "null" if value is None else repr(value)


def _either(kinds: str | Sequence[str]) -> str:
    names = {"object": "mapping", "array": "list", "string": "text", "integer": "whole number"}
    return " or ".join(names.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _first_line(message: str) -> str:
    return message.removeprefix("Value error, ").strip().split("\n")[0]
