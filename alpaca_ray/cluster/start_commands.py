"""The environment that cluster.yaml's start commands give Ray: plain values, and secrets by their names."""

import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from alpaca_ray.config import UserError

AWS_SECRET = re.compile(r"aws secretsmanager get-secret-value --secret-id (\S+) --query SecretString --output text")
# An image has a PATH of its own, and where the head's state lies is another question on every target; KubeRay sets how
# long workers wait for their head.
OF_THE_MACHINE = ("PATH", "RAY_gcs_storage", "RAY_gcs_storage_path", "RAY_gcs_rpc_server_reconnect_timeout_s")
GCP_SECRET = "/home/ubuntu/venv/bin/python -m alpaca_ray.cluster.gcp_secret"


class Variable(NamedTuple):
    """Of Ray's processes on a node. Either `value` is the value, or `secret` names where it lies."""

    name: str
    value: str | None
    secret: str | None


def variables(commands: Sequence[str]) -> list[Variable]:
    """What is exported in front of `ray start`, without what only a machine set up by these commands needs.

    Raises UserError for a value that is computed in a way that no other target could follow.
    """
    started = [command for command in commands if "ray start" in command]
    if len(started) != 1:
        raise UserError(f"cluster.yaml: {len(started)} of the start commands say `ray start`; it has to be one")
    exported = re.match(r"\s*export\s+(.*?);\s", started[0], re.DOTALL)
    if exported is None:
        raise UserError("cluster.yaml: the start command has to be `export NAME=value ...; ray start ...`")
    pairs = [word.partition("=") for word in shlex.split(exported[1])]
    return [_variable(name, value) for name, _, value in pairs if name not in OF_THE_MACHINE]


def secret_name(aws_id: str) -> str:
    """The same secret's name where slashes are not allowed: Google's Secret Manager and Kubernetes."""
    return aws_id.replace("/", "-")


def for_gcp(commands: Sequence[str]) -> list[str]:
    """The commands with every secret read from Google's Secret Manager, and the watcher asking Google's server."""
    variables(commands)
    read = [AWS_SECRET.sub(lambda found: f"{GCP_SECRET} {secret_name(found[1])}", command) for command in commands]
    return [command.replace("--cloud aws", "--cloud gcp") for command in read]


def _variable(name: str, value: str) -> Variable:
    found = re.fullmatch(rf"\$\({AWS_SECRET.pattern}\)", value)
    if found is not None:
        return Variable(name, None, secret_name(found[1]))
    if "$" in value or "`" in value:
        raise UserError(
            f"cluster.yaml: start commands: {name} is computed by {value!r}, and only "
            '"$(aws secretsmanager get-secret-value --secret-id NAME --query SecretString --output text)" has a form '
            "for the other targets"
        )
    return Variable(name, value, None)
