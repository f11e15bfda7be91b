"""Vocabulary of the CUDA schedules: blocks, threads, memories, and the functions of device.cuh.

A kernel places its barriers itself: nothing is added to hand-written code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

__all__ = [
    "T",
    "address",
    "barrier",
    "call",
    "ceil_div",
    "do",
    "i32",
    "i64",
    "launch",
    "local",
    "prim_func",
    "shared",
    "tirx",
    "when",
]


@contextmanager
def prim_func(name: str) -> Iterator[IRBuilder]:
    """Opens a PrimFunc named `name` whose buffers do not alias; ``builder.get()`` returns it."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        yield builder


@contextmanager
def launch(grid: tuple[Any, ...], block: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """A kernel over blocks (x, y, z) of threads (x, y, z), trailing ones may be left out.

    Gives the indices, those of the block first; extents of `grid` may be symbolic int64.
    """
    with ExitStack() as stack:
        indices = []
        for kind, extents in (("block", grid), ("thread", block)):
            for dim, extent in zip("xyz", extents, strict=False):
                indices.append(stack.enter_context(T.thread_binding(0, extent, f"{kind}Idx.{dim}")))
        yield tuple(indices)


def i32(value: int) -> Any:
    return tirx.const(value, "int32")


def i64(value: int) -> Any:
    return tirx.const(value, "int64")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def local(size: int, dtype: str) -> Any:
    """Registers of each thread, if every index into it is known when the kernel is compiled."""
    return T.alloc_buffer((size,), dtype, scope="local")


def shared(size: int, dtype: str) -> Any:
    """Memory of a block; of all such buffers together a kernel has at most 48 KiB."""
    return T.alloc_buffer((size,), dtype, scope="shared")


def barrier() -> None:
    """All threads of the block arrive before one goes on; what they wrote is then seen by all."""
    T.evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def address(buffer: Any, *index: Any) -> Any:
    """A pointer to an element."""
    return T.address_of(buffer[index if len(index) > 1 else index[0]])


def call(dtype: str, name: str, *args: Any) -> Any:
    """The value of a function of device.cuh, without the `dcc_` in its name."""
    return tirx.call_extern(dtype, f"dcc_{name}", *args)


def do(name: str, *args: Any) -> None:
    """A call of a function of device.cuh that has no value."""
    T.evaluate(call("void", name, *args))


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Statements for which a condition must hold; None: none."""
    with ExitStack() as stack:
        if condition is not None:
            stack.enter_context(T.If(condition))
            stack.enter_context(T.Then())
        yield
