"""Output types of the com.microsoft operators that quantized and fused models hold.

The onnx package has no schemas for them. For shape inference alone, each such node becomes the
call of a function whose body has the same output type and shape in standard operators.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import NodeProto, helper

DOMAIN = "dccompile.shapes"
OPSET = 18
_FLOAT = onnx.TensorProto.FLOAT

Body = list[NodeProto]


def _n(op: str, inputs: str, output: str, **attributes) -> NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def _attributes(node: NodeProto, *names: str) -> dict:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in names}


def _float(*indexes: int) -> Body:
    return [_n("Cast", f"i{i}", f"f{i}", to=_FLOAT) for i in indexes]


def _like(index: int, source: str = "t") -> NodeProto:
    """The result `source` with the element type of input `index`."""
    return _n("CastLike", f"{source} i{index}", "y")


def _unary(node: NodeProto) -> Body:
    return [_n("Identity", "i0", "y")]


def _binary(node: NodeProto) -> Body:
    return [*_float(0, 3), _n("Add", "f0 f3", "t"), _like(0)]


def _quantize(node: NodeProto) -> Body:
    if _has(node, 2):
        return [_like(2, "i0")]
    return [_n("Cast", "i0", "y", to=onnx.TensorProto.UINT8)]


def _pool(op: str, *names: str) -> Callable[[NodeProto], Body | None]:
    def body(node: NodeProto) -> Body | None:
        attributes = _attributes(node, *names)
        if not _attributes(node, "channels_last").get("channels_last"):
            return [*_float(0), _n(op, "f0", "t", **attributes), _like(0)]
        rank = 2 + len(attributes.get("kernel_shape", (1, 1)))  # of images where it does not say
        first, last = [0, rank - 1, *range(1, rank - 1)], [0, *range(2, rank), 1]
        moved = _n("Transpose", "f0", "m", perm=first)
        back = _n("Transpose", "p", "t", perm=last)
        return [*_float(0), moved, _n(op, "m", "p", **attributes), back, _like(0)]

    return body


def _concat(node: NodeProto) -> Body:
    parts = " ".join(f"i{i}" for i in range(2, len(node.input), 3))
    return [_n("Concat", parts, "y", **_attributes(node, "axis"))]


def _gemm(a: int, b: int, out: Callable[[NodeProto], int]) -> Callable[[NodeProto], Body]:
    def body(node: NodeProto) -> Body:
        gemm = _n("Gemm", f"f{a} f{b}", "t", **_attributes(node, "transA", "transB"))
        return [*_float(a, b), gemm, _like(out(node))]

    return body


def _matmul(out: int) -> Callable[[NodeProto], Body | None]:
    def body(node: NodeProto) -> Body | None:
        flags = _attributes(node, "transA", "transB", "transBatchA", "transBatchB")
        if flags.get("transBatchA") or flags.get("transBatchB"):
            return None
        left = "km" if flags.get("transA") else "mk"
        right = "nk" if flags.get("transB") else "kn"
        product = _n("MatMul", "f0 f1", "t")
        if flags.get("transA") or flags.get("transB"):
            product = _n("Einsum", "f0 f1", "t", equation=f"...{left},...{right}->...mn")
        return [*_float(0, 1), product, _like(out)]

    return body


def _conv(node: NodeProto) -> Body:
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    return [_n("Conv", "i0 i1", "y", **_attributes(node, *names))]


def _has(node: NodeProto, index: int) -> bool:
    return len(node.input) > index and bool(node.input[index])


def _qgemm_type(node: NodeProto) -> int:
    """Quantized like A with an output scale, else float like A's scale."""
    return 0 if _has(node, 7) else 1


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
_BODIES: dict[str, Callable[[NodeProto], Body | None]] = {
    "BiasGelu": _unary,
    "DequantizeLinear": lambda node: [_like(1, "i0")],
    "DynamicQuantizeMatMul": _matmul(0),
    "FastGelu": _unary,
    "FusedConv": _conv,
    "FusedGemm": _gemm(0, 1, lambda node: 0),
    "FusedMatMul": _matmul(0),
    "Gelu": _unary,
    "MatMulIntegerToFloat": _matmul(2),
    "QGemm": _gemm(0, 3, _qgemm_type),
    "QLinearAdd": _binary,
    "QLinearAveragePool": _pool("AveragePool", *_POOL),
    "QLinearConcat": _concat,
    "QLinearGlobalAveragePool": _pool("GlobalAveragePool"),
    "QLinearLeakyRelu": _unary,
    "QLinearMul": _binary,
    "QLinearSigmoid": _unary,
    "QLinearSoftmax": _unary,
    "QuantizeLinear": _quantize,
    "QuickGelu": _unary,
}


def shape_function(node: NodeProto, name: str) -> onnx.FunctionProto | None:
    """A function `name` with the inputs of `node` and its output type; None where unknown."""
    make = _BODIES.get(node.op_type)
    try:
        body = make(node) if make and len(node.output) == 1 else None
    except ValueError:  # an attribute of a kind that onnx does not know
        body = None
    if body is None:
        return None
    inputs = [f"i{i}" for i in range(len(node.input))]
    available = {f"i{i}" for i in range(len(node.input)) if node.input[i]}
    available.update(name for n in body for name in n.output)
    if not available.issuperset(name for n in body for name in n.input):
        return None
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, inputs, ["y"], body, imports)
