"""Converters of operators whose output has as many rows as the data decide.

Each becomes one function that writes at most a known number of rows and how many they are; see
`Node.counted`.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from dccompile.generic import counted, gpu_counted, gpu_suppression, suppression

from .operator_tools import Converter, Node, constant, dtype_of
from .symbolic import literal
from .symbols import wide

_COUNT = relax.TensorType([1], "int64")


class NonZero(Converter):
    """The places of elements that are not 0, NaN among them, in row-major order."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        shape = node.symbols.shape(x)
        if not shape:
            x, shape = node.do(relax.op.reshape(x, relax.ShapeExpr([1]))), [1]
        bound = node.symbols.product(shape)
        count = node.symbols.new(f"{node.name or 'nonzero'}_count", bound)
        func = _nonzero(node)(shape, dtype_of(x), count)
        types = [relax.TensorType([len(shape), count], "int64"), _COUNT]
        both = node.counted(func, "nonzero", [x], types, count, bound)
        return relax.TupleGetItem(both, 0)


class Compress(Converter):
    """The slices along an axis, or the elements, whose flag is set."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x, flags = node.get(0), node.get(1)
        if "axis" not in node.attr:
            total = node.symbols.product(node.symbols.shape(x))
            x = node.do(relax.op.reshape(x, relax.ShapeExpr([wide(total)])))
        axis = int(node.attr.get("axis", 0)) % len(node.symbols.shape(x))
        (length,) = node.symbols.shape(flags)
        rest = node.symbols.simple(node.symbols.shape(x)[axis] - length)
        node.least([rest], 0, "elements beside those with a flag")
        count = node.symbols.new(f"{node.name or 'compress'}_count", length)
        func = _nonzero(node)([length], "bool", count)
        types = [relax.TensorType([1, count], "int64"), _COUNT]
        both = node.counted(func, "nonzero", [flags], types, count, length)
        found = node.do(relax.TupleGetItem(both, 0))

        def take(data: te.Tensor, at: te.Tensor) -> te.Tensor:
            shape = [*data.shape[:axis], count, *data.shape[axis + 1 :]]
            zero = tirx.const(0, "int64")

            def value(*i: Any) -> Any:
                return data(*i[:axis], at(zero, i[axis]), *i[axis + 1 :])

            return te.compute(shape, value, name="compress")

        return node.compute(take, x, found)


class NonMaxSuppression(Converter):
    """Rows (batch, class, box), for each batch and class the kept boxes from the best score on."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        boxes, scores = node.get(0), node.get(1)
        batches, number, _ = node.symbols.shape(boxes)
        classes = node.symbols.shape(scores)[1]
        given = [node.get(i) for i in (2, 3, 4)]
        most, iou, _ = (None if v is None else constant(v) for v in given)
        kept = number
        if given[0] is None:
            kept = 0
        elif most is not None:
            limit = max(0, int(most.reshape(-1)[0]))
            kept = node.symbols.simple(tirx.min(wide(number), wide(limit)))
        if iou is not None and not 0 <= float(iou.reshape(-1)[0]) <= 1:
            raise node.wrong(f"its IoU threshold is {iou.reshape(-1)[0]}", "choose one of 0 to 1")
        bound = node.symbols.product([batches, classes, kept])
        count = node.symbols.new(f"{node.name or 'nms'}_count", bound)
        build = gpu_suppression.suppression if node.symbols.gpu else suppression.suppression
        func = build(
            batches, classes, number, count, int(node.attr.get("center_point_box", 0)) == 1,
            given[0] is not None, given[1] is not None, given[2] is not None, node.where,
        )  # fmt: skip
        extra = [_flat(node, v) for v in given if v is not None]
        if node.symbols.gpu:
            own = gpu_suppression.scratch(batches, classes, number)
        else:
            own = suppression.scratch(number)
        scratch = [relax.TensorType(s, t) for s, t in own]
        types = [relax.TensorType([count, 3], "int64"), *scratch, _COUNT]
        result = node.counted(func, "suppression", [boxes, scores, *extra], types, count, bound)
        return relax.TupleGetItem(result, 0)


def _nonzero(node: Node) -> Any:
    return gpu_counted.nonzero if node.symbols.gpu else counted.nonzero


def _flat(node: Node, value: Any) -> Any:
    known = constant(value)
    if known is not None:
        return literal(known.reshape(1))
    return node.do(relax.op.reshape(value, relax.ShapeExpr([1])))


DETECTION = {c.__name__: c for c in (Compress, NonZero, NonMaxSuppression)}
