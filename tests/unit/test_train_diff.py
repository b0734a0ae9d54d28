"""A weight diff gives back every bit, and every wrong bit is found: in the base, the diff, the index."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alpaca_ray import cli
from alpaca_ray.config import UserError
from alpaca_ray.train import diff, tensor_file
from tests.tiny import write_tiny_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text("{}")
    return directory


def weights(seed: int, rows: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (rows, 3), "a": (2, 3), "b": (2, 3), "scale": (3,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def listing(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base", weights(0))


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    directory = save(tmp_path / "tuned", weights(1))
    (directory / "tokenizer.json").write_text('{"é": 1}', encoding="utf-8")
    return directory


@pytest.fixture
def made(base: Path, tuned: Path, tmp_path: Path) -> Path:
    return diff.make(str(base), str(tuned), tmp_path / "diff").directory


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    base_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    tuned_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    more_rows=st.integers(-2, 3),
)
def test_the_recovered_model_is_the_tuned_one_to_the_byte(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, base_dtype: str, tuned_dtype: str, more_rows: int
) -> None:
    root = tmp_path_factory.mktemp("diff")
    dtype = DTYPES[tuned_dtype]
    bits = data.draw(st.lists(st.integers(0, 255), min_size=4 * 3, max_size=4 * 3))  # NaNs and infinities among them
    tensors = weights(1, 4 + more_rows, dtype)
    tensors["scale"] = torch.tensor(bits, dtype=torch.uint8)[: 3 * DTYPES[tuned_dtype].itemsize].view(
        DTYPES[tuned_dtype]
    )
    given_base = save(root / "base", weights(0, dtype=DTYPES[base_dtype]))
    given_tuned = save(root / "tuned", tensors)
    made = diff.make(str(given_base), str(given_tuned), root / "diff")
    recovered = diff.recover(str(given_base), str(made.directory), root / "out")

    assert listing(root / "out") == listing(given_tuned)
    assert recovered.fingerprint == made.fingerprint


def test_a_real_model_goes_through_the_command_and_loads(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = write_tiny_model(tmp_path / "tuned", seed=1)
    for action, source, out in (("make", f"--tuned={tuned}", "diff"), ("recover", f"--diff={tmp_path}/diff", "out")):
        assert cli.main(["diff", action, f"--base={tiny_model}", source, f"--out={tmp_path / out}"]) == 0
    assert capsys.readouterr().out.count("20 tensors; SHA-256 of the tuned model ") == 2
    assert listing(tmp_path / "out") == listing(tuned)
    assert not (tmp_path / "diff" / "model.safetensors").exists()  # from_pretrained must not take it for a model
    assert "tokenizer.json" in listing(tmp_path / "diff")


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = next(directory.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["b"].view(torch.uint8)[1, 5] ^= 1


def permute(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"], tensors["b"] = tensors["b"], tensors["a"]


def swap_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed"] = tensors["embed"].flip(0).contiguous()


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["a"]


@pytest.mark.parametrize(("change", "named"), [(flip_a_bit, "b"), (permute, "a, b"), (swap_rows, "embed")])
def test_a_wrong_base_is_refused_by_name(
    base: Path, made: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], named: str
) -> None:
    rewrite(base, change)
    with pytest.raises(UserError, match=rf"not the base that the diff was made from; different in {named}\."):
        diff.recover(str(base), str(made), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "named"), [(flip_a_bit, "b"), (permute, "a"), (swap_rows, "embed")])
def test_a_damaged_diff_is_found(
    base: Path, made: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], named: str
) -> None:
    rewrite(made, change)
    with pytest.raises(UserError, match=f"{named} is damaged"):
        diff.recover(str(base), str(made), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "diff", "tuned"]  # nothing half done


@pytest.mark.parametrize("bit", [1, 16])
def test_every_damaged_byte_is_found(base: Path, made: Path, tmp_path: Path, bit: int) -> None:
    """In the header too: a shape that changed would pass every tensor's digest."""
    path = made / "diff-model.safetensors"
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        with pytest.raises(UserError, match="is damaged" if position >= begin else None):
            diff.recover(str(base), str(made), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_index_or_file_is_found(base: Path, made: Path, tmp_path: Path) -> None:
    index = json.loads((made / "diff.json").read_text())
    first = next(iter(index["tensors"].values()))
    first["tuned"] = "0" * 64
    whole = (made / "diff.json").read_text()
    (made / "diff.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="fingerprint is not that of its digests"):
        diff.recover(str(base), str(made), tmp_path / "out")
    (made / "diff.json").write_text(whole)
    (made / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="files beside the tensors are not those"):
        diff.recover(str(base), str(made), tmp_path / "out")
    (made / "diff.json").unlink()
    with pytest.raises(UserError, match=r"never finished: diff\.json is missing"):
        diff.recover(str(base), str(made), tmp_path / "out")


def test_a_torn_file_is_found(base: Path, made: Path, tmp_path: Path) -> None:
    path = made / "diff-model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="no safetensors file, or torn"):
        diff.recover(str(base), str(made), tmp_path / "out")
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match="no safetensors file, or torn"):
        diff.recover(str(base), str(made), tmp_path / "out")


def test_a_tensor_too_few_is_found(base: Path, made: Path, tmp_path: Path) -> None:
    rewrite(made, drop)
    with pytest.raises(UserError, match="do not name the same tensors; in one of them only: a"):
        diff.recover(str(base), str(made), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update(head=torch.zeros(2)), "the base has no tensor 'head'"),
        (lambda tensors: tensors.update(a=torch.zeros(2, 4)), r"a has shape \[2, 4\], the base's \[2, 3\]"),
    ],
)
def test_models_of_two_shapes_are_refused(
    base: Path, tuned: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    rewrite(tuned, change)
    with pytest.raises(UserError, match=message):
        diff.make(str(base), str(tuned), tmp_path / "diff")
    assert not (tmp_path / "diff").exists()


def test_nothing_is_written_over(base: Path, tuned: Path, made: Path) -> None:
    with pytest.raises(UserError, match="exists: name a directory that does not"):
        diff.make(str(base), str(tuned), made)


def test_a_model_without_safetensors_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no safetensors files"):
        diff.make(str(base), str(tmp_path / "old"), tmp_path / "diff")


@given(dtype=st.sampled_from(sorted(DTYPES)), shape=st.lists(st.integers(0, 3), max_size=3))
@settings(max_examples=25, deadline=None)
def test_our_files_are_the_librarys(tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[int]) -> None:
    tensors = {"x": torch.ones(shape, dtype=DTYPES[dtype]), "y": torch.arange(5)}
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    with tensor_file.create(path, tensor_file.header(tensors)) as add:
        for tensor in tensors.values():
            add(tensor_file.raw(tensor))
    read = load_file(path)
    assert {name: (t.dtype, t.shape) for name, t in read.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
