"""Weights of the reference models: stripped from a graph, and made again from a seed."""

from __future__ import annotations

import zlib

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


def strip(model: onnx.ModelProto) -> None:
    """Removes the data of every float initializer; small integer ones belong to the graph."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")


def fill(model: onnx.ModelProto, seed: int) -> None:
    """Gives stripped initializers normal values that depend on seed and name only.

    The deviation keeps activations near one: sqrt(2 / inputs) for a layer before a ReLU, biases
    0.1, rows of a table such that the dot product of two pooled rows has deviation one.
    """
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.raw_data:
            continue
        shape = tuple(tensor.dims)
        if tensor.name.startswith("tables"):
            deviation = shape[1] ** -0.25 / np.sqrt(20)
        else:
            deviation = np.sqrt(2 / shape[1]) if len(shape) == 2 else 0.1
        rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
        values = rng.standard_normal(shape, np.float32) * np.float32(deviation)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
