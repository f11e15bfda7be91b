"""Vocabulary of the generic functions for GPUs: launches, memories, barriers, reports, vectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tvm import sym, tirx
from tvm.ir import StringImm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import static

THREADS = 256  # of a block, where nothing else is said


def i32(value: int) -> Any:
    return tirx.const(value, "int32")


def i64(value: int) -> Any:
    return tirx.const(value, "int64")


def product(extents: Any) -> Any:
    """Elements of a shape, a simple int64 expression."""
    total: Any = i64(1)
    for extent in extents:
        total = total * (i64(extent) if isinstance(extent, int) else tirx.Cast("int64", extent))
    return sym.Analyzer().simplify(total)


def parts(total: Any, each: int) -> Any:
    """How many times `each` items make `total`, the last time perhaps in part."""
    total = tirx.Cast("int64", total)
    return sym.Analyzer().simplify(tirx.FloorDiv(total + (each - 1), i64(each)))


def blocks_of(total: Any, each: int) -> Any:
    """Blocks for `total` items, at least one: a launch of none is an error of the driver."""
    count = parts(total, each)
    known = static(count)
    return tirx.Max(count, i64(1)) if known is None else i64(max(1, known))


def flat(buffer: Any, size: Any) -> Any:
    """The elements of a buffer, `size` of them, in row-major order."""
    dtype = str(buffer.ty.dtype.dtype)
    view = T.decl_buffer((size,), dtype, data=tirx.buffer_data(buffer))
    return IRBuilder.name(f"{buffer.name}_flat", view)


@contextmanager
def launch(grid: Any, block: int = THREADS) -> Iterator[tuple[Any, Any]]:
    """A kernel; gives the block's index, int64, and that of the thread in it, int32."""
    with ExitStack() as stack:
        b = stack.enter_context(T.thread_binding(0, grid, "blockIdx.x"))
        t = stack.enter_context(T.thread_binding(0, i32(block), "threadIdx.x"))
        yield tirx.Cast("int64", b), t


@contextmanager
def items(total: Any, block: int = THREADS) -> Iterator[Any]:
    """A kernel with a thread for every number below `total`; gives the number."""
    with launch(blocks_of(total, block), block) as (b, t):
        at = T.Bind(b * block + tirx.Cast("int64", t))
        with when(at < total):
            yield at


@contextmanager
def when(condition: Any) -> Iterator[None]:
    with T.If(condition), T.Then():
        yield


def shared(size: int, dtype: str) -> Any:
    """Memory of a block; of all such buffers together a kernel has at most 48 KiB."""
    return T.alloc_buffer((size,), dtype, scope="shared")


def registers(size: int, dtype: str) -> Any:
    """Registers of each thread, if every index into it is known when the kernel is compiled."""
    return T.alloc_buffer((size,), dtype, scope="local")


def slot(value: Any) -> Any:
    """A value kept in a register, which nothing else is put in place of."""
    buffer = registers(1, str(value.ty.dtype))
    T.buffer_store(buffer, value, [0])
    return buffer[0]


def barrier() -> None:
    """All threads of the block arrive before one goes on; what they wrote is then seen by all."""
    T.evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def take(target: Any, source: Any, at: Any, nbytes: int) -> None:
    """16, 8, 4 or 2 bytes, aligned so, from a tensor into registers."""
    T.evaluate(_move(f"dcc_take{nbytes}", target[0], source[at]))


def put(target: Any, at: Any, source: Any, nbytes: int) -> None:
    """16, 8, 4 or 2 bytes from registers into a tensor, aligned so."""
    T.evaluate(_move(f"dcc_put{nbytes}", target[at], source[0]))


def _move(name: str, target: Any, source: Any) -> Any:
    return tirx.call_extern("void", name, T.address_of(target), T.address_of(source))


def report(message: str) -> None:
    """Leaves the host an error to raise. The kernel goes on: it must stay within its tensors.

    Messages are ``DCxxxx: place: what``; the place, which may hold any text, goes as the name.
    """
    code, _, rest = message.partition(": ")
    place, _, what = rest.rpartition(": ")
    zero = i64(0)
    data = place.encode()[:128].decode(errors="ignore")
    text, count = StringImm(f"{code}: $: {what}"), i32(len(data.encode()))
    T.evaluate(
        tirx.call_extern("void", "dcc_report", text, zero, zero, zero, zero, StringImm(data), count)
    )


def attributes(name: str) -> None:
    """What marks a function as written by hand: nothing fuses or schedules it, or adds barriers."""
    T.func_name(name)
    T.func_attr({"tirx.noalias": True, "op_pattern": 8, "dcc.kernel": name})
