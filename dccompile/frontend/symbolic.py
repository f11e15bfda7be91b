"""Small values that follow from shapes and constants alone, computed while importing.

Exporters compute shapes in the graph: Shape, Gather, Mul, Concat, Reshape. `evaluate` runs such
nodes on numbers and on expressions of the symbols, so that the shapes they lead to are
expressions too. Integers are thought of as unbounded, and dims as at least 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator
from tvm import ir, te, tirx

from .arithmetic import COMPARE, RULES, Ratio, as_float, plain, ratio_over, whole
from .symbols import Symbols

MOST = 64  # elements of a value with symbols
MOST_STATIC = 4096  # elements of a value without


@dataclass(frozen=True, eq=False)
class Known:
    """A value: numbers, or an object array of ints, int64 expressions and Ratios."""

    array: np.ndarray
    dtype: np.dtype

    @property
    def static(self) -> bool:
        return self.array.dtype != object

    def entries(self) -> list[Any]:
        return list(self.array.reshape(-1))

    def dims(self) -> list[Any] | None:
        """The entries as ints and expressions; None where one is of another kind."""
        entries = self.entries()
        if any(isinstance(e, (Ratio, Fraction)) for e in entries):
            return None
        if self.static and self.dtype.kind not in "iub":
            if not all(np.isfinite(e) and e == int(e) for e in entries):
                return None
            return [int(e) for e in entries]
        return [int(e) if isinstance(e, (int, np.integer, tirx.IntImm)) else e for e in entries]


def known(array: np.ndarray) -> Known:
    """A value without symbols."""
    return Known(array, array.dtype)


def packed(entries: list[Any], shape: tuple[int, ...], dtype: np.dtype) -> Known:
    """A value of entries in row-major order."""
    if all(isinstance(e, (int, float, Fraction, np.generic)) for e in entries):
        numbers = [e if isinstance(e, np.generic) or not isinstance(e, Fraction) else float(e)
                   for e in entries]  # fmt: skip
        return known(np.array(numbers, dtype).reshape(shape))
    array = np.empty(len(entries), object)
    array[:] = entries
    return Known(array.reshape(shape), dtype)


def literal(array: np.ndarray) -> Any:
    """A Relax constant of the array's own type, which `relax.const` alone narrows from 64 bits."""
    from tvm import relax

    return relax.const(array, str(array.dtype))


def tensor_of(bb: Any, value: Known) -> Any:
    """The value as a tensor: a constant, or computed from the symbols."""
    if value.static:
        return literal(value.array)
    entries, dtype = value.entries(), str(value.dtype)
    shape = value.array.shape
    scalars = [e.top if isinstance(e, Ratio) else e for e in entries]
    scalars = [e for e in scalars if ir.is_prim_expr(e)]

    def build(*given: Any) -> te.Tensor:
        left = list(given)

        def number(entry: Any) -> Any:
            if isinstance(entry, Ratio):
                return tirx.Cast(dtype, left.pop(0)) / tirx.const(entry.under, dtype)
            if ir.is_prim_expr(entry):
                return tirx.Cast(dtype, left.pop(0))
            return tirx.const(float(entry) if isinstance(entry, Fraction) else entry, dtype)

        numbers = [number(e) for e in entries]

        def pick(*index: Any) -> Any:
            flat: Any = tirx.const(0, "int64")
            for i, extent in zip(index, shape, strict=True):
                flat = flat * extent + i
            value = numbers[-1]
            for i in reversed(range(len(numbers) - 1)):
                value = tirx.Select(flat == i, numbers[i], value)
            return value

        return te.compute(shape, pick, name="sizes")

    return bb.emit_te(build, *scalars, primfunc_name_hint="sizes")


Get = Callable[[str], Known | None]

# Operators that only move elements, and which inputs they move (None: all).
_MOVES: dict[str, tuple[int, ...] | None] = {
    "Concat": None, "Expand": (0,), "Flatten": (0,), "Gather": (0,), "GatherElements": (0,),
    "GatherND": (0,), "Identity": (0,), "Reshape": (0,), "ScatterElements": (0, 2),
    "ScatterND": (0, 2), "Slice": (0,), "Split": (0,), "Squeeze": (0,), "Tile": (0,),
    "Transpose": (0,), "Unsqueeze": (0,),
}  # fmt: skip
_REDUCE = {"ReduceProd": "Mul", "ReduceSum": "Add", "ReduceMax": "Max", "ReduceMin": "Min"}
_STATIC = {
    "And", "ConstantOfShape", "Exp", "Log", "Not", "Or", "Pow", "Range", "Reciprocal", "Sign",
    "Sqrt", "Where", "Xor",
}  # fmt: skip


def _most_elements(op: str, given: list[Known | None]) -> float:
    """A bound on the elements of a result, so that nothing big is computed here."""
    values = [v for v in given if v is not None]
    sizes = [max(1, v.array.size) for v in values]
    if op in ("ConstantOfShape", "Expand", "Tile"):
        dims = values[-1].array
        grown = np.prod(dims, dtype=np.float64) if values[-1].static else 1.0
        return float(grown) * (1 if op == "ConstantOfShape" else sizes[0])
    if op == "Range" and all(v.static for v in values):
        start, limit, delta = (float(v.array.reshape(-1)[0]) for v in values)
        return abs((limit - start) / delta) if delta else np.inf
    if op.startswith("Gather"):
        return float(np.prod(sizes, dtype=np.float64))
    if op in _MOVES or op in _REDUCE:
        return float(sum(sizes))
    return float(np.prod(np.broadcast_shapes(*(v.array.shape for v in values)), dtype=np.float64))


class Evaluator:
    """Runs nodes on known values; `shape_of` gives the dims of a tensor by name, or None."""

    def __init__(
        self, symbols: Symbols, get: Get, shape_of: Callable[[str], list[Any] | None], opset: int
    ) -> None:
        self.symbols, self.get, self.shape_of, self.opset = symbols, get, shape_of, opset

    def evaluate(self, node: NodeProto) -> list[Known] | None:
        """The outputs of a node; None where they do not follow from shapes and constants."""
        op = node.op_type
        if op in ("Shape", "Size"):
            return self._shape(node)
        if op == "Constant":
            return self._constant(node)
        if op not in _MOVES and op not in _STATIC and op not in _REDUCE and op not in RULES:
            return None
        given = [self.get(name) if name else None for name in node.input]
        if not any(given) or any(v is None for v, n in zip(given, node.input, strict=True) if n):
            return None
        if any(v.array.size > MOST_STATIC for v in given if v):
            return None
        try:
            small = _most_elements(op, given) <= MOST_STATIC
            results = self._run(node, given) if small else None
        except Exception:  # what cannot be computed here (the evaluator raises anything) stays
            return None
        if results is None:
            return None
        limits = (MOST_STATIC if r.static else MOST for r in results)
        if any(r.array.size > limit for r, limit in zip(results, limits, strict=True)):
            return None
        return [self._simplified(r) for r in results]

    def _simplified(self, value: Known) -> Known:
        if value.static:
            return value
        entries = [self.symbols.simple(e) if ir.is_prim_expr(e) else e for e in value.entries()]
        return packed(entries, value.array.shape, value.dtype)

    def _constant(self, node: NodeProto) -> list[Known] | None:
        values = self._reference(node, [])
        return values if values[0].array.size <= MOST_STATIC else None

    def _shape(self, node: NodeProto) -> list[Known] | None:
        dims = self.shape_of(node.input[0])
        if dims is None:
            return None
        kind = np.dtype(np.int64)
        if node.op_type == "Size":
            return [packed([self.symbols.product(dims)], (), kind)]
        flags = {a.name: a.i for a in node.attribute}
        dims = dims[flags.get("start", 0) : flags.get("end", len(dims))]
        return [packed(dims, (len(dims),), kind)]

    def _run(self, node: NodeProto, given: list[Known | None]) -> list[Known] | None:
        op = node.op_type
        static = all(v is None or v.static for v in given)
        if op in _MOVES:
            return self._moved(node, given)
        if op == "Where" and given[0] and given[0].static:
            return self._where(given)
        if op in _REDUCE and not static:
            return self._reduced(node, given)
        integral = all(v is None or v.dtype.kind in "iu" for v in given)
        if op in RULES and not (static and not (op == "Div" and integral)):
            return self._each(node, given)
        return self._reference(node, [v.array if v else None for v in given]) if static else None

    def _reference(self, node: NodeProto, arrays: list[np.ndarray | None]) -> list[Known]:
        """By onnx's own evaluator."""
        run = ReferenceEvaluator(node, opsets={"": self.opset})
        feeds = {n: a for n, a in zip(node.input, arrays, strict=True) if n}
        with np.errstate(all="ignore"):
            return [known(np.asarray(v)) for v in run.run(None, feeds)]

    def _moved(self, node: NodeProto, given: list[Known | None]) -> list[Known] | None:
        """Runs the operator on element numbers."""
        moving = _MOVES[node.op_type]
        if any(a.name == "reduction" and a.s not in (b"", b"none") for a in node.attribute):
            return None
        pool: list[Any] = []
        arrays: list[np.ndarray | None] = []
        kind = np.dtype(np.int64)
        for i, value in enumerate(given):
            if value is not None and (moving is None or i in moving):
                kind = value.dtype
                numbers = np.arange(len(pool), len(pool) + value.array.size)
                arrays.append(numbers.reshape(value.array.shape))
                pool += value.entries()
            elif value is not None and not value.static:
                return None
            else:
                arrays.append(None if value is None else value.array)
        copy = NodeProto()
        copy.CopyFrom(node)
        for i, name in enumerate(copy.input):  # one tensor may be two inputs
            copy.input[i] = f"{i}" if name else ""
        results = self._reference(copy, arrays)
        return [
            packed([pool[i] for i in r.array.reshape(-1)], r.array.shape, kind) for r in results
        ]

    def _where(self, given: list[Known | None]) -> list[Known]:
        test, a, b = (v for v in given if v)
        picks = np.broadcast_arrays(test.array, a.array, b.array)
        rows = zip(*(p.reshape(-1) for p in picks), strict=True)
        return [packed([x if t else y for t, x, y in rows], picks[0].shape, a.dtype)]

    def _reduced(self, node: NodeProto, given: list[Known | None]) -> list[Known] | None:
        value = given[0]
        flags = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        axes = given[1].array.tolist() if len(given) > 1 and given[1] else flags.get("axes")
        if value is None or value.array.ndim != 1 or axes not in (None, [0], [-1]):
            return None
        if len(given) > 1 and axes is None and flags.get("noop_with_empty_axes", 0):
            return None
        rule, total = RULES[_REDUCE[node.op_type]], value.entries()[0]
        for entry in value.entries()[1:]:
            total = rule(self.symbols, total, entry)
        return [packed([total], (1,) * flags.get("keepdims", 1), value.dtype)]

    def _each(self, node: NodeProto, given: list[Known | None]) -> list[Known] | None:
        """Elementwise operators, with numpy's broadcasting."""
        values = [v for v in given if v]
        kind = values[0].dtype
        op = node.op_type
        if op == "Cast":
            to = next(a.i for a in node.attribute if a.name == "to")
            if to in (TensorProto.BFLOAT16, TensorProto.FLOAT16) or to > TensorProto.BFLOAT16:
                return None
            kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to))
            if kind.kind not in "iuf":
                return None
            rule: Callable[..., Any] = whole if kind.kind in "iu" else as_float
        else:
            rule = RULES[op]
            if op in COMPARE:
                kind = np.dtype(np.bool_)
            if op == "Div" and kind.kind == "f":
                rule = ratio_over
            if op == "Mod" and any(a.name == "fmod" and a.i for a in node.attribute):
                return None
        rows = np.broadcast_arrays(*(v.array for v in values))
        entries = []
        for row in zip(*(r.reshape(-1) for r in rows), strict=True):
            entry = rule(self.symbols, *(plain(e) for e in row))
            if entry is None:
                return None
            entries.append(entry)
        return [packed(entries, rows[0].shape, kind)]
