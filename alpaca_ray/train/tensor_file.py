"""safetensors files, one tensor at a time: the library's own writer wants all tensors of a file in memory at once.

Format: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes at the offsets it names.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alpaca_ray.config import UserError

Bytes = npt.NDArray[np.uint8]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        try:
            with safe_open(path, "pt"):  # it looks at every name, length and offset
                pass
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file, or torn: {error}") from None
        with path.open("rb") as file:
            self.header = file.read(int.from_bytes(file.read(8), "little"))
        items = json.loads(self.header)
        items.pop("__metadata__", None)
        entries = [Entry(k, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in items.items()]
        self.entries: Sequence[Entry] = sorted(entries, key=lambda entry: entry.begin)
        self._data = np.memmap(path, mode="r")[8 + len(self.header) :]

    def raw(self, entry: Entry) -> Bytes:
        """A tensor's bytes, a view into the file."""
        return self._data[entry.begin : entry.end]


@contextmanager
def create(path: Path, header: bytes) -> Iterator[Callable[[Bytes], object]]:
    """Write the header; what this gives is to be called with the bytes of each tensor, in the header's order."""
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        yield lambda data: file.write(data.data)


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
