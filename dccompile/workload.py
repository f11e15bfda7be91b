"""Workloads: what the compiler recognised in a model, independent of any kernel or machine.

A workload says operator, shapes, dtypes and epilogue, nothing about tiles. Front end, reference,
schedules, tuning records and benches all speak of these records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from math import prod
from typing import Any

import numpy as np

_TABLES = 1 << 30  # bytes
_CLIP = (0.0, 6.0)  # what stands for the bounds of any activation 'clip' in tuning
INT8_LIMITS = {"u8": (0, 255), "s8": (-128, 127)}
NUMPY = {
    "u8": "uint8",
    "s8": "int8",
    "s32": "int32",
    "s64": "int64",
    "f32": "float32",
    "f16": "float16",
}


@dataclass(frozen=True)
class Gemm:
    """C[m, n] = epilogue(sum_k (A[m, k] - a_zero) * (B[k, n] - b_zero[n])).

    Integers (`a` is u8 or s8, `b` is s8). acc is exact s32 (modulo 2**32) and includes an s32
    bias. Then, every operation rounding once, half to even:

    - out s32:    C = acc
    - out f32:    y = f32(acc) * scale[n], or fma(f32(acc), scale[n], bias[n]) with an f32 bias;
                  C = activation(y)
    - out u8, s8: y as above, the factors already divided by the output scale;
                  C = clamp(saturate(rint(y) + zero_point))

    With `runtime` quantization of A, a_zero (dtype of A) and, unless out is s32, a_scale (f32)
    are tensors of shape (1,); scale[n] is then fl(a_scale * b_scale[n]).

    Floats (`a` is f32, `b` is f32, f16 or s8, out f32): acc = sum_k A * f32(B), f32 accumulation
    in any order; y = acc + bias[n]; C = activation(y). With `b` s8 the weights are codes:
    y = acc * scale[n], or fma(acc, scale[n], bias[n]), either rounded once. Sums are of products
    with codes: they overflow where these do, 1 / scale[n] before products with the weights.
    """

    m: int | None  # rows of A; None: known when called
    n: int
    k: int
    a: str  # u8 | s8 | f32
    b: str  # s8 | f32 | f16
    out: str  # u8 | s8 | s32 | f32
    bias: str = "none"  # none | s32 (folded into the correction) | f32
    runtime: bool = False  # A's zero point and scale are tensors
    b_zero: bool = False  # some column of B has a zero point other than 0
    b_bits: int = 8  # 7: every |b| <= 64, so that pairs of u8*s8 products fit 16 bits
    zero_point: int = 0  # of an u8 or s8 output
    clamp: tuple[int, int] | None = None  # of an u8 or s8 output, in output codes
    activation: str = "none"  # of an f32 output: none | relu | sigmoid | tanh | clip
    clip: tuple[float, float] | None = None  # bounds of activation 'clip'
    bounded: bool = False  # |y| < 2**31 is proven for every input
    outliers: tuple[int, ...] = ()  # of B, see `outliers.counts`; (): not counted
    spill: int = 0  # k-steps whose sums stay in 16 bits by calibration; 0: not known

    op = "gemm"

    @property
    def ops(self) -> int:
        """Useful operations (multiply and add counted apart); of one row if m is not known."""
        return 2 * (self.m or 1) * self.n * self.k

    @property
    def dtypes(self) -> str:
        """The dtype part of kernel names: A, B, accumulator."""
        return self.a + self.b + ("f32" if self.a == "f32" else "s32")

    @property
    def shape(self) -> dict[str, int | None]:
        return {"m": self.m, "n": self.n, "k": self.k}

    def describe(self) -> str:
        """One line for people: ``gemm u8s8s32 64x512x512 -> u8 +bias``."""
        m = "?" if self.m is None else str(self.m)
        extra = [f"+{self.bias} bias"] if self.bias != "none" else []
        extra += [self.activation] if self.activation != "none" else []
        extra += ["runtime-scaled"] if self.runtime else []
        return " ".join([f"gemm {self.dtypes} {m}x{self.n}x{self.k} -> {self.out}", *extra])

    def representative(self) -> Gemm:
        """The workload that stands for this one in tuning: what no speed depends on is the same."""
        low, high = INT8_LIMITS.get(self.out, (0, 0))
        clamp = (low + 1, high - 1) if self.clamp else None  # both ends do something
        return replace(self, zero_point=0, clamp=clamp, clip=_CLIP if self.clip else None)

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, **asdict(self)}


@dataclass
class GemmWeights:
    """The constant operands of a Gemm.

    b (k, n) s8, f32 or f16 · scale (n,) f32: of s8 weights the factor of the accumulator, with
    `runtime` the scale of B alone · bias (n,) s32 or f32 · a_zero: A's zero point unless
    `runtime` · b_zero (n,) s32.
    """

    b: np.ndarray
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    a_zero: int = 0
    b_zero: np.ndarray | None = None


def accumulator_bound(weights: GemmWeights, a: str) -> np.ndarray:
    """Largest |acc| that any A of dtype `a` can give, per column, as float64 (n,).

    `weights.a_zero` is used where it is static; callers with a runtime zero point must not use
    the bound.
    """
    low, high = INT8_LIMITS[a]
    reach = max(high - weights.a_zero, weights.a_zero - low)
    b = weights.b.astype(np.float64)
    if weights.b_zero is not None:
        b = b - weights.b_zero
    bound = np.abs(b).sum(axis=0) * reach
    if weights.bias is not None and weights.bias.dtype == np.int32:
        bound = bound + np.abs(weights.bias.astype(np.float64))
    return bound


@dataclass(frozen=True)
class Residual:
    """A tensor R (batch, d, h, w, filters), of C's shape, that is added to a convolution.

    `dtype` is u8 or s8 for integer convolutions, f32 otherwise. `inner` is the type, u8 or s8, to
    which the convolution itself is quantized before the sum; "": not at all. `first`: R is the
    first operand of that sum, which matters for its rounding. Which numbers go into it is in
    `ResidualWeights`; the arithmetic in `Conv`.
    """

    dtype: str  # u8 | s8 | f32
    inner: str = ""  # "" | u8 | s8
    first: bool = False


@dataclass(frozen=True)
class Conv:
    """C[n, d, h, w, o]: convolution in channels-last layout, three spatial dims, d and h may be 1.

    acc = sum over kd, kh, kw, c of
          (A[n, d*sd + kd*dd - front, h*sh + kh*dh - top, w*sw + kw*dw - left, g*cg + c] - a_zero)
          * B[kd, kh, kw, c, o],  cg = channels / groups, g = o / (filters / groups);
    what lies outside of A adds nothing. A has `channels`, C `filters` channels, A is u8 and B s8,
    or both are f32. acc is exact s32 (the front end promises |acc| < 2**31), with an s32 bias in
    it. Then, every operation rounding once, half to even:

    - out s32:    C = acc
    - out f32:    y = f32(acc) * scale[o], or fma(f32(acc), scale[o], bias[o]) with an f32 bias;
                  C = activation(y)
    - out u8, s8: y as above, the factors already divided by the output scale;
                  C = clamp(saturate(rint(y) + zero_point))
    - with `residual` (out u8 or s8), its weights being a, b, c, shift, low, high:
                  `inner`: q = min(max(rint(y) + shift, low), high);
                           y = fma(q, a, fma(f32(R), b, c)), or with `first`
                           y = fma(f32(R), b, fma(q, a, c)): as ONNX Runtime's QLinearAdd, bit by
                           bit; c has the zero points in it, also that of C
                  else:    y = y + fma(f32(R), b, c)
                  C = clamp(saturate(rint(y) + zero_point))

    Floats (out f32): y = sum A * B, f32 accumulation in any order, + bias[o] (+ R);
    C = activation(y).

    Values that differ between otherwise equal layers (zero points, clamps, scales) are in the
    weights, so that such layers share one kernel.
    """

    batch: int | None  # None: known when called
    size: tuple[int, int, int]  # of A: d, h, w
    channels: int
    filters: int
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int] = (1, 1, 1)
    dilations: tuple[int, int, int] = (1, 1, 1)
    pads: tuple[tuple[int, int], ...] = ((0, 0), (0, 0), (0, 0))  # before and after, per dim
    groups: int = 1
    a: str = "u8"  # u8 | f32
    b: str = "s8"  # s8 | f32
    out: str = "u8"  # u8 | s8 | s32 | f32
    bias: str = "none"  # none | s32 | f32
    b_bits: int = 8  # 7: every |b| <= 64, so that pairs of u8*s8 products fit 16 bits
    shifted: bool = False  # the zero point of C is not 0
    clamped: bool = False  # C is clamped to fewer codes than its type has
    activation: str = "none"  # of an f32 output: none | relu | sigmoid | tanh | clip
    clip: tuple[float, float] | None = None  # bounds of activation 'clip'
    bounded: bool = False  # |y| < 2**31 is proven for every input
    padded: bool = False  # a_zero is not 0: taps outside of A change the sum of those inside
    residual: Residual | None = None

    op = "conv"

    @property
    def outputs(self) -> tuple[int, int, int]:
        """Spatial dims of C."""
        d, h, w = (
            (size + sum(pad) - (k - 1) * dilation - 1) // stride + 1
            for size, pad, k, dilation, stride in zip(
                self.size, self.pads, self.kernel, self.dilations, self.strides, strict=True
            )
        )
        return d, h, w

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def depthwise(self) -> bool:
        """Whether every channel has a filter, and only one, of its own."""
        return self.groups == self.channels == self.filters

    @property
    def ops(self) -> int:
        """Operations (multiply and add counted apart), taps in the padding included."""
        taps = prod(self.kernel) * self.group_channels
        return 2 * (self.batch or 1) * prod(self.outputs) * self.filters * taps

    @property
    def dtypes(self) -> str:
        """The dtype part of kernel names: A, B, accumulator."""
        return self.a + self.b + ("f32" if self.a == "f32" else "s32")

    @property
    def shape(self) -> dict[str, Any]:
        names = "batch size channels filters kernel strides dilations pads groups".split()
        return {name: getattr(self, name) for name in names}

    def describe(self) -> str:
        """One line for people: ``conv u8s8s32 1x56x56x64 -> 256, 3x3 stride 2 -> u8``."""

        def dims(values: tuple[int, int, int]) -> str:
            return "x".join(map(str, values[1:] if values[0] == 1 else values))

        batch = "?" if self.batch is None else str(self.batch)
        size = dims(self.size) if self.kernel[0] == 1 else "x".join(map(str, self.size))
        parts = [f"conv {self.dtypes} {batch}x{size}x{self.channels} -> {self.filters},"]
        parts.append(dims(self.kernel) if self.kernel[0] == 1 else "x".join(map(str, self.kernel)))
        if max(self.strides) > 1:
            parts.append(f"stride {dims(self.strides)}")
        if max(self.dilations) > 1:
            parts.append(f"dilation {dims(self.dilations)}")
        if self.groups > 1:
            parts.append("depthwise" if self.depthwise else f"{self.groups} groups")
        parts.append(f"-> {self.out}")
        parts += [f"+{self.bias} bias"] if self.bias != "none" else []
        parts += ["+residual"] if self.residual else []
        parts += [self.activation] if self.activation != "none" else []
        return " ".join(parts)

    def representative(self) -> Conv:
        """The workload that stands for this one in tuning."""
        return replace(self, clip=_CLIP if self.clip else None)

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, **asdict(self)}


@dataclass(frozen=True)
class ResidualWeights:
    """Numbers of a residual sum, see `Conv`. shift, low and high are those of the codes q."""

    a: float = 1.0
    b: float = 1.0
    c: float = 0.0
    shift: int = 0
    low: int = -128
    high: int = 127


@dataclass
class ConvWeights:
    """The constant operands of a Conv.

    b (kd, kh, kw, channels / groups, filters) s8 or f32 · scale (filters,) f32: the factor of the
    accumulator · bias (filters,) s32 or f32 · a_zero: A's zero point · zero_point, clamp: of an u8
    or s8 output, in its codes.
    """

    b: np.ndarray
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    a_zero: int = 0
    zero_point: int = 0
    clamp: tuple[int, int] | None = None
    residual: ResidualWeights | None = None


@dataclass(frozen=True)
class EmbeddingBag:
    """out[b, t, :] = reduce_i weight[b, t, i] * row(t, index[b, t, i]), f32, for every bag b.

    `rows` has one entry per table t; all tables of a site have the same width and storage and
    are served by one launch. A row of storage u8 or u4 is its codes, then its scale and bias:
    value = f32(code) * scale + bias, each f32 or f16 as `scale` says; u4 packs two codes a byte,
    the lower nibble first, and rounds odd widths up. An empty bag is 0, 'mean' divides the sum by
    the number of terms. Terms are added in order, in f32, every operation rounding once:

    - f32, f16: y = y + x, or fma(x, weight, y)
    - u8, u4:   y = fma(f32(code), scale, y) and z = z + bias, with weights
                y = fma(f32(code), scale * weight, y) and z = fma(bias, weight, z); then y + z

    Bags: with `layout` 'fixed' index is (bags, tables, pooling); with 'offsets' and 'lengths'
    there is one table, index is (terms,) and a second tensor (bags,), of the same dtype, says where
    each bag begins or how long it is; 'offsets+1' has (bags + 1,), the end of the last bag too.
    Terms whose index is `padding` are skipped and not counted. Any other index must be one of
    0 .. rows-1, or, with `negative`, one of -rows .. rows-1, those below 0 counting from the end.
    """

    rows: tuple[int, ...]
    dim: int
    storage: str = "f32"  # f32 | f16 | u8 | u4
    scale: str = "f32"  # f32 | f16: of the scale and bias in a row of codes
    mode: str = "sum"  # sum | mean
    layout: str = "fixed"  # fixed | offsets | offsets+1 | lengths
    bags: int | None = None  # None: known when called
    pooling: int | None = None  # with layout 'fixed': terms per bag
    index: str = "s64"  # s32 | s64
    weighted: bool = False
    padding: int | None = None
    negative: bool = False

    op = "embedding_bag"

    @property
    def tables(self) -> int:
        return len(self.rows)

    @property
    def row_bytes(self) -> int:
        """Bytes from one row of a table to the next."""
        half = 4 if self.scale == "f16" else 8
        return {
            "f32": 4 * self.dim,
            "f16": 2 * self.dim,
            "u8": self.dim + half,
            "u4": (self.dim + 1) // 2 + half,
        }[self.storage]

    @property
    def dtypes(self) -> str:
        return f"{self.storage}f32"

    @property
    def shape(self) -> dict[str, Any]:
        return {"rows": self.rows, "dim": self.dim, "bags": self.bags, "pooling": self.pooling}

    def describe(self) -> str:
        tables = f"{self.tables} x " if self.tables > 1 else ""
        return (
            f"embedding_bag {self.storage} {tables}{max(self.rows)}x{self.dim}, "
            f"{self.layout} bags, {self.mode}{' weighted' if self.weighted else ''}"
        )

    def representative(self) -> EmbeddingBag:
        """The workload that stands for this one in tuning: tables of at most 1 GiB in all.

        More rows are as slow, as no row is in a cache already, and need more memory to measure.
        """
        most = max(1, _TABLES // (self.tables * self.row_bytes))
        rows = tuple(min(count, most) for count in self.rows)
        return replace(self, rows=rows, padding=None if self.padding is None else 0)

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, **asdict(self)}


@dataclass
class EmbeddingTables:
    """The constant operands of an EmbeddingBag.

    Every table is (rows, row_bytes) uint8 rows of codes, scale and bias, or (rows, dim) f32 or
    f16. `names` are those that errors call the tables by; by default their numbers.
    """

    tables: list[np.ndarray]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Interaction:
    """out[b] = dense[b], then the dot products of pairs of the vectors x of b, f32.

    x[0] is dense[b] (dim,), x[1] .. x[vectors - 1] are rows[b] (vectors - 1, dim). Pairs (i, j)
    are in the order of i, then of j; with order 'lower' j < i, with 'upper' j > i, and j = i too
    with `diagonal`. Sums of dim products, f32, in any order.
    """

    vectors: int
    dim: int
    bags: int | None = None  # None: known when called
    order: str = "lower"  # lower | upper
    diagonal: bool = False

    op = "interaction"
    dtypes = "f32f32f32"

    @property
    def pairs(self) -> int:
        return self.vectors * (self.vectors - 1) // 2 + self.vectors * self.diagonal

    @property
    def shape(self) -> dict[str, Any]:
        return {"bags": self.bags, "vectors": self.vectors, "dim": self.dim}

    def row(self, i: int) -> range:
        """The j that vector i is multiplied with."""
        own = int(self.diagonal)
        return range(i + own) if self.order == "lower" else range(i + 1 - own, self.vectors)

    def describe(self) -> str:
        bags = "?" if self.bags is None else str(self.bags)
        return f"interaction f32 {bags}x{self.vectors}x{self.dim}, {self.order} triangle"

    def representative(self) -> Interaction:
        """The workload that stands for this one in tuning: itself."""
        return self

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, **asdict(self)}


Workload = Gemm | Conv | EmbeddingBag | Interaction
_OPS: dict[str, Any] = {kind.op: kind for kind in (Gemm, Conv, EmbeddingBag, Interaction)}


def from_json(data: Mapping[str, Any]) -> Workload:
    """The workload that `to_json` wrote, also if JSON made lists of its tuples.

    Raises ValueError, with the reason, for an unknown operator, fields that are missing, unknown,
    or of another kind than the operator's, and sizes that no tensor has.
    """
    values = dict(data)
    op = values.pop("op", None)
    kind = _OPS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise ValueError(f"operator {op!r}, known are {', '.join(_OPS)}")
    known = {f.name: f for f in fields(kind)}
    unknown = sorted(values.keys() - known)
    missing = [n for n, f in known.items() if f.default is MISSING and n not in values]
    if unknown or missing:
        lacks = [f"lacks {', '.join(missing)}"] if missing else []
        has = [f"has the unknown {', '.join(unknown)}"] if unknown else []
        raise ValueError(f"{op} {' and '.join([*lacks, *has])}")
    for name, value in values.items():
        values[name] = value = tuples(value)
        if name == "residual" and isinstance(value, Mapping):
            try:
                values[name] = Residual(**value)
            except TypeError:
                raise ValueError(f"{op}: residual {dict(value)} is not one") from None
        elif not _fits(value, str(known[name].type)):
            raise ValueError(f"{op}: {name} is {value!r}, not {known[name].type}")
    work: Workload = kind(**values)
    for name, value in work.shape.items():
        sizes = value if isinstance(value, tuple) else (value,)
        if name != "pads" and not all(size is None or 0 < size < 1 << 31 for size in sizes):
            raise ValueError(f"{op}: {name} is {value!r}, sizes are positive and below 2**31")
    if isinstance(work, Conv):
        if work.channels % work.groups or work.filters % work.groups:
            raise ValueError(f"{op}: {work.groups} groups of {work.channels}, {work.filters}")
        if min(work.outputs) < 1 or max(map(abs, sum(work.pads, ()))) >= 1 << 31:
            raise ValueError(f"{op}: an output of {work.outputs}")
    return work


def tuples(value: Any) -> Any:
    """What JSON made of tuples, as tuples again."""
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of the kind that a field's annotation names."""
    if value is None:
        return kind.endswith("None")
    kind = kind.removesuffix(" | None")
    if not isinstance(value, tuple):
        return type(value).__name__ == kind or (kind == "float" and type(value) is int)
    if not kind.startswith("tuple["):
        return False
    inner = kind[len("tuple[") : -1]
    if inner.endswith(", ..."):
        return all(_fits(v, inner[: -len(", ...")]) for v in value)
    kinds = inner.split(", ")
    return len(kinds) == len(value) and all(map(_fits, value, kinds))
