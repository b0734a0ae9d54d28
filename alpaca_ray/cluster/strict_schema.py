"""JSON schemas that find unknown keys: published ones are open, so that a misspelt field passes in silence."""

from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from alpaca_ray.config import nearest

OPEN = "x-kubernetes-preserve-unknown-fields"


def closed(schema: Any) -> Any:
    """The schema with every object shut that lists its properties, unless it says that others may come."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {key: closed(value) for key, value in schema.items()}
    lists_properties = isinstance(inside.get("properties"), dict) and inside.get("type") == "object"
    if lists_properties and "additionalProperties" not in inside and not inside.get(OPEN):
        inside["additionalProperties"] = False
    return inside


def problems(instance: Any, schema: Any) -> list[str]:
    """One line for each: the dotted path, what is wrong, and for an unknown key the nearest valid one."""
    return sorted(line for error in Draft202012Validator(closed(schema)).iter_errors(instance) for line in _say(error))


def _say(error: ValidationError) -> Iterator[str]:
    path = dotted(error.absolute_path)
    if error.validator != "additionalProperties":
        yield f"{path or 'the file'}: {error.message}"
        return
    valid = list(error.schema["properties"])
    for name in sorted(error.instance.keys() - set(valid)):
        yield f"{path + '.' if path else ''}{name}: no such field{nearest(name, valid)}"


def dotted(path: Any) -> str:
    """`spec.workerGroupSpecs[0].template`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
