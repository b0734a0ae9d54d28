"""The run directory: whole files or none, and stages that are never made of two configs."""

import dataclasses
import errno
import functools
import io
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.artifacts import (
    MAX_PAUSE_S,
    RunDirectory,
    begin_stage,
    finished,
    is_passing,
    open_run,
    patiently,
    table_hash,
)
from alpaca_ray.config import RunConfig, UserError
from alpaca_ray.settings import load_config

INPUTS = {"seed_tasks": "0123"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path / "runs"), "mine")


@functools.cache
def config(*overrides: str) -> RunConfig:
    return load_config(["--recipe", "tiny_cpu", *overrides])


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


class FailingDisk(pa.fs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """A local disk on which every file breaks off after `room_bytes`, with `number` as the reason."""

    def __init__(self, number: int, room_bytes: int) -> None:
        self._local = pa.fs.LocalFileSystem()
        self._number = number
        self._room_bytes = room_bytes

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(_FailingFile(path, self._number, self._room_bytes), mode="w")

    def get_type_name(self) -> str:
        return "failing"

    def get_file_info(self, paths: list[str]) -> Any:
        return self._local.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._local.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._local.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._local.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._local.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._local.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._local.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._local.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self._local.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        return self._local.open_input_file(path)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError

    def normalize_path(self, path: str) -> str:
        return str(self._local.normalize_path(path))


class _FailingFile(io.FileIO):
    def __init__(self, path: str, number: int, room_bytes: int) -> None:
        super().__init__(path, "w")
        self._number = number
        self._room_bytes = room_bytes

    def write(self, data: Any, /) -> int:
        super().write(bytes(data)[: self._room_bytes])
        raise OSError(self._number, os.strerror(self._number))


def failing(run: RunDirectory, number: int) -> RunDirectory:
    return RunDirectory(pa.fs.PyFileSystem(FailingDisk(number, room_bytes=3)), run.root, patience_s=0.0)


def test_what_is_written_is_read_back(run: RunDirectory) -> None:
    run.write_bytes("a/b/c.bin", b"\x00\xff")
    run.write_json("a/d.json", {"b": [1, None], "a": "é\u2028"})
    table = pa.table({"x": [1, 2, None], "y": ["", "é", None]})
    run.write_table("plan/round=000.parquet", table)
    assert run.read_bytes("a/b/c.bin") == b"\x00\xff"
    assert run.read_json("a/d.json") == {"b": [1, None], "a": "é\u2028"}
    assert run.read_table("plan/round=000.parquet").equals(table)  # no column is made of the "=" in its name
    assert files(Path(run.root)) == ["a/b/c.bin", "a/d.json", "plan/round=000.parquet"]


def test_a_directory_of_tables_is_one_table(run: RunDirectory) -> None:
    run.write_table("t/0.parquet", pa.table({"x": [1]}))
    run.write_table("t/1.parquet", pa.table({"x": [2]}))
    assert sorted(run.read_table("t")["x"].to_pylist()) == [1, 2]


def test_a_file_is_replaced_as_a_whole(run: RunDirectory) -> None:
    run.write_bytes("a", b"a long first version")
    run.write_bytes("a", b"short")
    assert run.read_bytes("a") == b"short"
    assert files(Path(run.root)) == ["a"]


def test_what_does_not_exist(run: RunDirectory) -> None:
    assert not run.exists("a")
    run.delete("a")
    with pytest.raises(FileNotFoundError):
        run.read_bytes("a")
    run.write_bytes("a/b", b"")
    assert run.exists("a")
    assert run.exists("a/b")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_what_to_do(run: RunDirectory, number: int) -> None:
    full = failing(run, number)
    message = rf"no space left to write {re.escape(run.path('a/b'))}: free some, .* --storage-path"
    with pytest.raises(UserError, match=message):
        full.write_bytes("a/b", b"a long text")
    with pytest.raises(UserError, match="no space left"):
        full.write_table("a/c.parquet", pa.table({"x": [1]}))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_the_old_file_and_no_half_one(run: RunDirectory, number: int) -> None:
    run.write_bytes("a", b"old")
    with pytest.raises((OSError, UserError)):
        failing(run, number).write_bytes("a", b"a long new text")
    assert run.read_bytes("a") == b"old"
    assert files(Path(run.root)) == ["a"]  # nor a temporary one, which would go on filling the disk


def test_a_write_to_a_place_that_is_taken_leaves_it_as_it_was(run: RunDirectory) -> None:
    run.write_bytes("taken/file", b"1")
    with pytest.raises(OSError, match="taken"):
        run.write_bytes("taken", b"2")  # a directory stands there
    with pytest.raises(OSError, match="taken/file"):
        run.write_bytes("taken/file/below", b"2")  # a file stands where a directory should
    assert files(Path(run.root)) == ["taken/file"]


def test_another_failure_stays_the_error_it_is(run: RunDirectory) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        failing(run, errno.EIO).write_bytes("a", b"a long text")
    assert caught.value.errno == errno.EIO
    assert caught.value.__cause__ is not caught.value  # a chain that bites its tail hangs whoever walks along it


class Storage:
    """Away for `away_s` of a clock that only pauses move."""

    def __init__(self, away_s: float, error: OSError) -> None:
        self.now_s, self.away_s, self.error = 0.0, away_s, error
        self.pauses: list[float] = []

    def read(self) -> str:
        if self.now_s < self.away_s:
            raise self.error
        return "read"

    def sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        self.now_s += pause_s

    def asked(self, patience_s: float) -> str:
        return patiently(self.read, patience_s, lambda: self.now_s, self.sleep)


AWAY = OSError(errno.ESTALE, "Stale file handle")


@given(away_s=st.floats(0, 300))
def test_a_storage_that_comes_back_in_time_is_only_late(away_s: float) -> None:
    storage = Storage(away_s, AWAY)
    assert storage.asked(patience_s=300) == "read"
    assert storage.now_s <= away_s + MAX_PAUSE_S
    assert storage.pauses == sorted(storage.pauses)


@given(patience_s=st.floats(0, 300))
def test_patience_ends_with_the_storage_s_own_error(patience_s: float) -> None:
    storage = Storage(10_000, AWAY)
    with pytest.raises(OSError, match="Stale") as caught:
        storage.asked(patience_s)
    assert caught.value is AWAY
    assert patience_s <= storage.now_s <= patience_s + MAX_PAUSE_S


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file"),
        PermissionError(errno.EACCES, "denied"),
        OSError(errno.ENOSPC, "full"),
        OSError(
            "When getting information for key 'a' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation"
        ),
    ],
)
def test_what_does_not_pass_is_an_error_at_once(error: OSError) -> None:
    storage = Storage(10, error)
    with pytest.raises(type(error)):
        storage.asked(patience_s=300)
    assert not storage.pauses


def test_a_store_that_nobody_can_reach_is_one_that_may_come_back() -> None:
    """In the words of the SDK that pyarrow uses now."""
    retries = pa.fs.AwsStandardS3RetryStrategy(max_attempts=1)
    store = pa.fs.S3FileSystem(
        access_key="a", secret_key="b", endpoint_override="127.0.0.1:9", scheme="http", retry_strategy=retries
    )
    with pytest.raises(OSError, match="AWS") as caught:
        store.get_file_info("bucket/key")
    assert is_passing(caught.value)


def write_model(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


def test_an_upload_replaces_the_whole_directory(run: RunDirectory, tmp_path: Path) -> None:
    run.upload(write_model(tmp_path / "first", "config.json", "shards/1", "shards/2"), "train/model")
    assert files(Path(run.path("train/model"))) == ["config.json", "shards/1", "shards/2"]
    run.upload(write_model(tmp_path / "second", "config.json", "shards/1"), "train/model")
    assert files(Path(run.root)) == ["train/model/config.json", "train/model/shards/1"]
    assert run.read_bytes("train/model/shards/1") == b"shards/1"


def test_a_failed_upload_leaves_the_old_directory_and_no_half_one(run: RunDirectory, tmp_path: Path) -> None:
    run.upload(write_model(tmp_path / "first", "config.json"), "train/model")
    with pytest.raises(UserError, match=r"no space left to write .*train/model.*--storage-path"):
        failing(run, errno.ENOSPC).upload(write_model(tmp_path / "second", "other.json"), "train/model")
    assert files(Path(run.root)) == ["train/model/config.json"]


def test_paths_are_absolute_and_below_storage_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_run("runs", "mine").root == f"{tmp_path}/runs/mine"
    assert open_run("~/runs", "mine").root == f"{tmp_path}/home/runs/mine"
    for storage in (f"{tmp_path}/runs", f"{tmp_path}/runs/", f"file://{tmp_path}/runs", f"file://{tmp_path}/runs/"):
        assert open_run(storage, "mine") == open_run("runs", "mine")
    assert not (tmp_path / "runs").exists()


def test_a_submitted_job_may_not_write_below_its_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"'runs' is relative: .*absolute path.*--storage-path"):
        open_run("runs", "mine")
    assert open_run(str(tmp_path), "mine").root == f"{tmp_path}/mine"
    assert open_run("~/runs", "mine").root.endswith("/runs/mine")
    assert open_run("mock:///bucket", "mine").root == "bucket/mine"


@pytest.mark.parametrize("uri", ["nope://x", "file://runs/x", "://", "file:///a b", "s3://bucket/x?no=1", "s3://"])
def test_a_uri_that_cannot_be_opened_is_named(uri: str) -> None:
    with pytest.raises(UserError, match=rf"storage_path {re.escape(uri)} cannot be opened"):
        open_run(uri, "mine")


def test_a_reference_to_a_model_is_what_any_node_can_open(run: RunDirectory) -> None:
    assert run.reference("train/model", "0a") == f"{run.root}/train/model"
    remote = open_run("s3://bucket/runs/?region=eu-west-1", "mine")
    assert remote.root == "bucket/runs/mine"
    assert remote.reference("train/model", "0a") == "s3://bucket/runs/mine/train/model?region=eu-west-1#0a"


def test_a_stage_is_new_then_resumed_then_done(run: RunDirectory) -> None:
    new = begin_stage(run, config(), "generate", INPUTS)
    assert new.manifest is None
    resumed = begin_stage(run, config(), "generate", INPUTS)
    assert resumed.manifest is None
    with pytest.raises(UserError, match=r"stage generate of .*mine is not done: run jobs/generate\.py"):
        finished(run, "generate")

    written = resumed.finish({"kept": 3}, {"dataset.parquet": "4567"})
    done = begin_stage(run, config(), "generate", INPUTS)
    assert done.manifest == finished(run, "generate") == written
    assert (written["counts"], written["inputs"]) == ({"kept": 3}, INPUTS)
    assert written["outputs"] == {"dataset.parquet": "4567"}
    assert written["wall_time_s"] >= 0
    assert written["versions"]["pyarrow"] == pa.__version__


@pytest.mark.parametrize("done", [False, True])
def test_another_config_is_refused_by_exactly_the_fields_that_differ(run: RunDirectory, done: bool) -> None:
    stage = begin_stage(run, config("--generate.seed", "1"), "generate", INPUTS)
    if done:
        stage.finish({}, {})
    before = run.read_bytes("config.yaml")
    other = config("--generate.seed", "2", "--generate.teacher.model", "x", "--generate.num-actors", "9")
    with pytest.raises(UserError) as caught:
        begin_stage(run, other, "generate", INPUTS)
    named = re.findall(r"^  (\S+): (.*) there, (.*) now$", str(caught.value), re.MULTILINE)
    assert named == [("generate.seed", "1", "2"), ("generate.teacher.model", "'smollm2-135m'", "'x'")]
    assert run.root in str(caught.value)
    assert "--name" in str(caught.value)
    assert run.read_bytes("config.yaml") == before


@pytest.mark.parametrize("done", [False, True])
def test_another_input_is_refused_with_both_hashes(run: RunDirectory, done: bool) -> None:
    stage = begin_stage(run, config(), "generate", INPUTS)
    if done:
        stage.finish({}, {})
    with pytest.raises(UserError, match=r"input\.seed_tasks: '0123' there, '89ab' now"):
        begin_stage(run, config(), "generate", {"seed_tasks": "89ab"})


@pytest.mark.parametrize("done", [False, True])
def test_an_operational_change_is_allowed(run: RunDirectory, done: bool) -> None:
    stage = begin_stage(run, config(), "generate", INPUTS)
    if done:
        stage.finish({}, {})
    changed = config("--generate.num-actors", "9", "--generate.placement.num-cpus", "2", "--generate.max-requests", "7")
    assert (begin_stage(run, changed, "generate", INPUTS).manifest is not None) == done


def test_the_config_of_another_stage_may_change_until_that_stage_begins(run: RunDirectory) -> None:
    begin_stage(run, config(), "generate", INPUTS)
    begin_stage(run, config("--train.seed", "5"), "generate", INPUTS)
    begin_stage(run, config("--train.seed", "6"), "train", {})
    begin_stage(run, config("--train.seed", "6"), "generate", INPUTS)
    with pytest.raises(UserError, match=r"train\.seed: 6 there, 7 now"):
        begin_stage(run, config("--train.seed", "7"), "train", {})
    with pytest.raises(UserError, match=r"generate\.seed: 0 there, 7 now"):
        begin_stage(run, config("--generate.seed", "7"), "generate", INPUTS)


def test_a_run_that_is_stopped_before_its_manifest_is_not_done(run: RunDirectory) -> None:
    stage = begin_stage(run, config(), "generate", INPUTS)
    run.write_json(stage.path("alpaca_data.json"), [])
    on_a_full_disk = dataclasses.replace(stage, run=failing(run, errno.ENOSPC))
    with pytest.raises(UserError, match="no space left"):
        on_a_full_disk.finish({}, {})
    assert begin_stage(run, config(), "generate", INPUTS).manifest is None


@pytest.mark.parametrize("recipe", ["tiny_cpu", "alpaca_7b"])
def test_a_resumed_stage_finds_its_own_config_unchanged(run: RunDirectory, recipe: str) -> None:
    for value in ("2e-5", "1e-7", "1e20", "3"):  # how YAML writes a number must not look like a change
        arguments = ["--recipe", recipe, "--name", f"run{value}", "--train.learning-rate", value]
        mine = RunDirectory(run.fs, f"{run.root}{value}")
        begin_stage(mine, load_config(arguments), "train", {})
        assert begin_stage(mine, load_config(arguments), "train", {}).manifest is None


cells = st.none() | st.text(max_size=3)
tables = st.lists(st.tuples(cells, st.none() | st.integers(-5, 5)), max_size=6)


def as_table(rows: list[tuple[str | None, int | None]]) -> pa.Table:
    schema = pa.schema([("a", pa.string()), ("b", pa.int64())])
    return pa.Table.from_pylist([{"a": a, "b": b} for a, b in rows], schema=schema)


@settings(deadline=None, max_examples=100)
@given(tables, tables)
def test_tables_have_equal_hashes_only_if_their_rows_are_equal(
    first: list[tuple[str | None, int | None]], second: list[tuple[str | None, int | None]]
) -> None:
    assert (table_hash(as_table(first)) == table_hash(as_table(second))) == (first == second)


def test_the_order_of_rows_counts() -> None:
    assert table_hash(as_table([("x", 1), ("y", 2)])) != table_hash(as_table([("y", 2), ("x", 1)]))
    assert table_hash(as_table([("", 1)])) != table_hash(as_table([(None, 1)]))


def test_how_a_table_is_cut_and_compressed_does_not_count(run: RunDirectory) -> None:
    import pyarrow.parquet as pq

    table = as_table([(f"row {i % 7}", i) for i in range(100)])
    cut = pa.concat_tables([table.slice(0, 1), table.slice(1, 40), table.slice(41)])
    assert cut["a"].num_chunks == 3
    hashes = {table_hash(table), table_hash(cut)}
    Path(run.root).mkdir(parents=True)
    for codec in ("none", "snappy", "zstd"):
        pq.write_table(cut, run.path(codec), compression=codec, row_group_size=30)
        hashes.add(table_hash(run.read_table(codec)))
    assert len(hashes) == 1
