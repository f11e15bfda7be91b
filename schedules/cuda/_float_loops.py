"""What the float kernels share: unrolled loops, copies of a block, columns of C.

Loops here stay loops until NVIDIA's compiler unrolls them: TVM then has a few hundred nodes to
look at instead of ten thousand, and arrays of registers are still indexed by constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...workload import Conv, Gemm
from ._float_epilogue import finished
from ._ir import T, address, call, ceil_div, do, i32, i64, local, tirx

__all__ = ["Output", "as_float", "as_word", "copies", "each", "flat", "pragmas", "quad"]


@contextmanager
def pragmas() -> Iterator[None]:
    """Within it `T.unroll` becomes a loop under ``#pragma unroll``."""
    zero = i32(0)
    with T.attr(zero, "pragma_unroll_explicit", zero):
        yield


@contextmanager
def each(count: int) -> Iterator[Any]:
    """An index that is 0 .. count - 1, unrolled; no loop for a count of one."""
    if count == 1:
        yield i32(0)
        return
    with T.unroll(0, count) as index:
        yield index


def quad(first: Any) -> Any:
    """Index of 4 consecutive elements."""
    return T.ramp(first, 1, 4)


def as_float(word: Any) -> Any:
    return call("float32", "as_float", word)


def as_word(value: Any) -> Any:
    return call("uint32", "as_uint", value)


def copies(total: int, threads: int, thread: Any, one: Callable[[Any, Any], None]) -> None:
    """one(pass, e) for every e below `total`, spread over the threads of a block."""
    with each(ceil_div(total, threads)) as index:
        e = T.Bind(thread + index * threads)
        if total % threads:
            with T.If(e < total), T.Then():
                one(index, e)
        else:
            one(index, e)


@dataclass(frozen=True)
class Output:
    """C as rows of `pitch` f32, of which `columns` from `first` on are this block's to write.

    `residual` has the same shape. Scale and bias are f32 at these bytes of `w`, by column, padded
    to whole tiles; None: there is none.
    """

    workload: Gemm | Conv
    w: Any
    scale: int | None
    bias: int | None
    c: Any
    residual: Any
    pitch: int
    columns: int
    first: Any = 0
    padded: Any = 0  # the first column of the group, where W counts padding too

    def factors(self, count: int, width: int, column: Callable[[Any], Any]) -> Any:
        """Scale and bias, or None, of `width` columns each from column(0) .. column(count - 1)."""
        found = []
        for at in (self.scale, self.bias):
            words = None if at is None else local(count * width, "uint32")
            if at is not None:
                with each(count) as j:
                    where = tirx.Cast("int64", column(j) + self.padded) * 4 + i64(at)
                    place = address(self.w, where)
                    if width == 1:
                        T.buffer_store(words, call("uint32", "load4", place), [j])
                    else:
                        do(f"load{4 * width}", address(words, j * width), place)
            found.append(words)
        return found

    def store(self, row: Any, column: Any, width: int, sums: Any, factors: Any, at: Any) -> None:
        """`width` elements of a row from `column`, those that exist; at: of the first's factors.

        sums(i) is the sum of element i.
        """
        scale, bias = factors
        offset = T.Bind(tirx.Cast("int64", row) * self.pitch + self.first + column)

        def one(i: Any, other: Any) -> Any:
            a, b = (None if f is None else as_float(f[at + i]) for f in (scale, bias))
            return as_word(finished(self.workload, sums(i), a, b, other))

        if width > 1 and self.columns % width == 0 and self.pitch % width == 0:
            with T.If(column < self.columns), T.Then():
                out, r = local(width, "uint32"), local(width, "uint32")
                if self.residual is not None:
                    do(f"load{4 * width}", address(r, 0), flat(self.residual, offset))
                with each(width) as i:
                    other = None if self.residual is None else as_float(r[i])
                    T.buffer_store(out, one(i, other), [i])
                do(f"store{4 * width}", flat(self.c, offset), address(out, 0))
            return
        with each(width) as i, T.If(column + i < self.columns), T.Then():
            other = None
            if self.residual is not None:
                other = as_float(call("uint32", "load4", flat(self.residual, offset + i)))
            do("store4", flat(self.c, offset + i), one(i, other))


def flat(buffer: Any, offset: Any) -> Any:
    """A pointer to an element by its number in row-major order."""
    return address(buffer, *[0] * (len(buffer.shape) - 1), offset)
