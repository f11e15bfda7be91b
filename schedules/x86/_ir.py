"""Vector vocabulary of the x86 schedules: short names for TIR expressions on whole registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

__all__ = [
    "T",
    "bits",
    "fetch_share",
    "i64",
    "intrinsic",
    "local",
    "masked_load",
    "masked_store",
    "prim_func",
    "ramp",
    "shared",
    "splat",
    "tirx",
]


@contextmanager
def prim_func(name: str) -> Iterator[IRBuilder]:
    """Opens a PrimFunc named `name` whose buffers do not alias; ``builder.get()`` returns it."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        yield builder


def i64(value: int) -> Any:
    return tirx.const(value, "int64")


def local(size: int, dtype: str) -> Any:
    """A buffer in registers or on the stack, however the code around it branches.

    Without the annotation TVM allocates it with a call of its runtime, and LLVM keeps it in
    registers only in simple loops. The pass StorageRewrite would drop the annotation: builds
    disable it.
    """
    return T.alloc_buffer(
        (size,), dtype, scope="local", annotations={"disable_lower_builtin": True}
    )


def ramp(base: Any, lanes: int) -> Any:
    """Contiguous lanes of a buffer, from `base`."""
    return T.ramp(base, 1, lanes)


def splat(value: float | int, dtype: str, lanes: int) -> Any:
    return T.broadcast(tirx.const(value, dtype), lanes)


def bits(dtype: str, value: Any) -> Any:
    """The same bits as another type."""
    return tirx.reinterpret(dtype, value)


def intrinsic(dtype: str, name: str, *args: Any) -> Any:
    """A pure LLVM intrinsic. One that the target lacks aborts the compiler: gate on features."""
    return tirx.call_llvm_pure_intrin(dtype, name, *args)


def shared(total: Any, units: int, body: Callable[[Any, Any], None]) -> None:
    """body(first, last) of 0 .. total - 1, int64, in about `units` equal parts for the threads."""
    chunk = T.Bind(tirx.floordiv(total + (units - 1), i64(units)))
    with T.parallel(i64(0), tirx.floordiv(total + (chunk - 1), chunk)) as unit:
        first = T.Bind(unit * chunk)
        body(first, T.Bind(tirx.min(first + chunk, total)))


def fetch_share(flat: Any, pixel: Any, size: tuple[int, int], part: Any, parts: int) -> None:
    """Prefetches a part of some pixels into the second-level cache.

    They lie one after the other in a buffer of one dim from number `pixel` on; `size` is how many
    and the elements of each. What lies after the buffer may be asked for: that is no fault.
    """
    line = 64 // np.dtype(str(flat.dtype)).itemsize  # elements of a cache line
    count = -(-size[0] * size[1] // (line * parts))
    first = T.Bind(pixel * size[1] + part * (count * line))
    for i in range(count):
        place = T.address_of(flat[first + i * line])
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", place, 0, 2, 1))


def masked_store(buffer: Any, index: Any, value: Any, lanes: int, valid: int) -> None:
    """Stores the first `valid` of `lanes` lanes at a flat or n-d index, touching nothing else."""
    mask = tirx.LT(ramp(tirx.const(0, "int32"), lanes), splat(valid, "int32", lanes))
    where = buffer[tuple(index)] if isinstance(index, (list, tuple)) else buffer[index]
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.masked.store", value, T.address_of(where), mask))


def masked_load(buffer: Any, index: list[Any], lanes: int, valid: int) -> Any:
    """The first `valid` of `lanes` lanes at an n-d index, 0 for the others, which are not read."""
    mask = tirx.LT(ramp(tirx.const(0, "int32"), lanes), splat(valid, "int32", lanes))
    where, dtype = T.address_of(buffer[tuple(index)]), f"{buffer.dtype}x{lanes}"
    return tirx.call_llvm_intrin(
        dtype, "llvm.masked.load", where, mask, splat(0, buffer.dtype, lanes)
    )
