"""Task files: a broken line is named by file, line and field; equal rows have equal hashes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alpaca_ray.config import UserError
from alpaca_ray.schema import Example, as_examples, content_hash, read_evaluation_tasks, read_seed_tasks


def seed(**changes: Any) -> dict[str, Any]:
    row = {
        "id": "a",
        "name": "first",
        "instruction": "Name three rivers of Europe.",
        "instances": [{"input": "", "output": "Rhine, Danube, Loire"}],
        "is_classification": False,
    }
    return row | changes


def evaluation(**changes: Any) -> dict[str, Any]:
    row = seed(motivation_app="Notes", **changes)
    return {name: row[name] for name in ("id", "motivation_app", "instruction", "instances")}


def without(row: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != field}


def write(directory: Path, *lines: str | dict[str, Any], end: str = "\n") -> str:
    path = directory / "tasks.jsonl"
    text = end.join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_bytes(text.encode())
    return str(path)


BROKEN: list[tuple[str | dict[str, Any], str, str]] = [
    *((without(seed(), field), field, "required") for field in seed()),
    (seed(is_classification="perhaps"), "is_classification", "boolean"),
    (seed(instruction=7), "instruction", "string"),
    (seed(instruction=""), "instruction", "at least 1"),
    (seed(id=""), "id", "at least 1"),
    (seed(instances="none"), "instances", "array|tuple"),
    (seed(instances=[]), "instances", "at least 1"),
    (seed(instances=[{"input": "", "output": ""}]), "instances.0.output", "at least 1"),
    (seed(instances=[{"output": "x"}]), "instances.0.input", "required"),
    (seed(instances=[{"input": None, "output": "x"}]), "instances.0.input", "string"),
]


@pytest.mark.parametrize(("line", "field", "message"), BROKEN)
def test_a_broken_line_is_named_by_file_line_and_field(
    tmp_path: Path, line: str | dict[str, Any], field: str, message: str
) -> None:
    path = write(tmp_path, seed(id="fine"), "", line)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}, line 3, field {re.escape(field)}: .*(?i:{message})"):
        read_seed_tasks(path)


@pytest.mark.parametrize("line", ["{not JSON", '{"id": "b"', '["a list"]', "7", "{} {}"])
def test_a_line_that_is_no_object_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, seed(), line)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}, line 2\b.*: "):
        read_seed_tasks(path)


def test_a_second_task_of_the_same_id_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, seed(id="x"), seed(id="y"), "", seed(id="x"))
    with pytest.raises(UserError, match=rf"^{re.escape(path)}, line 4, field id: 'x' stands already on line 1"):
        read_seed_tasks(path)


@pytest.mark.parametrize("read", [read_seed_tasks, read_evaluation_tasks])
def test_a_file_without_tasks_is_refused(tmp_path: Path, read: Callable[[str], Any]) -> None:
    empty = write(tmp_path, "", "   ", "")
    for path, message in ((empty, "holds no tasks"), (str(tmp_path / "none"), "does not exist"), (str(tmp_path), "")):
        with pytest.raises(UserError, match=f"^{re.escape(path)}.*{message}"):
            read(path)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(seed(instruction="Décris un café."), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*UTF-8"):
        read_seed_tasks(str(path))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_rows_are_read_in_order_whatever_the_blank_lines(tmp_path: Path, end: str) -> None:
    tasks = read_seed_tasks(write(tmp_path, *(seed(id=str(i)) for i in range(5)), "", end=end))
    assert [task.id for task in tasks] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\x0c"])
def test_a_unicode_line_break_inside_a_string_ends_no_row(tmp_path: Path, character: str) -> None:
    text = f"Name a{character}river."
    raw = character if character not in "\x1c\x0b\x0c" else json.dumps(character)[1:-1]  # control characters: escaped
    line = json.dumps(seed(instruction="Name a@river."), ensure_ascii=False).replace("@", raw)
    tasks = read_seed_tasks(write(tmp_path, line))
    assert [task.instruction for task in tasks] == [text]


def test_fields_of_self_instruct_that_are_not_ours_are_ignored(tmp_path: Path) -> None:
    assert read_seed_tasks(write(tmp_path, seed(template="x"))) == read_seed_tasks(write(tmp_path, seed()))


def test_the_first_instance_becomes_the_example(tmp_path: Path) -> None:
    instances = [{"input": "in", "output": "out"}, {"input": "second", "output": "other"}]
    seeds = read_seed_tasks(write(tmp_path, seed(instances=instances)))
    assert as_examples(seeds) == [Example("a", "Name three rivers of Europe.", "in", "out")]
    tasks = read_evaluation_tasks(write(tmp_path, evaluation(instances=instances)))
    assert as_examples(tasks) == as_examples(seeds)


def test_equal_rows_have_equal_hashes_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    rows = [seed(id="1"), seed(id="2")]
    here = read_seed_tasks(write(tmp_path, *rows))
    there = read_seed_tasks(write(tmp_path / "other", *(dict(reversed(row.items())) for row in rows), "", end="\n\n"))
    assert content_hash(here) == content_hash(there)
    assert re.fullmatch("[0-9a-f]{16}", content_hash(here))


def test_rows_that_differ_in_anything_have_other_hashes(tmp_path: Path) -> None:
    first, second = seed(id="1"), seed(id="2")
    variants: list[list[dict[str, Any]]] = [
        [first, second],
        [second, first],
        [first],
        [first, second | {"name": "x"}],
        [first, second | {"is_classification": True}],
        [first, second | {"instances": [{"input": "x", "output": "Rhine, Danube, Loire"}]}],
    ]
    hashes = [content_hash(read_seed_tasks(write(tmp_path, *rows))) for rows in variants]
    assert len(set(hashes)) == len(variants)


def test_dataclass_rows_are_hashed_by_value() -> None:
    rows = [Example("a", "b", "", "c")]
    assert content_hash(rows) == content_hash([Example("a", "b", "", "c")])
    assert content_hash(rows) != content_hash([Example("a", "b", "c", "")])
