"""Shapes of a model: which are allowed, and what a call with them needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..errors import Error, IncompatibleError, InputError
from .ffi import import_tvm_ffi
from .tensors import Shape, TensorSpec, aligned, describe

_MAX_PLANS = 1024


@dataclass(frozen=True)
class Plan:
    """One choice of the symbols: `workspace` in bytes, and what to allocate for every output.

    `general` sends the call the general way: a tensor has no elements, so that numpy's strides for
    it need mending, or the call itself tells how much of the outputs it has filled.
    """

    workspace: int
    outputs: tuple[tuple[Shape, np.dtype, int], ...]
    general: bool


class Signature:
    """Inputs, outputs and symbols of a manifest, with the compiled function that sizes a call.

    `sized` tells that shapes of outputs have symbols that the model computes.
    """

    def __init__(self, manifest: dict[str, Any], function: Any) -> None:
        self.inputs = tuple(_spec(row) for row in manifest["inputs"])
        self.outputs = tuple(_spec(row) for row in manifest["outputs"])
        self.input_dtypes = tuple(np.dtype(spec.dtype) for spec in self.inputs)
        self.output_dtypes = tuple(np.dtype(spec.dtype) for spec in self.outputs)
        symbols = [row for row in manifest["symbols"] if not row.get("computed")]
        self.sized = len(symbols) < len(manifest["symbols"])
        self._ranges = {row["name"]: (row["min"], row["max"]) for row in symbols}
        self._function = function
        self._plans: dict[Any, Plan] = {}

    def plan(self, shapes: tuple[Shape, ...]) -> Plan:
        """The plan for these input shapes; raises InputError where they are not allowed."""
        values = self._bind(shapes)
        found = self._plans.get(values)
        if found is None:
            found = self._compute(values, shapes)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[values] = found
        return found

    def _bind(self, shapes: tuple[Shape, ...]) -> tuple[int, ...]:
        values: dict[str, int] = {}
        origin: dict[str, int] = {}
        for i, (spec, shape) in enumerate(zip(self.inputs, shapes, strict=True)):
            got = describe(spec.dtype, shape)
            if len(shape) != len(spec.shape):
                raise InputError(
                    f"input '{spec.name}': expected {spec}, got {got}; "
                    f"give it {len(spec.shape)} dimensions",
                    "DC2104",
                )
            for axis, (want, dim) in enumerate(zip(spec.shape, shape, strict=True)):
                if isinstance(want, int):
                    if want != dim:
                        raise InputError(
                            f"input '{spec.name}': expected {spec}, got {got}; "
                            f"dimension {axis} must be {want}",
                            "DC2104",
                        )
                elif want not in values:
                    values[want], origin[want] = dim, i
                    self._check_range(spec, got, want, dim)
                elif values[want] != dim:
                    first = origin[want]
                    raise InputError(
                        f"input '{spec.name}': {want} is {dim} in {got}, but {values[want]} in "
                        f"input '{self.inputs[first].name}', "
                        f"{describe(self.inputs[first].dtype, shapes[first])}; make them equal",
                        "DC2108",
                    )
        return tuple(values[name] for name in self._ranges)

    def _check_range(self, spec: TensorSpec, got: str, symbol: str, dim: int) -> None:
        least, most = self._ranges[symbol]
        if dim < least or (most is not None and dim > most):
            allowed = f"{least} to {most}" if most is not None else f"at least {least}"
            raise InputError(
                f"input '{spec.name}': expected {spec}, got {got}; {symbol} must be {allowed}, "
                "or compile with a wider range",
                "DC2108",
            )

    def _compute(self, values: tuple[int, ...], shapes: tuple[Shape, ...]) -> Plan:
        int64 = np.dtype(np.int64)
        symbols = aligned((max(1, len(values)),), int64)
        symbols[:] = values or 0
        result = aligned((1 + sum(len(spec.shape) for spec in self.outputs),), int64)
        result[:] = -1
        dlpack: Callable[[Any], Any] = import_tvm_ffi().from_dlpack
        try:
            self._function(dlpack(symbols), dlpack(result))
        except Exception as error:  # any class the compiled code chose
            raise translate(error) from None
        sizes = [int(n) for n in result]
        if min(sizes) < 0:
            raise IncompatibleError(
                f"compiled code plans sizes {sizes}. Fix: compile the model again", "DC4013"
            )
        outputs = []
        at = 1
        for spec, dtype in zip(self.outputs, self.output_dtypes, strict=True):
            shape = tuple(sizes[at : at + len(spec.shape)])
            at += len(shape)
            outputs.append((shape, dtype, prod(shape) * dtype.itemsize))
        empty = any(0 in shape for shape in shapes) or any(not n for _, _, n in outputs)
        return Plan(sizes[0], tuple(outputs), empty or self.sized)


def _spec(row: dict[str, Any]) -> TensorSpec:
    return TensorSpec(row["name"], row["dtype"], tuple(row["shape"]))


def translate(error: Exception) -> Exception:
    """What a user sees of an error raised in compiled code: ``DC2xxx: ...`` is a data error."""
    if isinstance(error, (Error, MemoryError)):
        return error
    text = str(error)
    code, _, rest = text.partition(": ")
    if len(code) == 6 and code.startswith("DC2") and code[2:].isdigit():
        return InputError(rest, code)
    line = " ".join(text.split())[:300]
    return Error(f"compiled code failed: {line}. Fix: report this as a bug", "DC1001")
