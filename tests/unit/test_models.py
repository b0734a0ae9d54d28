"""Where a model comes from: every wrong reference is an error with a remedy, and the cache is filled once."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alpaca_ray.config import UserError
from alpaca_ray.models import (
    EMBEDDED,
    cache_dir,
    cached,
    check,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
)


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def listing(directory: Path) -> set[str]:
    """What lies in the cache, lock files aside."""
    return {path.name for path in directory.iterdir() if path.suffix != ".lock"} if directory.is_dir() else set()


@pytest.mark.parametrize("reference", ["/no/such/place", "no-such-model", "a/b/c", "", "a b/c", "../no-such-directory"])
def test_a_path_that_is_none_is_no_model(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        load_config(reference)


@pytest.mark.parametrize("reference", ["/no/such/place", "no-such-model", "a/b/c", "a b/c"])
def test_a_reference_of_no_known_form_says_which_there_are(reference: str) -> None:
    with pytest.raises(UserError, match=rf"'{reference}' is no model: .*config\.json.*URI.*hub id.*{EMBEDDED}"):
        resolve(reference)


def test_a_file_and_a_directory_without_a_config_are_no_models(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no model"):
        resolve(str(tiny_model / "config.json"))
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))} is a directory .* config\.json is missing"):
        resolve(str(tmp_path))


def test_an_unknown_embedded_model_names_the_one_there_is() -> None:
    with pytest.raises(UserError, match=f"no embedded model 'embedded:smollm': there is '{EMBEDDED}'"):
        resolve("embedded:smollm")


def test_directories_and_hub_ids_pass_as_they_are(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tiny_model)) == str(tiny_model)
    assert resolve("huggyllama/llama-7b") == "huggyllama/llama-7b"
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert resolve(f"~/{tiny_model.name}") == str(tiny_model)
    assert not cache_dir().exists()


def test_a_uri_is_fetched_into_the_cache_once(broken: Path) -> None:
    reference = broken.as_uri()
    here = Path(resolve(reference))
    assert here.parent == cache_dir()
    assert {path.name for path in here.iterdir()} == {path.name for path in broken.iterdir()}
    shutil.rmtree(broken)
    assert resolve(reference) == str(here)
    assert listing(cache_dir()) == {here.name}


def test_another_version_of_a_uri_is_fetched_anew(broken: Path) -> None:
    first = Path(resolve(f"{broken.as_uri()}#one"))
    (broken / "config.json").write_text("{}")
    second = Path(resolve(f"{broken.as_uri()}#two"))
    assert (second / "config.json").read_text() == "{}"
    assert (first / "config.json").read_text() != "{}"


@pytest.mark.parametrize("uri", ["nope://x", "file:///no/such/directory", "file:///a b"])
def test_a_uri_that_leads_nowhere_is_named_and_leaves_nothing(uri: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(uri)} (cannot be fetched|holds no model)"):
        resolve(uri)
    assert listing(cache_dir()) == set()


def test_a_uri_of_a_directory_without_a_model_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no model: config\.json is missing"):
        resolve((tmp_path / "empty").as_uri())
    assert listing(cache_dir()) == set()


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPACA_RAY_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("ALPACA_RAY_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tmp_path in cache_dir().parents
    assert cache_dir().name == "alpaca_ray"


MAKER = """
import sys, time
from pathlib import Path
from alpaca_ray.models import cached

def make(target: Path) -> None:
    with open("made", "a") as made:
        made.write("x")
    (target / "first").write_text("half")
    time.sleep(0.3)
    (target / "second").write_text("done")

Path(f"ready-{sys.argv[1]}").touch()
while not (Path("ready-0").exists() and Path("ready-1").exists()):
    time.sleep(0.005)
directory = cached("shared", make, bytes_needed=0)
print((directory / "second").read_text(), directory)
"""


def test_two_processes_at_once_make_it_once_and_both_get_it_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKER]
    makers = [
        subprocess.Popen([*command, str(i)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    answers = [maker.communicate(timeout=60) for maker in makers]
    assert answers == [(f"done {cache_dir() / 'shared'}\n", "")] * 2
    assert (tmp_path / "made").read_text() == "x"
    assert listing(cache_dir()) == {"shared"}


def test_what_fails_to_be_made_leaves_nothing_and_can_be_tried_again() -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("half")
        raise RuntimeError("the connection broke")

    with pytest.raises(RuntimeError, match="the connection broke"):
        cached("model", fail, bytes_needed=0)
    assert listing(cache_dir()) == set()
    assert listing(cached("model", lambda target: (target / "whole").touch(), bytes_needed=0)) == {"whole"}


def test_it_asks_for_space_before_it_makes_anything() -> None:
    made: list[Path] = []
    message = rf"{re.escape(str(cache_dir()))} has no space: model needs 2\.5 GB\. .*ALPACA_RAY_CACHE"
    with pytest.raises(UserError, match=message):
        cached("model", made.append, bytes_needed=2_500_000_000, free_bytes=lambda path: 2_499_999_999)
    assert not made
    cached("model", made.append, bytes_needed=2_500_000_000, free_bytes=lambda path: 2_500_000_000)
    assert len(made) == 1
    cached("model", made.append, bytes_needed=2_500_000_000, free_bytes=lambda path: 0)  # it is there already
    assert len(made) == 1


def test_a_model_and_its_tokenizer_load(tiny_model: Path) -> None:
    check(str(tiny_model))
    assert load_config(str(tiny_model)).hidden_size == 32
    tokenizer = load_tokenizer(str(tiny_model))
    assert tokenizer.decode(tokenizer("Olé {x}").input_ids) == "Olé {x}"
    for dtype, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_model(tiny_model.as_uri(), dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("content", ["{}", "{bad", '{"model_type": "no-such-type"}'])
def test_a_config_of_no_known_model_is_a_user_error(broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(broken))):
        check(str(broken))


@pytest.mark.parametrize("content", [None, b"cut off"])
def test_missing_or_torn_weights_are_a_user_error(broken: Path, content: bytes | None) -> None:
    os.remove(broken / "model.safetensors")
    if content is not None:
        (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(broken))):
        load_model(str(broken), "float32")


@pytest.mark.parametrize("content", [None, b"{bad"])
def test_a_missing_or_torn_tokenizer_is_a_user_error(broken: Path, content: bytes | None) -> None:
    os.remove(broken / "tokenizer.json")
    if content is not None:
        (broken / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(broken))):
        load_tokenizer(str(broken))
