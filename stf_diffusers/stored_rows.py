"""Tensors in a safetensors file, written and read row by row.

The layout (a length, a JSON header, the bytes of the tensors) lets a file be larger than memory on both sides.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import settle

_NAME_OF = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
_NAME_OF |= {torch.float64: "F64"}
_DTYPE_OF = {name: dtype for dtype, name in _NAME_OF.items()}

# The longest header that safetensors reads.
_MAX_HEADER = 100_000_000


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


class RowWriter:
    """Writes a safetensors file, complete or not at all.

        with RowWriter(path, {"images": (torch.uint8, (n, 3, 32, 32))}, metadata_bytes=1000) as file:
            for chunk in chunks:
                file.write("images", chunk)
            file.finish({"origin": "..."})

    Rows go to a file beside `path`, which replaces it at `finish`, once all of them are on the disk. Leaving the block
    without `finish`, or by an exception, leaves what was there before.

    Args:
        path: path of the file; missing folders are made.
        layout: dtype and shape of each tensor, in the order in which they lie in the file.
        metadata_bytes: room for the metadata as JSON: the tensors' places must be known before the metadata are.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata_bytes: int
    ) -> None:
        self.path = path
        self._entries: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in layout.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._entries[name] = {"dtype": _NAME_OF[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        length = len(_header(self._entries, {})) + metadata_bytes
        self._header_length = length + -length % 8
        # Where the next row of each tensor goes.
        self._places = {name: entry["data_offsets"][0] for name, entry in self._entries.items()}

    def __enter__(self) -> RowWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: another process may be writing the same file. Not mkstemp, whose files others cannot read.
        self._aside = self.path.parent / f".writing-{secrets.token_hex(8)}"
        self._file = self._aside.open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            self._aside.unlink(missing_ok=True)

    def write(self, name: str, rows: Tensor) -> None:
        """Append rows (k, ...) to a tensor.

        Raises:
            ValueError: rows of another dtype or shape, or more of them than there is room for.
        """
        entry, place = self._entries[name], self._places[name]
        if _NAME_OF.get(rows.dtype) != entry["dtype"] or list(rows.shape[1:]) != entry["shape"][1:]:
            raise ValueError(
                f"rows of {name!r} are {entry['dtype']} {tuple(entry['shape'][1:])}; got {rows.dtype} "
                f"{tuple(rows.shape[1:])}."
            )
        if place + rows.nbytes > entry["data_offsets"][1]:
            raise ValueError(f"{name!r} has room for {entry['shape'][0]} rows, and more are written.")
        self._file.seek(8 + self._header_length + place)
        self._file.write(raw_bytes(rows.cpu()))
        self._places[name] += rows.nbytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, and put the file in its place.

        Raises:
            ValueError: rows are missing, or the metadata need more than `metadata_bytes`.
        """
        missing = [name for name, entry in self._entries.items() if self._places[name] != entry["data_offsets"][1]]
        if missing:
            raise ValueError(f"{self.path} cannot be finished: rows of {missing} were not written.")
        header = _header(self._entries, metadata)
        if len(header) > self._header_length:
            raise ValueError(
                f"the metadata of {self.path} need {len(header) - self._header_length} bytes more. Raise metadata_bytes."
            )
        self._file.seek(0)
        self._file.write(self._header_length.to_bytes(8, "little") + header.ljust(self._header_length))
        self._file.flush()
        settle(self._aside, self.path)


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    return json.dumps({"__metadata__": dict(metadata), **entries}).encode()


class RowReader:
    """The tensors of a safetensors file, by rows or whole.

    The file is held open, so that replacing it on the disk does not change what is read; pickled, it is opened again.
    (Not safetensors' own `get_slice`: it cannot be pickled nor say which file it holds, and dies of a bus error where a
    file is truncated; reading a row by it is measured to take 1.6 times as long, and 700 rows as long.)

    Args:
        path: path of the file.

    Attributes:
        metadata: strings by name.
        names: names of the tensors.

    Raises:
        ValueError: the file is not safetensors, or is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _OpenFile(path)
        length = int.from_bytes(self._file.read(0, 8), "little") if self._file.size >= 8 else 0
        if not 0 < length <= min(_MAX_HEADER, self._file.size - 8):
            raise ValueError(f"{path} is not a safetensors file.")
        start = 8 + length
        try:
            header = json.loads(self._file.read(8, length), object_pairs_hook=_once)
            self.metadata = _metadata(header.pop("__metadata__", {}))
            entries = {name: _entry(name, entry) for name, entry in header.items()}
        # From json, missing keys, values that are not dictionaries, and sizes beyond all bounds.
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is damaged: its header cannot be read ({error}). Delete it.") from error
        end = 0
        for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if begin != end:
                raise ValueError(
                    f"{path} is damaged: {name!r} does not begin where the tensor before it ends. Delete it."
                )
            end = stop
        if start + end != self._file.size:
            raise ValueError(f"{path} is damaged: its size is not what its header says. Delete it.")
        self._rows = {
            name: FileRows(self._file, start + begin, shape, dtype)
            for name, (dtype, shape, begin, _) in entries.items()
        }
        self.names = tuple(self._rows)

    def rows(self, name: str) -> FileRows:
        """A tensor whose rows are read when they are sliced."""
        return self._rows[name]

    def mapped(self, name: str) -> Tensor:
        """A whole tensor, of which the system reads the pages that are used. Writing to it does not reach the file."""
        return self._rows[name].mapped()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON without repeated names, of which a dictionary keeps the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _metadata(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError("its metadata are not strings by name")
    return values


def _entry(name: str, entry: Any) -> tuple[torch.dtype, torch.Size, int, int]:
    """Dtype, shape, begin and end of a tensor in the header, which may say anything."""
    sizes, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (sizes, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{name!r} has sizes or offsets that are not counts: {numbers!r}")
    dtype, (begin, end) = _DTYPE_OF[entry["dtype"]], offsets
    if end - begin != math.prod(sizes) * dtype.itemsize:
        raise ValueError(f"{name!r} has another size than its shape says")
    return dtype, torch.Size(sizes), begin, end


class FileRows:
    """Rows (n, ...) in a file, read when they are sliced."""

    def __init__(self, file: _OpenFile, offset: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.file, self.offset, self.shape, self.dtype = file, offset, shape, dtype

    @property
    def _row_bytes(self) -> int:
        return self.shape[1:].numel() * self.dtype.itemsize

    def part(self, rows: range) -> FileRows:
        """Those rows alone, of which none is read yet."""
        shape = torch.Size((len(rows), *self.shape[1:]))
        return FileRows(self.file, self.offset + rows.start * self._row_bytes, shape, self.dtype)

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        tensor = torch.empty((max(stop - start, 0), *self.shape[1:]), dtype=self.dtype, device="cpu")
        self.file.read_into(raw_bytes(tensor), self.offset + start * self._row_bytes)
        return tensor

    def mapped(self) -> Tensor:
        """As `RowReader.mapped`."""
        if not self.shape.numel():
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        values = torch.frombuffer(self.file.mapped(), dtype=self.dtype, count=self.shape.numel(), offset=self.offset)
        return values.view(self.shape)


class _OpenFile:
    """A file held open: replacing it on the disk does not change what is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115
        self.size = os.fstat(self._file.fileno()).st_size

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self._identity())

    def _identity(self) -> tuple[int, ...]:
        stat = os.fstat(self._file.fileno())
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done:]], offset + done)
            if not count:
                raise OSError(f"{self.path} ended early: it was truncated after it was opened.")
            done += count

    def mapped(self) -> mmap.mmap:
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)


def _reopened(path: Path, identity: tuple[int, ...]) -> _OpenFile:
    """What `_OpenFile` is unpickled as."""
    file = _OpenFile(path)
    if file._identity() != identity:
        raise ValueError(f"{path} was replaced after it was opened. Open it again.")
    return file
