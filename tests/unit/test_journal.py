"""What was answered is read back whole; what a crash, a full disk or a bad sector left is skipped, and nothing else."""

import asyncio
import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.fs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.artifacts import RunDirectory, open_run
from alpaca_ray.provider.journal import Cost, Journal, Writer
from alpaca_ray.schema import Completion
from tests.faults.away import open_away

DIRECTORY = "generate/journal"
WORST = Cost(100, 0.25)

texts = st.text(max_size=200)


def local(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path), "run")


def object_store(tmp_path: Path) -> RunDirectory:
    """A filesystem that is not pyarrow's local one, as S3 and GCS are not: parts instead of appending."""
    base = tmp_path / "store"
    base.mkdir()
    return RunDirectory(pyarrow.fs.SubTreeFileSystem(str(base), pyarrow.fs.LocalFileSystem()), "run")


STORES = pytest.mark.parametrize("store", [local, object_store])


def completion(text: str | None, tokens: int = 10, usd: float = 0.5) -> Completion:
    return Completion(text, None if text is not None else "content_filter", prompt_tokens=tokens, usd=usd)


async def answer(writer: Writer, key: str, said: Completion) -> None:
    await writer.answered(key, writer.sent(key, WORST), said)


def write(run: RunDirectory, answers: dict[str, Completion]) -> None:
    async def all_at_once() -> None:
        writer = Writer(run, DIRECTORY)
        await asyncio.gather(*(answer(writer, key, said) for key, said in answers.items()))

    asyncio.run(all_at_once())


def files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.rglob("*.journal"))


@settings(max_examples=25, deadline=None)
@given(answers=st.dictionaries(texts, texts | st.none(), max_size=8))
def test_every_answer_comes_back(answers: dict[str, str | None], tmp_path_factory: pytest.TempPathFactory) -> None:
    run = local(tmp_path_factory.mktemp("journal"))
    said = {key: completion(text) for key, text in answers.items()}
    write(run, said)
    journal = Journal(run, DIRECTORY)
    assert {key: journal.answer(key) for key in said} == said
    assert journal.sent_keys() == said.keys()
    assert journal.in_flight() == []
    assert (journal.spent.tokens, journal.spent.usd) == (10 * len(said), 0.5 * len(said))


def test_an_unknown_key_has_no_answer_and_an_empty_place_no_journal(tmp_path: Path) -> None:
    assert Journal(local(tmp_path), DIRECTORY).answer("nothing") is None


@STORES
def test_writers_do_not_disturb_each_other_and_refresh_sees_what_is_new(store: object, tmp_path: Path) -> None:
    run = store(tmp_path)  # type: ignore[operator]
    write(run, {"a": completion("1")})
    journal = Journal(run, DIRECTORY)
    write(run, {"b": completion("2"), "c": completion("3")})
    assert journal.answer("b") is None
    journal.refresh()
    assert [journal.answer(key) for key in "abc"] == [completion(text) for text in "123"]
    assert journal.spent.tokens == 30


def test_what_was_sent_and_never_heard_of_is_in_flight_until_it_fails_or_is_answered(tmp_path: Path) -> None:
    run = local(tmp_path)
    writer = Writer(run, DIRECTORY)
    first, second = writer.sent("a", WORST), writer.sent("a", WORST)
    writer.sent("b", WORST)
    assert len(Journal(run, DIRECTORY).in_flight()) == 3
    writer.failed("a", first, "timeout", WORST)
    asyncio.run(writer.answered("a", second, completion("1", tokens=7, usd=0.125)))
    journal = Journal(run, DIRECTORY)
    assert journal.in_flight() == [WORST]
    assert journal.sent_keys() == {"a", "b"}
    assert (journal.spent.tokens, journal.spent.usd) == (107, 0.375)


@given(cut=st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_a_torn_tail_is_skipped_and_nothing_before_it(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("torn")
    run = local(tmp_path)
    write(run, {"a": completion("first")})
    [file] = files(tmp_path)
    whole = file.stat().st_size
    writer = Writer(run, DIRECTORY)
    asyncio.run(answer(writer, "b", completion("second" * 20)))
    [last] = [path for path in files(tmp_path) if path != file]
    data = file.read_bytes() + last.read_bytes()
    last.unlink()
    file.write_bytes(data[: min(whole + cut, len(data))])
    journal = Journal(run, DIRECTORY)
    assert journal.answer("a") == completion("first")
    assert journal.answer("b") in (None, completion("second" * 20))
    file.write_bytes(data)  # the rest arrives, as on NFS
    journal.refresh()
    assert journal.answer("b") == completion("second" * 20)


def test_a_damaged_line_costs_no_other(tmp_path: Path) -> None:
    run = local(tmp_path)
    write(run, {"a": completion("first"), "b": completion("second"), "c": completion("third")})
    [file] = files(tmp_path)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"second", b"sec\x00nd", 1))
    journal = Journal(run, DIRECTORY)
    assert [journal.answer(key) for key in "abc"] == [completion("first"), None, completion("third")]


def test_an_answer_outlives_the_kill_of_its_writer(tmp_path: Path) -> None:
    """The process kills itself right after `answered` has returned, with another request on the way."""
    program = f"""
import asyncio, os, signal
from tests.unit.test_journal import *
async def main():
    writer = Writer(open_run({str(tmp_path)!r}, "run"), DIRECTORY)
    await answer(writer, "a", completion("kept"))
    writer.sent("b", WORST)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    journal = Journal(local(tmp_path), DIRECTORY)
    assert journal.answer("a") == completion("kept")
    assert journal.in_flight() == [WORST]


def test_a_full_disk_is_an_error_and_spoils_no_later_line(tmp_path: Path) -> None:
    run = local(tmp_path)
    writer = Writer(run, DIRECTORY)
    asyncio.run(answer(writer, "a", completion("small")))
    [file] = files(tmp_path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 300, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"space|large"):
            asyncio.run(answer(writer, "b", completion("large" * 1000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    asyncio.run(answer(writer, "c", completion("after")))
    journal = Journal(run, DIRECTORY)
    assert [journal.answer(key) for key in "abc"] == [completion("small"), None, completion("after")]


async def is_held_back(writer: Writer) -> bool:
    try:
        await asyncio.wait_for(writer.ready(), 0.05)
    except TimeoutError:
        return True
    return False


def test_an_answer_waits_for_a_storage_that_is_away_and_nothing_else_goes_out(tmp_path: Path) -> None:
    """About 2 s: an object store's writer gathers for one."""
    flag = tmp_path / "away"
    run = open_away(tmp_path, "run", flag)

    async def outage() -> None:
        writer = Writer(run, DIRECTORY, stall_s=0.0)
        assert not await is_held_back(writer)
        flag.touch()
        filing = asyncio.create_task(answer(writer, "a", completion("1")))
        async with asyncio.timeout(60):
            while not await is_held_back(writer):
                assert not filing.done()
            flag.unlink()
            await filing
            await writer.ready()

    asyncio.run(outage())
    journal = Journal(run, DIRECTORY)
    assert journal.answer("a") == completion("1")
    assert (journal.spent.tokens, journal.in_flight()) == (10, [])


class SyncFails:
    """A sink whose first sync fails after the line was written, as on a network filesystem."""

    gather_s = 0.0

    def __init__(self, writer: Writer) -> None:
        self._sink, self._fails = writer._sink, True

    def append(self, data: bytes) -> None:
        self._sink.append(data)

    def write_durably(self, data: bytes) -> None:
        if self._fails:
            self._fails = False
            self._sink.append(data)
            raise OSError(errno.EIO, "no answer")
        self._sink.write_durably(data)


def test_an_answer_that_was_written_again_was_paid_for_once(tmp_path: Path) -> None:
    run = local(tmp_path)

    async def twice() -> None:
        writer = Writer(run, DIRECTORY)
        writer._sink = SyncFails(writer)
        await answer(writer, "a", completion("1"))
        await answer(writer, "b", completion("2"))

    asyncio.run(twice())
    [file] = files(tmp_path)
    assert file.read_bytes().count(b'"answered"') == 3
    journal = Journal(run, DIRECTORY)
    assert [journal.answer(key) for key in "ab"] == [completion("1"), completion("2")]
    assert journal.spent.tokens == 20


def test_patience_ends(tmp_path: Path) -> None:
    flag = tmp_path / "away"
    run = dataclasses.replace(open_away(tmp_path, "run", flag), patience_s=0.0)

    async def outage() -> None:
        writer = Writer(run, DIRECTORY)
        flag.touch()
        await answer(writer, "a", completion("1"))

    with pytest.raises(OSError, match="the storage is away"):
        asyncio.run(outage())


def test_a_line_can_be_read_by_hand(tmp_path: Path) -> None:
    """docs/operations.md: cut -c10- FILE | jq"""
    write(local(tmp_path), {"a": completion("Bär")})
    [file] = files(tmp_path)
    records = [json.loads(line[9:]) for line in file.read_text().splitlines()]
    assert [record["kind"] for record in records] == ["sent", "answered"]
    assert records[1]["completion"]["text"] == "Bär"
    assert file.name.split("-")[-2] == str(os.getpid())
