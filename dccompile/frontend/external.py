"""Tensor data: lengths checked against dims and dtype, external files confined and mapped.

External data is read only from regular files with one hard link under the model's own folder;
every path component is opened without following symbolic links, so a rename between check and
use cannot lead outside. Files above `EMBED_LIMIT` bytes are mapped, not read.
"""

from __future__ import annotations

import math
import os
import stat
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from onnx import TensorProto, helper

from dccompile.errors import Problem

EMBED_LIMIT = 64 * 1024  # bytes of external data that are copied into the proto
MAX_DIM = 2**31 - 1
MAX_RANK = 64
MAX_TENSOR_BYTES = 2**36  # 64 GiB: more than any tensor a kernel of ours is built for

_SUB_BYTE = {
    getattr(TensorProto, name): bits
    for name, bits in (("UINT4", 4), ("INT4", 4), ("FLOAT4E2M1", 4), ("UINT2", 2), ("INT2", 2))
    if hasattr(TensorProto, name)
}
_TYPED_FIELDS = tuple(
    f"{kind}_data" for kind in ("float", "int32", "string", "int64", "double", "uint64")
)


@cache
def bits(dtype: int) -> int:
    """Bits an element of an ONNX element type takes; 0 for strings and unknown types."""
    if dtype in _SUB_BYTE:
        return _SUB_BYTE[dtype]
    if dtype == TensorProto.STRING or dtype not in TensorProto.DataType.values():
        return 0
    if dtype == TensorProto.UNDEFINED:
        return 0
    return helper.tensor_dtype_to_np_dtype(dtype).itemsize * 8


def byte_size(tensor: TensorProto) -> int:
    """Bytes of the raw form of `tensor`, from its dims and dtype."""
    return -(-math.prod(tensor.dims) * bits(tensor.data_type) // 8)


def check_tensor(tensor: TensorProto, where: str) -> Problem | None:
    """Dims, dtype and length of a tensor whose data is in the file."""
    problem = check_header(tensor, where)
    if problem or tensor.data_location == TensorProto.EXTERNAL:
        return problem
    elements = math.prod(tensor.dims)
    fields = [name for name in _TYPED_FIELDS if len(getattr(tensor, name))]
    raw = tensor.HasField("raw_data")
    if len(fields) + raw > 1 and not (raw and not fields):
        found = f"data in {' and '.join([*fields, *['raw_data'] * raw])}; one field is allowed"
        return _damaged(where, found)
    if raw:
        if tensor.data_type == TensorProto.STRING:
            return _damaged(where, "strings in raw_data; string_data is allowed")
        have, want = len(tensor.raw_data), byte_size(tensor)
        if have != want:
            found = f"{have} bytes of data, {_describe(tensor)} has {want}"
            return _damaged(where, found)
        return None
    field = helper.tensor_dtype_to_field(tensor.data_type)
    if fields and fields[0] != field:
        return _damaged(where, f"data in {fields[0]}; {_describe(tensor)} is stored in {field}")
    want = elements
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        want = 2 * elements
    if tensor.data_type in _SUB_BYTE:
        want = byte_size(tensor)
    have = len(getattr(tensor, field))
    if have != want:
        return _damaged(where, f"{have} entries in {field}, {_describe(tensor)} has {want}")
    return None


def check_header(tensor: TensorProto, where: str) -> Problem | None:
    """Dims and dtype alone; nothing is allocated."""
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == 0:
        found = f"element type {tensor.data_type}; the types of onnx.TensorProto are allowed"
        return _damaged(where, found)
    if len(tensor.dims) > MAX_RANK:
        found = f"{len(tensor.dims)} dims; at most {MAX_RANK} are allowed"
        return Problem("DC3017", where, found, "export the model again")
    for dim in tensor.dims:
        if not 0 <= dim <= MAX_DIM:
            found = f"shape {_dims(tensor)}; every dim must lie in 0..{MAX_DIM}"
            return Problem("DC3017", where, found, "export the model again")
    if byte_size(tensor) > MAX_TENSOR_BYTES:
        found = f"{_describe(tensor)} needs {byte_size(tensor)} bytes; "
        found += f"at most {MAX_TENSOR_BYTES} (64 GiB) are allowed in one tensor"
        return Problem("DC3017", where, found, "split the tensor")
    if tensor.HasField("segment"):
        return _damaged(where, "a segmented tensor; whole tensors are allowed")
    return None


def _dims(tensor: TensorProto) -> str:
    text = ", ".join(str(dim) for dim in tensor.dims[:8])
    return f"[{text}{', ...' if len(tensor.dims) > 8 else ''}]"


def _describe(tensor: TensorProto) -> str:
    return f"{TensorProto.DataType.Name(tensor.data_type).lower()}{_dims(tensor)}"


def _damaged(where: str, found: str) -> Problem:
    return Problem("DC3010", where, found, "the file is damaged: export the model again")


def _refuse(where: str, found: str, fix: str) -> Problem:
    return Problem("DC3011", where, found, fix)


def load_external(tensor: TensorProto, folder: Path | None, where: str) -> np.ndarray | Problem:
    """The raw bytes (uint8, one-dimensional) of an external tensor, mapped read-only."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        fix = "pass the path of the .onnx file, or call onnx.load (which reads external data)"
        found = f"its data lies in the external file {location!r}, and bytes or a ModelProto "
        return _refuse(where, found + "have no folder to look in", fix)
    want = byte_size(tensor)
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or want)
    except ValueError:
        found = f"offset {entries.get('offset')!r} and length {entries.get('length')!r}; "
        return _refuse(where, found + "whole numbers are allowed", "export the model again")
    if offset < 0 or length != want:
        found = f"offset {offset} and length {length} of external data; {_describe(tensor)} "
        found += f"has {want} bytes, from an offset that is not negative"
        return _refuse(where, found, "export the model again")
    parts = PurePosixPath(location).parts
    name = f"external data {location!r}"
    confined = "put the data file, as a plain file, into the model's folder"
    if not parts or "\0" in location or ".." in parts or location.startswith("/"):
        found = f"{name}; a relative path inside the model's folder is allowed"
        return _refuse(where, found, confined)
    try:
        descriptor = _open_confined(folder, parts)
    except OSError as error:
        return _refuse(where, f"{name} cannot be opened: {error.strerror}", confined)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
            kind = "not a regular file" if not stat.S_ISREG(info.st_mode) else "a hard link"
            found = f"{name} is {kind}; a regular file with one link is allowed"
            return _refuse(where, found, confined)
        if offset + want > info.st_size:
            found = f"{name} has {info.st_size} bytes, offset {offset} plus length {want} "
            return _refuse(where, found + "lie past its end", "copy the data file again")
        if want == 0:
            return np.empty(0, np.uint8)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return np.memmap(file, np.uint8, "r", offset, (want,))
    except OSError as error:
        return _refuse(where, f"{name} cannot be mapped: {error.strerror}", confined)
    finally:
        os.close(descriptor)


def _open_confined(folder: Path, parts: tuple[str, ...]) -> int:
    """Opens `parts` below `folder`, following no symbolic link and waiting for no pipe."""
    current = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(part, flags, dir_fd=current)
            os.close(current)
            current = inner
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(parts[-1], flags, dir_fd=current)
    finally:
        os.close(current)


def embed(tensor: TensorProto, data: np.ndarray) -> None:
    """Puts raw bytes into the proto and forgets the external file."""
    tensor.raw_data = data.tobytes()
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def as_array(tensor: TensorProto, raw: np.ndarray | None = None) -> np.ndarray:
    """A read-only array of a checked tensor; `raw` is mapped external data (zero-copy)."""
    if raw is None:
        array = onnx.numpy_helper.to_array(tensor)
    elif tensor.data_type in _SUB_BYTE:
        inside = TensorProto(data_type=tensor.data_type, dims=tensor.dims)
        inside.raw_data = raw.tobytes()
        array = onnx.numpy_helper.to_array(inside)
    else:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        array = raw.view(dtype).reshape(tuple(tensor.dims))
    array.flags.writeable = False
    return array
