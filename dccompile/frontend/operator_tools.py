"""What the converters of `operators` share: reading arguments, emitting tensor expressions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import ir, relax, tirx
from tvm.relax.frontend.onnx.onnx_frontend import OnnxOpConverter

from dccompile.elementwise import each
from dccompile.errors import ModelError, Problem, UnsupportedError

__all__ = ["Converter", "constant", "dtype_of", "emit", "shape_of", "tensor"]


class Converter(OnnxOpConverter):
    """A converter whose `convert` serves every opset from `since` on."""

    @classmethod
    def get_converter(cls, opset: int) -> Callable[..., Any]:
        return lambda bb, inputs, attr, params: cls.convert(
            Node(bb, list(inputs), attr, opset, cls)
        )

    @classmethod
    def convert(cls, node: Node) -> Any:
        raise NotImplementedError


class Node:
    """One ONNX node while it is converted."""

    def __init__(self, bb: Any, inputs: list[Any], attr: dict[str, Any], opset: int, kind: type):
        self.bb, self.attr, self.opset = bb, attr, opset
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


def tensor(bb: Any, value: Any) -> Any:
    """Shapes and scalars of the importer as tensors."""
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
