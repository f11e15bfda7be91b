"""Float GEMM whose weights are s8 codes with a scale per column; the named kernels say more.

    W: panels of codes, see `_float_gemm` | scale, a vector after the other | bias, likewise

A step widens the codes of a vector by vpmovsxbd and vcvtdq2ps, both exact, once for all rows of a
tile, and leaves the scale to the end of the tile: y = fma(sum, scale, bias). With one row that is
three instructions for every vector, an FMA among them, where f32 weights take one: Zen 4 widens
30e9 codes/s, which is 1.2 times as fast as f32 weights from L3, but slower than f16. Codes pay
where the weights come from memory (4 and 1.9 times), and with rows enough cost nothing.

Left out: code k of a dword as the upper byte of a load that begins at it, less the lower three by
a mask, then vcvtdq2ps: 35e9 codes/s in a loop by hand, a layout of its own and tails of k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...machine import Machine
from ...workload import Gemm, GemmWeights
from ._epilogue import Epilogue
from ._float_gemm import Builder, FloatGemm, Layout, Tile, ceil_div
from ._ir import T, bits, i64, prim_func, ramp, tirx

_PARALLEL_US = 20.0  # less is not worth sharing
_WIDENED_PER_US = 30e3  # codes, of one thread with one row
_FETCHING_ROWS = 2  # one row reads so fast that the hardware fetches far enough ahead
_AHEAD = 2048  # bytes: half a page, at whose end the hardware stops
_SLOWER = {1: 1.0, 2: 1.2}  # steps of so many 512-bit vectors: they wait for each other


@dataclass(frozen=True)
class CodedLayout(Layout):
    """`scaled_bias`: a bias follows the scale. Base class: it has no bias to add by itself."""

    scaled_bias: bool = False

    @property
    def scale(self) -> int:
        return ceil_div(self.columns * self.k, 64) * 64

    @property
    def bias(self) -> int:
        return self.scale + ceil_div(self.columns * 4, 64) * 64

    @property
    def nbytes(self) -> int:
        return self.bias + (self.bias - self.scale if self.scaled_bias else 0)


class CodedGemm(FloatGemm):
    """C = activation((A x B) * scale + bias) for f32 A, s8 B, f32 accumulation."""

    weights = "s8"

    def layout(self, workload: Gemm, params: Tile) -> CodedLayout:
        biased = workload.bias != "none"
        return CodedLayout(params.lanes, params.nr, workload.n, workload.k, 1, False, biased)

    def pack(self, workload: Gemm, weights: GemmWeights, params: Tile) -> np.ndarray:
        lay = self.layout(workload, params)
        b = np.zeros((lay.k, lay.columns), np.int8)
        b[:, : lay.n] = weights.b
        step = lay.nr * lay.lanes
        panels = [b[:, i : i + step].reshape(-1) for i in range(0, lay.columns, step)]
        out = np.zeros(lay.nbytes, np.uint8)
        out[: b.size] = np.concatenate(panels).view(np.uint8)
        assert weights.scale is not None
        factors = [(lay.scale, weights.scale)]
        if lay.scaled_bias:
            assert weights.bias is not None
            factors.append((lay.bias, weights.bias))
        for at, row in factors:
            raw = np.ascontiguousarray(row, np.float32).view(np.uint8)
            out[at : at + raw.size] = raw
        return out

    def _cycles(self, workload: Gemm, params: Tile, m: int, machine: Machine) -> float:
        """As the base class counts, from measurements on Zen 4: a vector of codes and its FMAs."""
        lay = self.layout(workload, params)
        blocks = ceil_div(m, params.mr)
        height = ceil_div(m, blocks)

        def panel(nr: int) -> float:
            if lay.lanes == 16:
                vector = max(1.4 + 0.6 * height, 1.02 * height) * _SLOWER.get(nr, 1.05)
            else:
                vector = max(0.6 + 0.4 * height, 0.5 * height)
            loads = 1.13 * (nr + height) / 2
            return blocks * (lay.k * max(nr * vector, loads) + 20 + height * nr)

        rest = lay.vectors - lay.whole * lay.nr
        total = lay.whole * panel(lay.nr) + (panel(rest) if rest else 0.0)
        if lay.lanes < machine.lanes:
            total *= 1.3
        units = lay.panels * blocks
        return total * (1 + ceil_div(units, 2) * 2 / units)

    def build(self, workload: Gemm, params: Tile, machine: Machine) -> Any:
        return _Builder(self, workload, params).function()


class _Builder(Builder):
    lay: CodedLayout
    fetches: bool

    def function(self) -> Any:
        work, lay = self.workload, self.lay
        with prim_func(self.kernel.name) as builder:
            m = tirx.Var("m", "int64") if work.m is None else i64(work.m)
            self.a = T.arg("a", T.buffer((m, work.k), "float32"))
            self.w = T.arg("w", T.buffer((lay.nbytes,), "uint8"))
            self.c = T.arg("c", T.buffer((m, work.n), "float32"))
            self.epilogue = _Scaled(work, lay, self.w, self.c)
            if work.m is None:
                self._dynamic(m)
            else:
                height = ceil_div(work.m, ceil_div(work.m, self.params.mr))
                self._units(work.m, height, self._us(work.m) >= _PARALLEL_US)
        return builder.get()

    def _us(self, m: int) -> float:
        return max(super()._us(m), self.workload.n * self.workload.k / _WIDENED_PER_US)

    def _tile(self, row: Any, height: int, panel: Any, columns: int) -> None:
        self.fetches = height >= _FETCHING_ROWS
        super()._tile(row, height, panel, columns)

    def _weight(self, offset: Any) -> Any:
        if self.fetches:  # what lies after W may be asked for: that is no fault
            place = T.address_of(self.w[offset + _AHEAD])
            T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", place, 0, 3, 1))
        codes = bits(f"int8x{self.lay.lanes}", self.w[ramp(offset, self.lay.step)])
        return tirx.Cast(self.vector, codes)


class _Scaled(Epilogue):
    """Scale and bias, each a rounding less than apart, before the activation."""

    def __init__(self, workload: Gemm, lay: CodedLayout, w: Any, c: Any) -> None:
        super().__init__(workload, lay.lanes, True, c)
        self.lay, self.w = lay, w

    def store_floats(self, rows: list[list[Any]], at: Any, valid: int) -> None:
        lay, lanes, column = self.lay, self.lanes, at[1]

        def factors(first: int) -> list[Any]:
            places = (first + (column + j * lanes) * 4 for j in range(len(rows[0])))
            dtype = f"float32x{lanes}"
            return [T.Bind(bits(dtype, self.w[ramp(place, lanes * 4)])) for place in places]

        scale = factors(lay.scale)
        bias = factors(lay.bias) if lay.scaled_bias else []
        scaled = [[self._scaled(y, j, scale, bias) for j, y in enumerate(ys)] for ys in rows]
        super().store_floats(scaled, at, valid)
