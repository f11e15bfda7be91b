"""Weights of the reference models: stripped from a graph, and made again from a seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_BLOCK = 1 << 22  # values made at a time
_ALIGN = 4096  # of external data, so that it can be mapped


def strip(model: onnx.ModelProto) -> None:
    """Removes the data of every float initializer; small integer ones belong to the graph."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")


def is_table(tensor: TensorProto) -> bool:
    return tensor.name.startswith("tables")


def resize(model: onnx.ModelProto, rows: int) -> None:
    """Gives every stripped table so many rows."""
    for tensor in model.graph.initializer:
        if is_table(tensor):
            tensor.dims[0] = rows


def fill(model: onnx.ModelProto, seed: int, given: Mapping[str, np.ndarray] | None = None) -> None:
    """Gives stripped initializers the weights given, or values that depend on seed and name."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not tensor.raw_data:
            value = (given or {}).get(tensor.name)
            if value is None:
                value = np.concatenate([*_values(tensor, seed)]).reshape(tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def fill_outside(model: onnx.ModelProto, seed: int, data: Path) -> None:
    """`fill`, but the tables go to an external file, made and written block by block."""
    at = 0
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.data_type != TensorProto.FLOAT or tensor.raw_data or not is_table(tensor):
                continue
            gap = -at % _ALIGN
            file.write(bytes(gap))
            begin = at = at + gap
            for values in _values(tensor, seed):
                file.write(values.data)
                at += values.nbytes
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", begin), ("length", at - begin)):
                tensor.external_data.add(key=key, value=str(value))
    stripped = onnx.ModelProto()
    stripped.graph.initializer.extend(
        t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL
    )
    fill(stripped, seed)
    made = {t.name: t for t in stripped.graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in made:
            tensor.CopyFrom(made[tensor.name])


def _values(tensor: TensorProto, seed: int) -> Iterator[np.ndarray]:
    """Normal values of a tensor, flat, in blocks.

    The deviation keeps activations near one: sqrt(2 / inputs) for a layer before a ReLU, biases
    0.1, rows of a table such that the dot product of two pooled rows has deviation one.
    """
    shape = tuple(tensor.dims)
    if is_table(tensor):
        deviation = shape[1] ** -0.25 / np.sqrt(20)
    else:
        deviation = np.sqrt(2 / shape[1]) if len(shape) == 2 else 0.1
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    left = int(np.prod(shape))
    while left:
        count = min(left, _BLOCK)
        yield rng.standard_normal(count, np.float32) * np.float32(deviation)
        left -= count
