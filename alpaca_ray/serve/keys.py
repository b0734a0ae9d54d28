"""API keys: made once, kept as hashes, compared in constant time, read again when their file changes.

A key is 256 bits of randomness, so its plain SHA-256 is what is stored. A slow hash with a salt protects words that
people choose, which can be guessed; nobody guesses 256 bits, and a slow hash would be paid for on every request.
"""

import base64
import hashlib
import hmac
import json
import logging
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt, ValidationError

from alpaca_ray.config import AdmissionConfig, Strict, UserError, nearest

logger = logging.getLogger(__name__)

PREFIX = "sk-alpaca-"  # scanners for leaked secrets look for sk-
KEY_BYTES = 32
CHECK_EVERY_S = 1.0  # how long a change of the key file may go unseen

KeyScope = Literal["generate", "detect", "admin"]
KEY_SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)


class KeyRecord(Strict):
    """One line of a key file, in JSON. None: no limit. A scope gives what it names and no other."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[frozenset[KeyScope], Field(min_length=1)]
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None


@dataclass(frozen=True)
class Key:
    """A key as the server knows it; its name goes into logs."""

    name: str
    digest: bytes = field(repr=False)
    scopes: frozenset[KeyScope]
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True)
class NewKey:
    """`secret` is for the client and is shown once; `line` is for the key file."""

    secret: str = field(repr=False)
    line: str


def make_key(
    name: str,
    scopes: Iterable[str],
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    random_bytes: Callable[[int], bytes] = secrets.token_bytes,
) -> NewKey:
    """A new key. Raises UserError for a name, scope or limit that is not valid."""
    secret = PREFIX + base64.urlsafe_b64encode(random_bytes(KEY_BYTES)).rstrip(b"=").decode()
    given = {
        "name": name,
        "sha256": digest(secret).hex(),
        "scopes": sorted(set(scopes)),
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
    }
    given = {field: value for field, value in given.items() if value is not None}
    try:
        KeyRecord.model_validate(given)
    except ValidationError as error:
        raise UserError(f"a key's {_explain(error)}") from None
    line = json.dumps(given)
    return NewKey(secret, line)


def digest(secret: str) -> bytes:
    """What is stored of a key and compared."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def find_key(keys: Sequence[Key], secret: str) -> Key | None:
    """The key whose hash this is. Goes through all of them, so the time says nothing about which one it was."""
    presented = digest(secret)
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, presented):
            found = key
    return found


def parse_keys(text: str, where: str) -> tuple[Key, ...]:
    """One JSON object a line; empty lines and those that begin with # are left out.

    Raises UserError that names the line and the field, and shows no value: it may be a key put there by mistake.
    """
    keys = [
        _parse_line(line, f"{where}, line {number}")
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    for what, values in (("name", [key.name for key in keys]), ("sha256", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise UserError(f"{where}: two keys have the same {what}; give each key a line and a name of its own")
    return tuple(keys)


def _parse_line(line: str, where: str) -> Key:
    try:
        record = KeyRecord.model_validate(json.loads(line))
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}; `alpaca-ray keys make` prints lines that are valid") from None
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not a JSON object; `alpaca-ray keys make` prints lines that are valid") from None
    return Key(
        record.name,
        bytes.fromhex(record.sha256),
        record.scopes,
        record.requests_per_minute,
        record.tokens_per_minute,
    )


def _explain(error: ValidationError) -> str:
    item = error.errors(include_input=False, include_context=False, include_url=False)[0]
    location = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        return f"unknown field{nearest(location[0], list(KeyRecord.model_fields))}"
    return f"{location[0]}: {item['msg']}" if location else "not a JSON object"


class Keys:
    """The keys in force: those of a file, which is read again when it changes, and those of the environment.

    A file that cannot be read any more, or is no longer valid, leaves the keys as they were and says so in the log.
    To revoke a key, take its line out.
    """

    def __init__(self, file: Path | None, fixed: tuple[Key, ...] = (), *, given: bool | None = None) -> None:
        """`given`: whether keys are asked for at all; None: if there is a file or a fixed key. Raises UserError."""
        self.given = given if given is not None else file is not None or bool(fixed)
        self._file, self._fixed = file, fixed
        self._of_file: tuple[Key, ...] = ()
        self._seen: tuple[int, ...] | None = None
        self._checked_s: float | None = None
        if file is not None:
            self._seen, self._of_file = _signature(file), read_keys(file)

    def find(self, secret: str, now_s: float) -> Key | None:
        """The key that `secret` is; None: no key of ours."""
        self._refresh(now_s)
        return find_key(self._all(), secret)

    @property
    def num_keys(self) -> int:
        """In force."""
        return len(self._all())

    def _all(self) -> tuple[Key, ...]:
        return self._fixed + self._of_file

    def _refresh(self, now_s: float) -> None:
        if self._file is None or (self._checked_s is not None and now_s < self._checked_s + CHECK_EVERY_S):
            return
        self._checked_s = now_s
        signature = _signature(self._file)
        if signature == self._seen:
            return
        self._seen = signature  # before the file is read: a change after this shows the next time
        try:
            self._of_file = read_keys(self._file)
            logger.info("the key file was read again: %d keys", len(self._of_file))
        except UserError as error:
            logger.error("the key file is not valid, the keys stay as they were: %s", error)


def load_keys(config: AdmissionConfig, environ: Mapping[str, str]) -> Keys:
    """The keys that the config names. Raises UserError if they cannot be read or are not valid."""
    lines = environ.get(config.keys_env)
    fixed = () if lines is None else parse_keys(lines, f"environment variable {config.keys_env}")
    file = None if config.key_file is None else Path(config.key_file)
    return Keys(file, fixed, given=file is not None or lines is not None)


def read_keys(file: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises UserError if others than its owner may change it."""
    try:
        mode = file.stat().st_mode
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"key file {file}: {reason}; name a readable file in args.admission.key_file") from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"key file {file}: others may write to it, and so add keys; chmod 600 {file}")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        # No error: Kubernetes mounts secrets with mode 644, and 256 random bits cannot be found from their hash.
        logger.warning("others may read the key file %s: chmod 600 it where you can", file)
    return parse_keys(text, f"key file {file}")


def _signature(file: Path) -> tuple[int, ...]:
    """Changes with the file; () where there is none."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode
