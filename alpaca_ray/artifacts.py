"""The run directory on any pyarrow filesystem: the contract between stages.

`<storage_path>/<run name>/config.yaml` holds the resolved config; `<stage>/manifest.json`, written last and by
rename, says that a stage is done. A storage that is away for a while makes a run late: what its errors say will pass is
tried again for `RunDirectory.patience_s`.
"""

import contextlib
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import yaml

from alpaca_ray.config import RunConfig, UserError, config_hash, result_fields

STORAGE_PATIENCE_S = 300.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 10.0
# What passes by itself: of a network filesystem by number, of pyarrow's stores by the words of their SDKs.
_PASSING = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "EAGAIN", "EBUSY", "ETIMEDOUT", "ENOTCONN", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EPIPE", "EREMOTEIO",
    )
    if hasattr(errno, name)  # not all systems know all of them
}  # fmt: skip
_PASSING_WORDS = re.compile(
    r"AWS Error (?:NETWORK_CONNECTION|REQUEST_TIMEOUT|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING)"
    r"|curlCode|UNAVAILABLE|DEADLINE_EXCEEDED|[Tt]imed out"
)

log = logging.getLogger("alpaca_ray")

P = ParamSpec("P")
T = TypeVar("T")

PACKAGES = ("alpaca-ray", "ray", "torch", "transformers", "openai", "pyarrow")


def is_passing(error: OSError) -> bool:
    """Whether a storage that fails so may answer again by itself. A full disk and a refused key do not."""
    return error.errno in _PASSING or (error.errno is None and _PASSING_WORDS.search(str(error)) is not None)


def patiently(
    action: Callable[[], T],
    patience_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Do it, again and again while the storage is away. Raises its last OSError after `patience_s`."""
    started_s, pause_s = clock(), FIRST_PAUSE_S
    while True:
        try:
            return action()
        except OSError as error:
            left_s = started_s + patience_s - clock()
            if not is_passing(error) or left_s <= 0:
                raise
            log.warning("the storage is away (%s): trying again for %.0f s", error, left_s)
        sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _patient(method: Callable[Concatenate["RunDirectory", P], T]) -> Callable[Concatenate["RunDirectory", P], T]:
    @functools.wraps(method)
    def tried(self: "RunDirectory", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return patiently(lambda: method(self, *args, **kwargs), self.patience_s)

    return tried


@dataclass(frozen=True)
class RunDirectory:
    """Paths are relative to the run's root and use "/"."""

    fs: pa.fs.FileSystem
    root: str
    uri: str | None = None  # of the root, "?" options included; None on a local filesystem
    patience_s: float = STORAGE_PATIENCE_S

    def path(self, relative: str) -> str:
        """The path of a file as the filesystem `fs` knows it."""
        return f"{self.root}/{relative}"

    def reference(self, relative: str, content_hash: str) -> str:
        """A directory of this run as `models.resolve` takes it: a local path, or a URI that any node can fetch.

        The hash stands in the URI, so that a cached copy of what lay there before is not taken for it.
        """
        return self.path(relative) if self.uri is None else f"{self.place(relative)}#{content_hash}"

    def place(self, relative: str) -> str:
        """Where a file lies, for people and other programs: a local path, or a URI."""
        if self.uri is None:
            return self.path(relative)
        location, mark, options = self.uri.partition("?")
        return f"{location}/{relative}{mark}{options}"

    @_patient
    def exists(self, relative: str) -> bool:
        """Whether a file or directory stands there."""
        return bool(self.fs.get_file_info(self.path(relative)).type != pa.fs.FileType.NotFound)

    @_patient
    def files(self, relative: str, suffix: str) -> list[str]:
        """The files in a directory whose names end so, sorted; none where there is no directory."""
        selector = pa.fs.FileSelector(self.path(relative), allow_not_found=True)
        names = (info.base_name for info in self.fs.get_file_info(selector) if info.type == pa.fs.FileType.File)
        return [f"{relative}/{name}" for name in sorted(names) if name.endswith(suffix)]

    @_patient
    def read_bytes(self, relative: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        with self.fs.open_input_stream(self.path(relative)) as stream:
            return bytes(stream.read())

    @_patient
    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write under a temporary name, then rename: a reader sees the whole file or none."""
        target = self.path(relative)
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        with _undone_on_failure(self.fs, temporary, target):
            self.fs.create_dir(target.rpartition("/")[0], recursive=True)
            with self.fs.open_output_stream(temporary) as stream:
                stream.write(data)
            self.fs.move(temporary, target)

    def read_json(self, relative: str) -> Any:
        """The parsed file. Raises FileNotFoundError."""
        return json.loads(self.read_bytes(relative))

    def write_json(self, relative: str, value: Any) -> None:
        """Indented, keys as given, non-ASCII characters as they are."""
        self.write_bytes(relative, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    @_patient
    def read_table(self, relative: str) -> pa.Table:
        """A Parquet file, or a directory of them."""
        return pq.read_table(self.path(relative), filesystem=self.fs, partitioning=None)

    def write_table(self, relative: str, table: pa.Table) -> None:
        """One Parquet file, whole or not at all."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write_bytes(relative, sink.getvalue().to_pybytes())

    @_patient
    def upload(self, local: Path, relative: str) -> None:
        """Copy a local directory to `relative`, which is replaced as a whole."""
        target = self.path(relative)
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        with _undone_on_failure(self.fs, temporary, target):
            self.fs.create_dir(temporary, recursive=True)
            pa.fs.copy_files(str(local), temporary, destination_filesystem=self.fs)
            self.delete(relative)
            self.fs.move(temporary, target)

    @_patient
    def delete(self, relative: str) -> None:
        """Remove a directory with all it holds; nothing happens where there is none."""
        if self.exists(relative):
            self.fs.delete_dir(self.path(relative))


def open_run(storage_path: str, name: str) -> RunDirectory:
    """The run's directory, on a local path or any URI that pyarrow opens; it need not exist yet.

    Raises UserError for a URI that pyarrow cannot open, and for a relative path inside a submitted job, whose
    working directory is a copy that Ray deletes.
    """
    if "://" in storage_path:
        try:
            filesystem, root = pa.fs.FileSystem.from_uri(storage_path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"storage_path {storage_path} cannot be opened: {error}") from None
        if not root and not isinstance(filesystem, pa.fs.LocalFileSystem):
            raise UserError(f"storage_path {storage_path} cannot be opened: it names no bucket")
        location, mark, options = storage_path.partition("?")
        uri = f"{location.rstrip('/')}/{name}{mark}{options}"
        local_uri = isinstance(filesystem, pa.fs.LocalFileSystem)
        return RunDirectory(filesystem, f"{root.rstrip('/')}/{name}", None if local_uri else uri)
    local = Path(storage_path).expanduser()
    if not local.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(
            f"storage_path {storage_path!r} is relative: a submitted job would lose what it writes there. "
            "Give an absolute path that all nodes share, or a URI such as s3://bucket/runs, as --storage-path"
        )
    return RunDirectory(pa.fs.LocalFileSystem(), str(local.absolute() / name))


def open_runs(storage_path: str) -> list[RunDirectory]:
    """The directories of a storage path, by name; none where there is no such path. Raises UserError like open_run."""
    place = open_run(storage_path, "any")
    parent = pa.fs.FileSelector(place.root.rpartition("/")[0], allow_not_found=True)
    names = (info.base_name for info in place.fs.get_file_info(parent) if info.type == pa.fs.FileType.Directory)
    return [open_run(storage_path, name) for name in sorted(names)]


@dataclass
class Stage:
    """One stage of a run. `manifest` is that of an earlier, finished run of it; None: there is work to do."""

    name: str
    config: RunConfig
    run: RunDirectory
    inputs: Mapping[str, str]  # name -> hash of the content
    manifest: dict[str, Any] | None = None
    started_s: float = field(default_factory=time.time)

    def path(self, relative: str) -> str:
        """The path inside the run of a file of this stage."""
        return f"{self.name}/{relative}"

    def finish(self, counts: Mapping[str, Any], outputs: Mapping[str, str]) -> dict[str, Any]:
        """Write the manifest, the mark that the stage is done. `outputs`: name -> hash of the content."""
        section = getattr(self.config, self.name)
        self.manifest = {
            "stage": self.name,
            "config_hash": config_hash(section),
            "config": result_fields(section),
            "inputs": dict(self.inputs),
            "outputs": dict(outputs),
            "counts": dict(counts),
            "wall_time_s": round(time.time() - self.started_s, 1),
            "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        self.run.write_json(self.path("manifest.json"), self.manifest)
        return self.manifest


def begin_stage(run: RunDirectory, config: RunConfig, name: str, inputs: Mapping[str, str]) -> Stage:
    """Enter a stage: find it done, go on with it, or start it. The resolved config goes to config.yaml.

    Raises UserError naming the fields if the stage was begun or finished with another config or other inputs.
    """
    asked = _asked(config, name, inputs)
    manifest = done(run, config, name, inputs)
    if manifest is not None:
        return Stage(name, config, run, inputs, manifest)
    record = yaml.safe_load(run.read_bytes("config.yaml")) if run.exists("config.yaml") else {"begun": {}}
    if name in record["begun"]:
        _refuse_change(run, name, record["begun"][name], asked)
    # "begun" holds what must not change any more, "config" the whole resolved config as last asked for
    resolved = {
        "hash": config_hash(config),
        "begun": record["begun"] | {name: asked},
        "config": config.model_dump(mode="json"),
    }
    run.write_bytes("config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode())
    return Stage(name, config, run, inputs)


def done(run: RunDirectory, config: RunConfig, name: str, inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """The manifest of a stage that is done as it is asked for, or None. Raises UserError if it was done otherwise."""
    if not run.exists(f"{name}/manifest.json"):
        return None
    manifest: dict[str, Any] = run.read_json(f"{name}/manifest.json")
    made = {name: manifest["config"], "input": manifest["inputs"]}
    _refuse_change(run, name, made, _asked(config, name, inputs))
    return manifest


def finished(run: RunDirectory, name: str) -> dict[str, Any]:
    """The manifest of a stage that another one builds on. Raises UserError if that stage is not done."""
    if not run.exists(f"{name}/manifest.json"):
        raise UserError(f"stage {name} of {run.root} is not done: run jobs/{name}.py with the same config first")
    manifest: dict[str, Any] = run.read_json(f"{name}/manifest.json")
    return manifest


def table_hash(table: pa.Table) -> str:
    """SHA-256 over a table's rows as JSON, first 16 digits: equal rows are equal, however they are compressed."""
    return hashlib.sha256(json.dumps(table.to_pylist(), sort_keys=True).encode()).hexdigest()[:16]


def _asked(config: RunConfig, name: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    return {name: result_fields(getattr(config, name)), "input": dict(inputs)}


def _refuse_change(run: RunDirectory, name: str, recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differences = [f"  {key}: {old!r} there, {new!r} now" for key, old, new in _differences(recorded, asked)]
    if differences:
        raise UserError(
            f"{run.root} was made with another {name} config. These differ:\n"
            + "\n".join(differences)
            + "\nGive the values it was made with, or another --name"
        )


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield prefix, old, new


@contextlib.contextmanager
def _undone_on_failure(fs: pa.fs.FileSystem, temporary: str, target: str) -> Iterator[None]:
    """What a failed write has left at `temporary` goes away: on a full disk, each new try would take more of it."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            kind = fs.get_file_info(temporary).type
            if kind == pa.fs.FileType.Directory:
                fs.delete_dir(temporary)
            elif kind == pa.fs.FileType.File:
                fs.delete_file(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left to write {target}: free some, or choose another --storage-path") from error
        raise
