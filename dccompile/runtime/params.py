"""Weights as one safetensors file whose tensors code can address: every tensor 64-byte aligned.

The format forbids holes between tensors, so the gap after a tensor is itself a tensor of zero
bytes, named ``.pad<n>``; the header is padded with spaces, as the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import IncompatibleError

if TYPE_CHECKING:
    import numpy as np


ALIGN = 64
_MAX_HEADER = 100 << 20  # the limit of the safetensors readers
_CODES = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "float32": ("F32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float64": ("F64", 8),
}
_SIZES = dict(_CODES.values())


@dataclass(frozen=True)
class Stream:
    """uint8[nbytes], as `pieces` gives it in order; equal `key` means equal bytes."""

    nbytes: int
    key: bytes
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def dtype(self) -> np.dtype:
        import numpy as np

        return np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.nbytes,)

    def chunks(self) -> Iterator[memoryview]:
        """The bytes. Raises ValueError where they are not as many as promised."""
        import numpy as np

        done = 0
        for piece in self.pieces():
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            done += flat.nbytes
            yield flat.data
        if done != self.nbytes:
            raise ValueError(f"a stream of {self.nbytes} bytes gave {done}")


@dataclass(frozen=True)
class Packed:
    """A params file to be written: `offsets` are bytes into the data section of `data_size`."""

    header: bytes
    arrays: tuple[np.ndarray | Stream, ...]
    offsets: dict[str, int]
    data_size: int

    @property
    def size(self) -> int:
        return len(self.header) + self.data_size

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file, tensor by tensor: the whole is never held twice."""
        import numpy as np

        yield self.header
        for array in self.arrays:
            if isinstance(array, np.ndarray):
                yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            else:
                yield from array.chunks()
            if gap := -array.nbytes % ALIGN:
                yield bytes(gap)


def pack_params(tensors: Sequence[tuple[str, np.ndarray | Stream]]) -> Packed:
    """Lays the tensors out in the order given, row-major, little-endian.

    Raises ValueError on a name used twice or a dtype that safetensors lacks.
    """
    table: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    at = 0
    for name, array in tensors:
        if name in table or name == "__metadata__" or name.startswith(".pad"):
            raise ValueError(f"tensor {name!r}: the name is taken")
        if array.dtype.name not in _CODES or not array.dtype.isnative:
            raise ValueError(f"tensor {name!r}: dtype {array.dtype} cannot be stored")
        code, _ = _CODES[array.dtype.name]
        table[name] = _row(code, list(array.shape), at, at + array.nbytes)
        offsets[name] = at
        at += array.nbytes
        if gap := -at % ALIGN:
            table[f".pad{len(table)}"] = _row("U8", [gap], at, at + gap)
            at += gap
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"{len(table)} tensors need a header of {len(text)} bytes")
    header = len(text).to_bytes(8, "little") + text
    return Packed(header, tuple(a for _, a in tensors), offsets, at)


def _row(code: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": code, "shape": shape, "data_offsets": [begin, end]}


@dataclass(frozen=True)
class Stored:
    """One tensor of a params file; `offset` is in bytes into the data section."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse_header(file: memoryview, where: str) -> tuple[int, dict[str, Stored]]:
    """Where the data section of a params file begins, and its tensors without the padding.

    Every number is checked against the size of the file before it is used; raises
    IncompatibleError naming `where`.
    """

    def bad(found: str) -> IncompatibleError:
        return IncompatibleError(
            f"{where}: {found}. Fix: compile the model again, this file is damaged", "DC4006"
        )

    if len(file) < 8:
        raise bad(f"{len(file)} bytes, a safetensors file has at least 8")
    length = int.from_bytes(file[:8], "little")
    if length > min(_MAX_HEADER, len(file) - 8):
        raise bad(f"a header of {length} bytes in a file of {len(file)}")
    try:
        table = json.loads(bytes(file[8 : 8 + length]))
        table.pop("__metadata__", None)
        rows = {
            name: (row["dtype"], tuple(row["shape"]), *row["data_offsets"])
            for name, row in table.items()
        }
        ranges = sorted((begin, end, name) for name, (_, _, begin, end) in rows.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise bad("its safetensors header cannot be read") from None
    at = 0
    total = len(file) - 8 - length
    for begin, end, name in ranges:
        code, shape = rows[name][:2]
        size = _SIZES.get(code) if isinstance(code, str) else None
        if size is None or any(type(d) is not int or d < 0 for d in (*shape, begin, end)):
            raise bad(f"tensor {name!r} has an unknown dtype or a shape that is none")
        for dim in shape:
            size *= dim
        if begin != at or end - begin != size or end > total:
            raise bad(f"tensor {name!r} claims bytes {begin} to {end} of {total}")
        at = end
    if at != total:
        raise bad(f"its tensors hold {at} bytes of {total}")
    return 8 + length, {
        name: Stored(code, shape, begin, end - begin)
        for name, (code, shape, begin, end) in rows.items()
        if not name.startswith(".pad")
    }
