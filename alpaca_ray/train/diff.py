"""A tuned model as its difference from a base, exact to the bit; so it can be shared where the base may not be.

Tensor by tensor, diff = tuned XOR base over the raw bytes, and tuned = diff XOR base. Nothing is rounded, whatever
the dtype: adding differences of floats would be. A base in another dtype is converted first, as torch does it; rows
that the tuned model has more (a resized vocabulary) are XORed with zeros. SHA-256 of each tensor of base, diff and
result stand in diff.json, written last. The recovered directory is the tuned one byte for byte.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from huggingface_hub import snapshot_download
from pydantic import ValidationError

from alpaca_ray import models
from alpaca_ray.config import Strict, UserError, explain
from alpaca_ray.train import tensor_file
from alpaca_ray.train.tensor_file import Bytes, Entry, TensorFile

INDEX = "diff.json"
PREFIX = "diff-"  # so that from_pretrained does not take a diff for a model
SUFFIX = ".safetensors"
NAMED_AT_MOST = 3  # tensors in a message


class Digests(Strict):
    """SHA-256 of one tensor's bytes, as they lie in each of the three places."""

    base: str
    diff: str
    tuned: str


class Index(Strict):
    """What diff.json holds."""

    format: Literal[1] = 1
    fingerprint: str
    tensors: dict[str, Digests]
    headers: dict[str, str]  # of the tensors' files, which are the tuned model's -> SHA-256
    files: dict[str, str]  # those beside the tensors -> SHA-256


@dataclass(frozen=True)
class Made:
    """What `make` or `recover` did. `fingerprint` is the tuned model's: SHA-256 over all names and digests."""

    directory: Path
    num_tensors: int
    fingerprint: str


class Base:
    """The tensors of the base model, in the dtype and shape that another needs."""

    def __init__(self, directory: Path) -> None:
        self._entries = {entry.name: (file, entry) for file in _files(directory) for entry in file.entries}

    def raw(self, name: str) -> Bytes:
        """The bytes as they lie there. Raises UserError if there is no such tensor."""
        if name not in self._entries:
            raise UserError(
                f"the base has no tensor {name!r}: give the model that was tuned, in the architecture it was tuned in"
            )
        file, entry = self._entries[name]
        return file.raw(entry)

    def fitted(self, wanted: Entry) -> Bytes:
        """As many bytes as `wanted` has: converted to its dtype, rows cut off or added as zeros.

        Raises UserError where more than the number of rows differs.
        """
        data, entry = self.raw(wanted.name), self._entries[wanted.name][1]
        if entry.shape[1:] != wanted.shape[1:] or len(entry.shape) != len(wanted.shape):
            raise UserError(
                f"{wanted.name} has shape {list(wanted.shape)}, the base's {list(entry.shape)}: only the number of "
                "rows may differ. Give the model that was tuned"
            )
        if entry.dtype != wanted.dtype:
            data = _converted(data, entry, wanted.dtype)
        size = wanted.end - wanted.begin
        return data[:size] if len(data) >= size else np.concatenate([data, np.zeros(size - len(data), np.uint8)])


def make(base: str, tuned: str, out: Path) -> Made:
    """Write the diff directory. `base` and `tuned` as `models.resolve` takes them.

    Raises UserError if `out` exists, or the two are not of one shape.
    """
    with _new_directory(out) as target:
        source, base_model = _directory(tuned), Base(_directory(base))
        digests: dict[str, Digests] = {}
        headers: dict[str, str] = {}
        for file in _files(source):
            headers[file.path.name] = hashlib.sha256(file.header).hexdigest()
            with tensor_file.create(target / (PREFIX + file.path.name), file.header) as add:
                for entry in file.entries:
                    data = file.raw(entry) ^ base_model.fitted(entry)
                    add(data)
                    of_base, of_diff, of_tuned = map(_sha256, (base_model.raw(entry.name), data, file.raw(entry)))
                    digests[entry.name] = Digests(base=of_base, diff=of_diff, tuned=of_tuned)
        others = _copy_others(source, target)
        index = Index(fingerprint=_fingerprint(digests), tensors=digests, headers=headers, files=others)
        (target / INDEX).write_text(index.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return Made(out, len(digests), index.fingerprint)


def recover(base: str, diff: str, out: Path) -> Made:
    """Write the tuned model's directory. Every tensor of base, diff and result is checked against the index.

    Raises UserError, and leaves nothing at `out`, for a wrong base or a damaged diff; it names the first tensors.
    """
    source = Path(diff).expanduser()
    index = _read_index(source)
    base_model, files = Base(_directory(base)), list(_files(source))
    _refuse_incomplete(files, index.tensors)
    _refuse_wrong_base(base_model, index.tensors)
    _refuse_damaged_headers(files, index.headers)
    with _new_directory(out) as target:
        for file in files:
            with tensor_file.create(target / file.path.name.removeprefix(PREFIX), file.header) as add:
                for entry in file.entries:
                    add(_recovered(file, entry, base_model, index.tensors[entry.name]))
        if _copy_others(source, target) != index.files:
            raise UserError(f"{source}: the files beside the tensors are not those of {INDEX}: get the diff again")
    return Made(out, len(index.tensors), index.fingerprint)


def _recovered(file: TensorFile, entry: Entry, base: Base, digests: Digests) -> Bytes:
    if _sha256(file.raw(entry)) != digests.diff:
        raise UserError(f"{file.path}: {entry.name} is damaged, its SHA-256 is not that of {INDEX}: get the diff again")
    data = file.raw(entry) ^ base.fitted(entry)
    if _sha256(data) != digests.tuned:
        raise UserError(f"{entry.name}: base and diff are right but the result is not: {INDEX} is not this diff's")
    return data


def _refuse_wrong_base(base: Base, digests: Mapping[str, Digests]) -> None:
    _refuse(
        (name for name, of_one in digests.items() if _sha256(base.raw(name)) != of_one.base),
        "this is not the base that the diff was made from; different in",
        "Give that base, the same revision and dtype",
    )


def _refuse_incomplete(files: Iterable[TensorFile], digests: Mapping[str, Digests]) -> None:
    there = {entry.name for file in files for entry in file.entries}
    _refuse(
        sorted(there ^ digests.keys()),
        f"the diff's files and {INDEX} do not name the same tensors; in one of them only:",
        "Get the diff again",
    )


def _refuse_damaged_headers(files: Iterable[TensorFile], digests: Mapping[str, str]) -> None:
    for file in files:
        if hashlib.sha256(file.header).hexdigest() != digests.get(file.path.name.removeprefix(PREFIX)):
            raise UserError(f"{file.path}: its header is damaged, or {INDEX} is not this diff's: get the diff again")


def _refuse(names: Iterable[str], what: str, remedy: str) -> None:
    # Stops reading at the first few: a wrong 7B base is found in seconds.
    first = [name for _, name in zip(range(NAMED_AT_MOST), names, strict=False)]
    if first:
        more = ", ..." if len(first) == NAMED_AT_MOST else ""
        raise UserError(f"{what} {', '.join(first)}{more}. {remedy}")


def _converted(data: Bytes, entry: Entry, dtype: str) -> Bytes:
    if not {entry.dtype, dtype} <= tensor_file.DTYPES.keys():
        raise UserError(f"{entry.name}: the base has dtype {entry.dtype}, the tuned model {dtype}: convert one of them")
    tensor = tensor_file.tensor(data, entry.dtype, entry.shape)
    return tensor_file.raw(tensor.to(tensor_file.DTYPES[dtype]))


def _directory(reference: str) -> Path:
    resolved = models.resolve(reference)
    if Path(resolved).is_dir():
        return Path(resolved)
    try:
        return Path(snapshot_download(resolved, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5"]))
    except (OSError, ValueError) as error:
        raise UserError(f"model {reference!r} cannot be fetched: {error}") from None


def _files(directory: Path) -> Iterator[TensorFile]:
    paths = sorted(directory.glob(f"*{SUFFIX}"))
    if not paths:
        raise UserError(f"{directory} holds no safetensors files: save the model with transformers' save_pretrained")
    return (TensorFile(path) for path in paths)


def _copy_others(source: Path, target: Path) -> dict[str, str]:
    """Tokenizer, configs, model card: all that holds no tensors. Name -> SHA-256."""
    others = sorted(p for p in source.iterdir() if p.is_file() and p.suffix != SUFFIX and p.name != INDEX)
    for path in others:
        shutil.copyfile(path, target / path.name)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in others}


def _read_index(directory: Path) -> Index:
    if not (directory / INDEX).is_file():
        raise UserError(f"{directory} is no diff, or one that was never finished: {INDEX} is missing")
    try:
        index = Index.model_validate_json((directory / INDEX).read_bytes())
    except ValidationError as error:
        raise UserError(f"{explain(error, str(directory / INDEX), Index)}. Get the diff again") from None
    if index.fingerprint != _fingerprint(index.tensors):
        raise UserError(f"{directory / INDEX} is damaged: its fingerprint is not that of its digests")
    return index


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A directory that comes to be under its name only when all of it is written."""
    if out.exists():
        raise UserError(f"{out} exists: name a directory that does not")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as temporary:
        target = Path(temporary) / out.name
        target.mkdir()
        yield target
        target.rename(out)


def _sha256(data: Bytes) -> str:
    return hashlib.sha256(data.data).hexdigest()


def _fingerprint(digests: Mapping[str, Digests]) -> str:
    lines = "".join(f"{name} {digests[name].tuned}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
