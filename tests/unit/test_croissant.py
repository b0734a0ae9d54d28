"""The Croissant file, read by MLCommons' own loader beside the files it describes."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import mlcroissant
import pyarrow.parquet as pq
import pytest

from alpaca_ray.config import GenerateConfig
from alpaca_ray.generate.croissant import COLUMNS, croissant
from alpaca_ray.generate.record import FileInfo, Record
from alpaca_ray.schema import DATASET_SCHEMA
from tests.record import make_record

# The date of publication is the publisher's to say.
ONLY_WARNING = "datePublished"


def described(path: Path) -> FileInfo:
    data = path.read_bytes()
    return FileInfo(len(data), hashlib.sha256(data).hexdigest())


def write(record: Record, folder: Path) -> mlcroissant.Dataset:
    """The files of a record and their description, then the description as the loader takes it."""
    pq.write_table(record.dataset, folder / "dataset.parquet")
    alpaca_data = record.dataset.select(["instruction", "input", "output"]).to_pylist()
    (folder / "alpaca_data.json").write_text(json.dumps(alpaca_data))
    files = {name: described(folder / name) for name in ("dataset.parquet", "alpaca_data.json")}
    (folder / "croissant.json").write_text(json.dumps(croissant(dataclasses.replace(record, files=files))))
    return mlcroissant.Dataset(str(folder / "croissant.json"))


def plain(value: Any) -> Any:
    """A record of the loader with text as text and names without the record set."""
    if isinstance(value, dict):
        return {key.rpartition("/")[2]: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


def test_it_is_valid_and_warns_of_nothing_but_the_date_of_publication(tmp_path: Path) -> None:
    issues = write(make_record(), tmp_path).metadata.ctx.issues
    assert not issues.errors
    assert [warning for warning in issues.warnings if ONLY_WARNING not in warning] == []


def test_the_loader_gives_the_rows_back(tmp_path: Path) -> None:
    record = make_record()
    rows = [plain(row) for row in write(record, tmp_path).records("rows")]
    assert rows == record.dataset.to_pylist()


def test_the_loader_gives_the_rows_of_alpaca_data_back(tmp_path: Path) -> None:
    record = make_record(30)
    rows = [plain(row) for row in write(record, tmp_path).records("alpaca_data")]
    assert rows == record.dataset.select(["instruction", "input", "output"]).to_pylist()


def test_without_similarity_its_columns_are_left_out(tmp_path: Path) -> None:
    record = make_record(30, config=GenerateConfig(num_instructions=5, similarity=False))
    rows = [plain(row) for row in write(record, tmp_path).records("rows")]
    assert rows == record.dataset.drop_columns(["most_similar", "mean_rouge_l"]).to_pylist()


def test_every_column_is_described() -> None:
    assert set(DATASET_SCHEMA.names) == {*COLUMNS, "most_similar"}
    fields = croissant(make_record(5))["recordSet"][0]["field"]
    assert [field["name"] for field in fields] == [*COLUMNS, "most_similar"]


def test_paths_are_relative_and_the_same_record_gives_the_same_file() -> None:
    first, second = croissant(make_record()), croissant(make_record())
    assert json.dumps(first) == json.dumps(second)
    assert [file["contentUrl"] for file in first["distribution"]] == ["dataset.parquet", "alpaca_data.json"]


def test_what_only_a_publisher_knows_is_not_invented() -> None:
    document = croissant(make_record(5))
    assert not {"datePublished", "url", "publisher", "creator"} & set(document)
    assert "publisher" in document["license"]


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match=r"alpaca_data\.json"):
        croissant(make_record(5, files={"dataset.parquet": FileInfo(1, "a")}))
