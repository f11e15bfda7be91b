"""What all parts of the code of an integer convolution's block know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...workload import Conv
from ._conv_epilogue import ConvEpilogue
from ._conv_shape import Shape
from ._ir import ceil_div, tirx

if TYPE_CHECKING:
    from ._conv_int import Layout
    from .conv_u8s8s32_mma import Params

__all__ = ["Block", "u32"]


class Block:
    """A block of threads that computes a tile of C: its operands, its place, its threads' places.

    `a`, `r` and `c` are A, R and C as one dim; `first` is the first row of the tile, `left` how
    many there are from it on, at most bm; `panel` the number of its columns' panel.
    """

    w: Any
    a: Any
    r: Any
    c: Any
    memory: Any
    end: ConvEpilogue
    filling: bool  # taps outside are filled with A's zero point, not with 0
    acc: Any
    group: Any
    panel: Any
    first: Any
    left: Any
    thread: Any
    lane: Any
    warp_m: Any
    warp_n: Any
    warp_k: Any

    def __init__(self, name: str, work: Conv, params: Params, lay: Layout) -> None:
        self.name, self.work, self.p, self.lay = name, work, params, lay
        self.shape = Shape(work)
        self.own = work.filters // work.groups  # filters of a group
        self.steps = lay.steps
        largest = max(self.shape.image, self.shape.pixels * work.filters)
        small = work.batch is not None and (work.batch + 1) * largest < 1 << 31
        self.index = "int32" if small else "int64"
        # how A is copied: every thread has a column of pieces and some rows of it
        self.columns = params.depth // self.shape.unit
        self.apart = params.threads // self.columns
        self.mine = ceil_div(params.bm, self.apart)

    def at(self, value: Any) -> Any:
        """As an index of A, R or C."""
        return tirx.const(value, self.index) if isinstance(value, int) else self._cast(value)

    def _cast(self, value: Any) -> Any:
        return value if self.index == "int32" else tirx.Cast("int64", value)


def u32(value: int) -> Any:
    return tirx.const(value, "uint32")
