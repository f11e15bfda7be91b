"""What the converters of `operators` share: reading arguments, emitting tensor expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import ir, relax, tirx
from tvm.relax.frontend.onnx import onnx_frontend
from tvm.relax.frontend.onnx.onnx_frontend import OnnxOpConverter, onnx_input

from dccompile.errors import ModelError, Problem, UnsupportedError
from dccompile.generic.elementwise import each
from dccompile.generic.lanes import walk

from .symbolic import Known, known, packed, tensor_of
from .symbols import Computed, Symbols, spell, wide

__all__ = ["Converter", "constant", "dtype_of", "emit", "shape_of", "tensor"]


class Converter(OnnxOpConverter):
    """A converter whose `convert` serves every opset.

    The inputs numbered in `sizes` come as `symbolic.Known` where they follow from shapes.
    """

    sizes: tuple[int, ...] = ()

    @classmethod
    def get_converter(cls, opset: int) -> Callable[..., Any]:
        return lambda bb, inputs, attr, params: cls.convert(
            Node(bb, list(inputs), attr, opset, cls, params)
        )

    @classmethod
    def convert(cls, node: Node) -> Any:
        raise NotImplementedError


class Scope(list):
    """What TVM's importer hands to a converter, [nodes, params], and the model's symbols."""

    def __init__(self, nodes: Any, params: Any, symbols: Symbols) -> None:
        super().__init__([nodes, params])
        self.symbols = symbols


class Node:
    """One ONNX node while it is converted."""

    def __init__(
        self, bb: Any, inputs: list[Any], attr: dict[str, Any], opset: int, kind: type, params: Any
    ) -> None:
        self.bb, self.attr, self.opset = bb, attr, opset
        self.params = params
        self.symbols: Symbols = getattr(params, "symbols", None) or Symbols()
        self.inputs = inputs
        custom = attr.get("tvm_custom", {})
        self.name = custom.get("name", "")
        self.outputs = int(custom.get("num_outputs", 1))
        self.op = kind.__name__

    def get(self, index: int) -> Any:
        """An input as a tensor, or None if it is absent."""
        if index >= len(self.inputs) or self.inputs[index] is None:
            return None
        return tensor(self.bb, self.inputs[index])

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def dims(self, index: int) -> list[Any]:
        """An input that gives sizes: ints and expressions. Refuses what is computed from data."""
        value = self.inputs[index]
        found = _known(value)
        dims = None if found is None else found.dims()
        if dims is None:
            raise self.refuse(
                f"its input {index} is computed from data, or from sizes in a way that cannot be "
                "followed",
                "make it a constant, or fix the input shapes with --shape",
            )
        return dims

    def least(self, dims: Sequence[Any], low: int, what: str) -> None:
        """An error now where a size is below `low`, else at the calls where it is."""
        for dim in dims:
            if self.symbols.holds(wide(dim) < low) is True:
                raise self.wrong(f"{what} is {spell(dim)}", f"choose at least {low}")
        self.symbols.require_least(dims, low, f"{self.where}: {what}")

    def kind(self, index: int) -> np.dtype:
        """The element type of an input that gives sizes."""
        found = _known(self.inputs[index])
        return np.dtype(dtype_of(self.inputs[index])) if found is None else found.dtype

    def plain(self) -> Any:
        """What TVM's own converter makes of the node."""
        own = getattr(onnx_frontend, self.op).get_converter(self.opset)
        return own(self.bb, onnx_input(self.inputs), self.attr, self.params)

    def all(self) -> list[Any]:
        return [tensor(self.bb, i) for i in self.inputs if i is not None]

    def emit(self, rule: Callable[..., Any], *args: Any) -> Any:
        """An elementwise operator over broadcast tensors."""
        return emit(self.bb, self.op.lower(), rule, *args)

    def compute(self, build: Callable[..., Any], *args: Any) -> Any:
        """A tensor expression."""
        return self.bb.emit_te(build, *args, primfunc_name_hint=self.op.lower())

    def do(self, expr: Any) -> Any:
        return self.bb.emit(expr)

    def call(self, func: Any, name: str, args: list[Any], out_ty: Any) -> Any:
        """A call of a function written here; symbols that no buffer has as a dim are passed too."""
        plain: list[Any] = []
        wanted: list[Any] = []
        for param in func.params:
            for dim in param.ty.shape:
                (plain if isinstance(dim, tirx.Var) else wanted).append(dim)
        inner = [v for dim in wanted for v in walk(dim) if isinstance(v, tirx.Var)]
        extra: list[Any] = []
        for var in inner:
            if not any(var.same_as(v) for v in [*plain, *extra]):
                extra.append(var)
        if extra:
            params = [*func.params[: len(args)], *extra, *func.params[len(args) :]]
            func = tirx.PrimFunc(params, func.body, func.ret_type, func.attrs)
        gvar = self.bb.add_func(func.without_attr("global_symbol"), name)
        return self.do(relax.call_tir(gvar, [*args, *extra], out_ty=out_ty))

    def counted(
        self, func: Any, name: str, args: list[Any], out_ty: Any, symbol: Any, bound: Any
    ) -> Any:
        """A call whose last output, int64 (1,), tells the value of `symbol`, at most `bound`.

        The function gets outputs of `bound` elements wherever `symbol` is a dim of theirs, and
        writes them as if that dim had the value.
        """
        result = self.call(func, name, args, out_ty)
        count = self.do(relax.TupleGetItem(result, len(out_ty) - 1))
        self.symbols.computed.append(Computed(symbol, bound, count))
        return result

    def refuse(self, found: str, fix: str) -> UnsupportedError:
        return UnsupportedError([Problem("DC3141", self.where, found, fix)])

    def wrong(self, found: str, fix: str) -> ModelError:
        return ModelError([Problem("DC3041", self.where, found, fix)])

    @property
    def where(self) -> str:
        return f"{self.op} '{self.name}'"

    def text(self, key: str, default: str) -> str:
        value = self.attr.get(key, default)
        return value.decode() if isinstance(value, bytes) else str(value)


def _known(value: Any) -> Known | None:
    """What is known of an input: constants and shapes of TVM's importer, values of ours."""
    if isinstance(value, relax.ShapeExpr):
        return packed(list(value.values), (len(value.values),), np.dtype(np.int64))
    array = constant(value)
    return value if isinstance(value, Known) else None if array is None else known(array)


def tensor(bb: Any, value: Any) -> Any:
    """Shapes and scalars of the importer as tensors."""
    if isinstance(value, Known):
        return tensor_of(bb, value)
    if isinstance(value, relax.ShapeExpr) or isinstance(
        getattr(value, "ty", None), relax.ShapeType
    ):
        return bb.emit(relax.op.shape_to_tensor(value))
    if ir.is_prim_expr(value):
        shape = bb.emit(relax.op.shape_to_tensor(relax.ShapeExpr([value])))
        return bb.emit(relax.op.reshape(shape, relax.ShapeExpr([])))
    return value


def constant(value: Any) -> np.ndarray | None:
    """The value of a constant input."""
    return value.value.numpy() if isinstance(value, ir.GenericConst) else None


def dtype_of(value: Any) -> str:
    return str(value.ty.dtype)


def shape_of(value: Any) -> list[Any]:
    """Dims, ints where known. Raises ValueError where even the rank is not known."""
    if value.ty.shape is None:
        raise ValueError("the rank of an input is not known")
    return [int(d) if isinstance(d, tirx.IntImm) else d for d in value.ty.shape.values]


def emit(bb: Any, name: str, rule: Callable[..., Any], *args: Any) -> Any:
    return bb.emit_te(lambda *t: each(name, *t, value=rule), *args, primfunc_name_hint=name)
