"""API keys: made, kept as hashes, found again, changed while the server runs; never shown."""

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.cli import main
from alpaca_ray.config import AdmissionConfig, UserError
from alpaca_ray.serve.keys import CHECK_EVERY_S, PREFIX, Keys, find_key, load_keys, make_key, parse_keys, read_keys

CANARY = "sk-alpaca-canary-of-this-test"


def test_a_made_key_is_found_by_its_line_and_only_it() -> None:
    ours, other = make_key("ours", ["generate", "detect"], 5, 700), make_key("other", ["admin"])
    keys = parse_keys(f"# of the team\n\n{ours.line}\n{other.line}\n", "here")

    found = find_key(keys, ours.secret)

    assert found is not None
    assert found.name == "ours"
    assert found.scopes == {"generate", "detect"}
    assert (found.requests_per_minute, found.tokens_per_minute) == (5, 700)
    assert find_key(keys, other.secret) == keys[1]
    assert find_key(keys, ours.secret[:-1]) is find_key(keys, "") is find_key((), ours.secret) is None


@settings(deadline=None)
@given(st.text(max_size=80))
def test_no_other_text_is_a_key(text: str) -> None:
    new = make_key("ours", ["generate"], random_bytes=bytes)
    assert (find_key(parse_keys(new.line, "here"), text) is not None) == (text == new.secret)


def test_keys_are_256_random_bits_and_never_shown() -> None:
    asked: list[int] = []

    def random_bytes(count: int) -> bytes:
        asked.append(count)
        return b"\xff" * count

    new = make_key("ours", ["generate"], random_bytes=random_bytes)
    (key,) = parse_keys(new.line, "here")

    assert asked == [32]
    assert new.secret.startswith(PREFIX)
    shown = f"{new!r} {key!r} {key} {new.line}"
    assert new.secret.removeprefix(PREFIX) not in shown
    assert str(key.digest) not in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (CANARY, "line 2: not a JSON object"),
        (f'["{CANARY}"]', "line 2: not a JSON object"),
        (json.dumps({"name": "a", "sha256": CANARY, "scopes": ["admin"]}), "line 2: sha256"),
        (json.dumps({"name": CANARY + " ", "sha256": "0" * 64, "scopes": ["admin"]}), "line 2: name"),
        (json.dumps({"name": "a", "sha256": "0" * 64, "scopes": [CANARY]}), "line 2: scopes"),
        (json.dumps({"name": "a", "sha256": "0" * 64, "scopes": []}), "line 2: scopes"),
        (json.dumps({"name": "a", "sha256": "0" * 64}), "line 2: scopes"),
        (json.dumps({"name": "a", "sha256": "0" * 64, "scopes": ["admin"], CANARY: 1}), "unknown field"),
        (json.dumps({"name": "a", "sha256": "0" * 64, "scope": ["admin"]}), "did you mean 'scopes'|scopes: "),
        (
            json.dumps({"name": "a", "sha256": "0" * 64, "scopes": ["admin"], "requests_per_minute": 0}),
            "line 2: requests_per_minute",
        ),
        ("[" * 100_000, "line 2: not a JSON object"),
    ],
)
def test_a_bad_line_is_named_and_not_quoted(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        parse_keys(make_key("good", ["admin"]).line + "\n" + line, "here")
    assert CANARY not in str(refused.value)


@pytest.mark.parametrize("field", ["name", "sha256"])
def test_two_keys_of_one_name_or_hash_are_refused(field: str) -> None:
    first, second = (json.loads(make_key(name, ["admin"]).line) for name in ("a", "b"))
    second[field] = first[field]
    with pytest.raises(UserError, match=f"the same {field}"):
        parse_keys(json.dumps(first) + "\n" + json.dumps(second), "here")


def write(file: Path, *lines: str, mode: int = 0o600) -> Path:
    """In place of the file, as editors do."""
    new = file.with_suffix(".new")
    new.write_text("\n".join(lines))
    new.chmod(mode)
    os.replace(new, file)
    return file


def test_a_file_that_changes_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = make_key("old", ["generate"]), make_key("new", ["generate"])
    file = write(tmp_path / "keys", old.line)
    keys = Keys(file)
    now_s = 100.0
    assert keys.find(old.secret, now_s) is not None

    write(file, new.line)
    assert keys.find(old.secret, now_s + CHECK_EVERY_S / 2) is not None, "not asked for on every request"
    now_s += CHECK_EVERY_S
    assert keys.find(old.secret, now_s) is None, "revoked"
    assert keys.find(new.secret, now_s) is not None

    for spoil in (lambda: write(file, new.line, CANARY), file.unlink, lambda: write(file, "", mode=0o666)):
        spoil()
        now_s += CHECK_EVERY_S
        with caplog.at_level(logging.INFO):
            assert keys.find(new.secret, now_s) is not None, "as they were"
        assert "stay as they were" in caplog.text
        caplog.clear()

    write(file)
    now_s += CHECK_EVERY_S
    assert keys.find(new.secret, now_s) is None
    assert keys.given, "an empty file lets nobody in, it does not open the doors"
    assert keys.num_keys == 0


def test_a_file_that_others_may_write_to_is_refused_and_one_they_may_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = make_key("a", ["admin"])
    with pytest.raises(UserError, match="chmod 600"):
        read_keys(write(tmp_path / "writable", new.line, mode=0o620))
    assert not caplog.text
    assert len(read_keys(write(tmp_path / "readable", new.line, mode=0o644))) == 1
    assert "others may read" in caplog.text


def test_keys_come_from_the_file_and_from_the_environment(tmp_path: Path) -> None:
    in_file, in_environment = make_key("a", ["admin"]), make_key("b", ["admin"])
    file = write(tmp_path / "keys", in_file.line)
    config = AdmissionConfig(key_file=str(file), keys_env="KEYS")

    both = load_keys(config, {"KEYS": in_environment.line})

    assert both.find(in_file.secret, 0.0) is not None
    assert both.find(in_environment.secret, 0.0) is not None
    assert both.given
    assert load_keys(AdmissionConfig(keys_env="KEYS"), {"KEYS": ""}).given, "asked for, none there: nobody gets in"
    assert not load_keys(AdmissionConfig(), {}).given
    with pytest.raises(UserError, match="variable KEYS, line 1"):
        load_keys(config, {"KEYS": "x"})
    with pytest.raises(UserError, match="No such file"):
        load_keys(AdmissionConfig(key_file=str(tmp_path / "none")), {})


def test_the_command_gives_the_key_and_its_line_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "make", "ci", "--scopes", "generate", "detect", "--tokens-per-minute", "9"]) == 0
    shown = capsys.readouterr()
    secret = shown.err.rpartition(" ")[2].strip()

    (key,) = parse_keys(shown.out, "standard output")

    assert find_key((key,), secret) is key
    assert (key.name, key.tokens_per_minute) == ("ci", 9)
    assert key.scopes == {"generate", "detect"}
    assert secret not in shown.out


@pytest.mark.parametrize("arguments", [["a b", "--scopes", "admin"], ["a", "--scopes", "root"]])
def test_the_command_refuses_what_no_key_has(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "make", *arguments]) == 2
    assert "a key's " in capsys.readouterr().err
