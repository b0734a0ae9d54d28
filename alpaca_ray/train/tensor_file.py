"""safetensors files, one tensor at a time: the library's own writer wants all tensors of a file in memory at once.

Format: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes at the offsets it names.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alpaca_ray.config import UserError

Bytes = npt.NDArray[np.uint8]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file; offsets count from the end of the header."""

    name: str
    dtype: str  # as the format spells it
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A file open for reading; pages come in as they are touched."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is torn or no safetensors file."""
        self.path = path
        self.header = _header(path)
        items = json.loads(self.header)
        items.pop("__metadata__", None)
        entries = [Entry(k, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in items.items()]
        self.entries: Sequence[Entry] = sorted(entries, key=lambda entry: entry.begin)
        expected = 8 + len(self.header) + (self.entries[-1].end if self.entries else 0)
        if path.stat().st_size != expected:
            raise UserError(f"{path} is torn: it has {path.stat().st_size} bytes, its header promises {expected}")
        self._data = np.memmap(path, mode="r", offset=0)[8 + len(self.header) :]

    def raw(self, entry: Entry) -> Bytes:
        """A tensor's bytes, a view into the file."""
        return self._data[entry.begin : entry.end]


class Writer:
    """A file being written: the header first, then the tensors' bytes in its order."""

    def __init__(self, path: Path, header: bytes) -> None:
        self._file = ExitStack().enter_context(path.open("wb"))
        self._file.write(len(header).to_bytes(8, "little") + header)

    def add(self, data: Bytes) -> None:
        """The next tensor's bytes."""
        self._file.write(data.data)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a file that holds these, in their order; only dtype and shape are looked at."""
    items: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        items[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(items, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the data begins at a multiple of 8


def raw(tensor: Tensor) -> Bytes:
    """The bytes of a tensor in host memory."""
    flat: Bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def tensor(data: Bytes, dtype: str, shape: Iterable[int]) -> Tensor:
    """The tensor that bytes stand for; it copies them."""
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(*shape)


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= MAX_HEADER_BYTES else b""
    if len(text) != length or not text.startswith(b"{"):
        raise UserError(f"{path} is no safetensors file, or torn")
    return text
