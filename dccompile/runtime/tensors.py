"""Arrays in and out of compiled code: what it needs is row-major, 64-byte aligned, on the CPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..errors import InputError
from .ffi import import_tvm_ffi

ALIGN = 64
_HOST = (1, 3)  # DLPack's devices with memory that the CPU reads: its own, and page-locked
Shape = tuple[int, ...]
ndarray = np.ndarray
empty = np.empty
uint8 = np.dtype(np.uint8)
int64 = np.dtype(np.int64)


@dataclass(frozen=True, repr=False)
class TensorSpec:
    """One input or output: `shape` holds numbers and the names of symbols."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return describe(self.dtype, self.shape)

    def __repr__(self) -> str:
        return f"{self.name}: {self}"


def describe(dtype: Any, shape: Any) -> str:
    """For example ``float32[8,13]``."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def row_major(shape: Shape, itemsize: int) -> Shape:
    """Strides in bytes. numpy gives an empty array strides of 0, which compiled code refuses."""
    strides = []
    step = itemsize
    for dim in reversed(shape):
        strides.append(step)
        step *= max(dim, 1)
    return tuple(reversed(strides))


def aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """A new uninitialised array on a 64-byte boundary."""
    raw = np.empty(prod(shape) * dtype.itemsize + ALIGN, uint8)
    offset = -import_tvm_ffi().from_dlpack(raw).data_ptr() % ALIGN
    strides = row_major(shape, dtype.itemsize) if 0 in shape else None
    return np.ndarray(shape, dtype, raw, offset, strides)


class _Lent:
    def __init__(self, owner: Any, address: int, shape: Shape, dtype: np.dtype) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "data": (address, False),
            "strides": row_major(shape, dtype.itemsize),
        }


def lend(owner: Any, address: int, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """The memory of `owner` as a writable row-major array that keeps it alive."""
    return np.asarray(_Lent(owner, address, shape, dtype))


@dataclass
class Foreign:
    """A caller's tensor that has passed every check but those of its shape.

    `handle` is what compiled code takes, if `address` is aligned.
    """

    owner: Any
    address: int
    shape: Shape
    dtype: np.dtype
    handle: Any

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """The same memory as an array."""
        if isinstance(self.owner, np.ndarray):
            return self.owner
        return lend(self.owner, self.address, self.shape, self.dtype)

    def overlaps(self, other: Foreign) -> bool:
        return bool(
            self.nbytes
            and other.nbytes
            and self.address < other.address + other.nbytes
            and other.address < self.address + self.nbytes
        )


def admit(what: str, name: str, spec: TensorSpec, dtype: np.dtype, value: Any) -> Foreign:
    """Checks a caller's value as far as it needs no other input; never copies.

    `what` is ``input`` or ``output``. Raises InputError, one line that says what to do.
    """
    masked = hasattr(value, "mask")  # numpy would lend the values under the mask
    if isinstance(value, np.ndarray) and not masked:
        return _numpy(what, name, spec, dtype, value)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__") and not masked:
        return _dlpack(what, name, spec, dtype, value)
    variable = name if name.isidentifier() else "x"
    fix = f"use numpy.asarray({variable}, dtype='{spec.dtype}')"
    if value is None or isinstance(value, (str, bytes)):
        fix = "give an array"
    raise InputError(
        f"{what} '{name}': expected {spec}, got {type_name(value)}, which is no array; {fix}",
        "DC2102",
    )


def type_name(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"


def _numpy(what: str, name: str, spec: TensorSpec, dtype: np.dtype, array: np.ndarray) -> Foreign:
    variable = name if name.isidentifier() else "x"
    if array.dtype != dtype:
        got = describe(array.dtype, array.shape)
        fix = f"use {variable}.astype('{spec.dtype}')"
        if what == "output":
            fix = f"give numpy.empty(..., '{spec.dtype}')"
        raise InputError(f"{what} '{name}': expected {spec}, got {got}; {fix}", "DC2103")
    if not array.flags.c_contiguous:
        fix = f"use numpy.ascontiguousarray({variable})" if what == "input" else "give one that is"
        raise InputError(
            f"{what} '{name}': expected {spec} in row-major order, got strides {array.strides} "
            f"for {describe(array.dtype, array.shape)}; {fix}",
            "DC2105",
        )
    if what == "output" and not array.flags.writeable:
        raise InputError(f"output '{name}': the array is read-only; give a writable one", "DC2109")
    if array.flags.carray and array.size:
        handle = import_tvm_ffi().from_dlpack(array)
    else:  # DLPack of a read-only array fails, of an empty one lacks strides
        address = array.__array_interface__["data"][0]
        handle = import_tvm_ffi().from_dlpack(lend(array, address, array.shape, dtype))
    return Foreign(array, handle.data_ptr(), array.shape, dtype, handle)


def _dlpack(what: str, name: str, spec: TensorSpec, dtype: np.dtype, value: Any) -> Foreign:
    if is_torch(value) and (value.requires_grad or value.is_neg()):
        # lent all the same by torch's fast path, with the sign of a lazily negated one lost
        fix = "detach" if value.requires_grad else "resolve_neg"
        raise InputError(
            f"{what} '{name}': expected {spec}, got a tensor that needs .{fix}() first", "DC2107"
        )
    try:
        kind, index = value.__dlpack_device__()
        if int(kind) in _HOST:
            handle = import_tvm_ffi().from_dlpack(value)
            got = str(handle.dtype)
            shape = handle.shape
            contiguous = handle.is_contiguous()
            address = handle.data_ptr()
    except Exception as error:  # whatever a foreign class raises is this input's fault
        reason = " ".join((str(error).strip().splitlines() or [""])[0].split())[:200]
        raise InputError(
            f"{what} '{name}': expected {spec}, but {type_name(value)} cannot be lent through "
            f"DLPack: {type(error).__name__}: {reason}; give a plain CPU tensor",
            "DC2107",
        ) from None
    if int(kind) not in _HOST:
        raise InputError(
            f"{what} '{name}': expected {spec} on the CPU, got {type_name(value)} on DLPack device "
            f"({int(kind)}, {index}); move it to the CPU first",
            "DC2106",
        )
    if got != spec.dtype:
        raise InputError(
            f"{what} '{name}': expected {spec}, got {describe(got, shape)}; "
            f"convert it to {spec.dtype} first",
            "DC2103",
        )
    if not contiguous:
        raise InputError(
            f"{what} '{name}': expected {spec} in row-major order, got {describe(got, shape)} "
            "that is not contiguous; make it contiguous first",
            "DC2105",
        )
    if what == "output" and not is_torch(value):
        raise InputError(
            f"output '{name}': {type_name(value)} cannot be written to; "
            "give a numpy array or a torch tensor",
            "DC2109",
        )
    if not prod(shape) or int(kind) != 1:
        handle = import_tvm_ffi().from_dlpack(lend(value, address, shape, dtype))
    return Foreign(value, address, shape, dtype, handle)


def is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def exporter(value: Any) -> Any:
    """How to make an output the same kind of object as `value`; None where that is numpy."""
    if isinstance(value, np.ndarray):
        return None
    if is_torch(value):
        return sys.modules["torch"].from_dlpack
    namespace = getattr(value, "__array_namespace__", None)
    if namespace is not None:
        return getattr(namespace(), "from_dlpack", None)
    if isinstance(value, import_tvm_ffi().Tensor):
        return import_tvm_ffi().from_dlpack
    return None
