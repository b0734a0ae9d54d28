"""Secrets in plain text: found by their form, by the field that holds them, by the variable they go to."""

import re
from collections.abc import Iterator
from typing import Any

from alpaca_ray.generate.privacy import holds_secret
from alpaca_ray.yaml_lines import Location, texts

_IN_ENVIRONMENT = re.compile(
    r"(?<![\w$-])(?P<name>[A-Z][A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD))=(?P<value>\"[^\"]*\"|'[^']*'|[^\s;&|]*)"
)
# Of an AWS secret access key or one like it: 40 characters of Base64, letters of both cases and digits.
_BASE64_40 = re.compile(r"(?<![\w/+=-])(?=[A-Za-z/+]*\d)(?=[a-z0-9/+]*[A-Z])(?=[A-Z0-9/+]*[a-z])[\w/+]{40}(?![\w/+=-])")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|AIza[\w-]{35}|glpat-[\w-]{20,})")
_FIELD = re.compile(
    r"(?:\w+_)?(?:api_?key|secret|secret_key|access_key|access_key_id|token|password|passwd|credentials)", re.I
)
_VARIABLE = re.compile(r"[A-Z0-9_]+_(?:KEY|TOKEN|SECRET|PASSWORD)")
# Fields that name a variable: it is on the node, its value in no file.
_NAMES_A_VARIABLE = ("api_key_env", "key_env", "keys_env")
REMEDY = "keep it in the environment of the nodes, from the cloud's secret store, and name only the variable here"


def secrets(values: Any) -> Iterator[tuple[Location, str, str]]:
    """Place, what is wrong, and what of the text comes before the secret: the secret itself is never repeated."""
    for path, text in texts(values):
        field = str(path[-1])
        if field in _NAMES_A_VARIABLE:
            if re.fullmatch(r"[A-Za-z_]\w*", text) is None:
                yield path, "this is no variable's name; a key itself may not stand here", ""
        elif _is_value(text) and (_FIELD.fullmatch(field) or _VARIABLE.fullmatch(field)):
            yield path, f"a secret in plain text: {REMEDY}", ""
        elif assigned := next((m for m in _IN_ENVIRONMENT.finditer(text) if _is_value(m["value"].strip("\"'"))), None):
            yield path, f"{assigned['name']} gets its value in plain text: {REMEDY}", f"{assigned['name']}="
        elif holds_secret(text) or _TOKEN.search(text) or _BASE64_40.search(text):
            yield path, f"a secret in plain text: {REMEDY}", ""


def _is_value(text: str) -> bool:
    """Not empty, no variable or command whose value the shell puts there, no path."""
    return text != "" and "$" not in text and "`" not in text and not text.startswith(("/", "~", "./"))
