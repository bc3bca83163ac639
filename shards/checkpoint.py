"""The weights of a model on disk: a folder of safetensors files.

The format is a little-endian 64-bit header length, a JSON header, then the tensors' bytes:
https://huggingface.co/docs/safetensors. We read the headers ourselves, because then every way in which a
download can be broken has a name, and no file is mapped that could be cut short under a running process.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}  # torch's name, bytes
_SAMPLE_BYTES = 64
MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors library; more is no safetensors file


class BrokenCheckpoint(ValueError):
    """The files are not what they should be; the message says which one, and what is wrong with it."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies, as its file's header says it."""

    path: Path
    dtype: str  # the format's name, perhaps one that we cannot compute with
    shape: Shape
    offset: int  # bytes from the start of the file
    num_bytes: int


@dataclass(frozen=True)
class Part:
    """The rows or the columns of a matrix that one rank needs."""

    axis: int  # 0: rows, 1: columns
    start: int
    stop: int

    def shape(self, whole: Shape) -> Shape:
        """Return the part's shape. Raises ValueError if a tensor of shape `whole` has no such part."""
        if len(whole) != 2 or self.axis not in (0, 1) or not 0 <= self.start <= self.stop <= whole[self.axis]:
            raise ValueError(f"a tensor of shape {whole} has no part {self}")
        num = self.stop - self.start
        return (whole[0], num) if self.axis else (num, whole[1])


class Checkpoint:
    """The tensors in a folder, by name. Holds headers only, and no open file."""

    def __init__(self, directory: Path) -> None:
        """Read all headers. Raises BrokenCheckpoint if a file is missing, cut short or foreign."""
        self.tensors: dict[str, StoredTensor] = {}
        self._source = directory / "model.safetensors"  # what a missing tensor is missing from
        self._file_of: dict[str, str] = {}
        index_path = directory / "model.safetensors.index.json"
        if self._source.exists():
            self.tensors = _read_header(self._source)
            return
        if not index_path.exists():
            raise BrokenCheckpoint(f"{directory} holds neither {self._source.name} nor {index_path.name}")
        self._source, self._file_of = index_path, _read_index(index_path)
        for name in sorted(set(self._file_of.values())):
            if not (directory / name).exists():
                raise BrokenCheckpoint(f"{directory / name} does not exist, but {index_path.name} names it")
            self.tensors |= _read_header(directory / name)

    def verify(self, expected: Mapping[str, Shape]) -> None:
        """Check name, shape and dtype of all `expected` tensors, by their headers alone.

        Raises BrokenCheckpoint for the first that is missing or differs. Other tensors may be there, too.
        """
        for name, shape in expected.items():
            found = self.tensors.get(name)
            if found is None:
                path = self._source.parent / self._file_of.get(name, self._source.name)
                raise BrokenCheckpoint(f"{path} has no tensor {name!r}, which should be of shape {shape}")
            if found.shape != shape:
                raise BrokenCheckpoint(
                    f"{found.path}: tensor {name!r} is of shape {found.shape}, "
                    f"but by config.json it should be of shape {shape}"
                )
            if found.dtype not in DTYPES:
                raise BrokenCheckpoint(
                    f"{found.path}: tensor {name!r} is of dtype {found.dtype}, which is not supported; "
                    f"it must be one of {', '.join(DTYPES)}"
                )

    def fingerprint(self) -> bytes:
        """Return 32 bytes that tell these weights from others, even of the same shapes, wherever they lie.

        Reads the middle of each tensor only: that differs after any training, but it can be forged. Blocks on
        the disk.
        """
        digest = blake2b(digest_size=32)
        for name, stored in sorted(self.tensors.items()):
            num_bytes = min(_SAMPLE_BYTES, stored.num_bytes)
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.offset + (stored.num_bytes - num_bytes) // 2)
                digest.update(repr((name, stored.dtype, stored.shape, file.read(num_bytes))).encode())
        return digest.digest()

    def tensor(self, name: str, part: Part | None = None) -> "Tensor":
        """Read one tensor, or a part of it and no other bytes, in the dtype it has on disk.

        Blocks on the disk; KeyError if there is none.
        """
        import torch  # not above: who only verifies a checkpoint need not wait for it

        from shards.kernels import huge_pages

        stored = self.tensors[name]
        dtype, item_bytes = DTYPES[stored.dtype]
        shape = part.shape(stored.shape) if part else stored.shape
        tensor = huge_pages.empty(shape, getattr(torch, dtype))
        target = tensor.flatten().view(torch.uint8).numpy().data
        with stored.path.open("rb", buffering=0) as file:
            if part is None or part.axis == 0:
                start = part.start if part else 0
                file.seek(stored.offset + start * math.prod(stored.shape[1:]) * item_bytes)
                _read(file, target, name)
                return tensor
            row_bytes, part_bytes = stored.shape[1] * item_bytes, shape[1] * item_bytes
            for row in range(shape[0]):
                file.seek(stored.offset + row * row_bytes + part.start * item_bytes)
                _read(file, target[row * part_bytes : (row + 1) * part_bytes], name)
        return tensor


def _read(file: FileIO, target: memoryview, name: str) -> None:
    """Fill `target`. Raises BrokenCheckpoint at the end of the file."""
    while target:  # Linux reads at most 2 GiB at once
        num_read = file.readinto(target)
        if not num_read:
            raise BrokenCheckpoint(f"{file.name} was cut short while {name!r} was read from it")
        target = target[num_read:]


def _read_index(path: Path) -> dict[str, str]:
    """Return the file name of each tensor."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError):
        weight_map = None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BrokenCheckpoint(f"{path} must hold a JSON object whose 'weight_map' gives each tensor's file")
    return weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return what one file holds, after checking that all of it is there."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        data_start = 8 + header_bytes
        if header_bytes > MAX_HEADER_BYTES:  # as when the "length" is the beginning of some text
            raise _foreign(path)
        if data_start > file_bytes or file_bytes < 8:
            raise _cut_short(path, data_start, file_bytes)
        header = file.read(header_bytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _stored_tensor(path, data_start, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _foreign(path) from None
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=data_start)
    if end > file_bytes:
        raise _cut_short(path, end, file_bytes)
    return tensors


def _stored_tensor(path: Path, data_start: int, entry: dict[str, Any]) -> StoredTensor:
    """Raises one of ValueError, KeyError and TypeError if the entry makes no sense."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError("shape and data_offsets must be natural numbers")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype][1]:
        raise ValueError("data_offsets must span as many bytes as the shape needs")
    return StoredTensor(path, dtype, shape, data_start + begin, end - begin)


def _cut_short(path: Path, wanted_bytes: int, found_bytes: int) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{path} is cut short: it should have at least {wanted_bytes:,} bytes, but it has {found_bytes:,}; "
        "download it again"
    )


def _foreign(path: Path) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{path} is not a safetensors file; download it again "
        "(a small text file is a Git LFS pointer: `git lfs pull` fetches what it stands for)"
    )
