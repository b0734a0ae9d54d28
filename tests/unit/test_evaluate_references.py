"""How the trained model is named to a worker on another node."""

from pathlib import Path

import pyarrow.fs

from alpaca_ray import models
from alpaca_ray.artifacts import RunDirectory, open_run


def test_on_a_local_filesystem_it_is_a_path(tmp_path: Path) -> None:
    for storage in (str(tmp_path), tmp_path.as_uri()):
        assert open_run(storage, "run").reference("train/model", "abc") == str(tmp_path / "run" / "train/model")


def test_elsewhere_it_is_a_uri_that_keeps_its_options() -> None:
    run = open_run("s3://bucket/runs?endpoint_override=localhost:9&region=eu", "run")
    expected = "s3://bucket/runs/run/train/model?endpoint_override=localhost:9&region=eu#abc"
    assert run.reference("train/model", "abc") == expected


def test_a_model_made_anew_at_the_same_uri_is_fetched_anew(tmp_path: Path) -> None:
    run = RunDirectory(pyarrow.fs.LocalFileSystem(), str(tmp_path), uri=tmp_path.as_uri())
    fetched = []
    for content in ("{}", '{"new": 1}'):
        run.write_bytes("train/model/config.json", content.encode())
        directory = Path(models.resolve(run.reference("train/model", f"hash of {content}")))
        fetched.append((directory / "config.json").read_text())
    assert fetched == ["{}", '{"new": 1}']
