"""Weights of the reference models: stripped from a graph, and made again from a seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_BLOCK = 1 << 22  # values made at a time
_OUTPUTS = ("classes.weight", "scores.weight", "boxes.weight")  # of the vision models
_SMALL = {  # factors that keep
    "project": 0.5**0.5,  # its size, without a ReLU behind it
    "last": 0.1,  # the sum of many residual branches near one
    "objectness": 0.2,  # some tens of proposals above the least score
    "offsets": 0.1,  # boxes near anchors
    "boxes": 0.1,  # and near proposals
    "scores": 0.4,  # probabilities from 0 and 1
}
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
    """Normal values of a tensor, flat, in blocks, that keep activations near one.

    Rows of a table: such that the dot product of two pooled rows has deviation one. A layer before
    a ReLU: deviation sqrt(2 / inputs). Biases 0.1.
    """
    shape = tuple(tensor.dims)
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if len(shape) >= 4 or tensor.name in _OUTPUTS:
        yield _filters(tensor.name, shape, rng)
        return
    if is_table(tensor):
        deviation = shape[1] ** -0.25 / np.sqrt(20)
    else:
        deviation = np.sqrt(2 / shape[1]) if len(shape) == 2 else 0.1
    left = int(np.prod(shape))
    while left:
        count = min(left, _BLOCK)
        yield rng.standard_normal(count, np.float32) * np.float32(deviation)
        left -= count


def _filters(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights of a layer of a vision model, flat; its name may tell what it is for.

    Filters over several channels have a mean near zero: otherwise the mean of the ReLU's output
    grows from layer to layer until the scores hardly depend on the image (Brock et al., 2021). It
    is not zero because that amplifies errors of quantization, as large ends of residual branches
    do: ResNeXt-101 on two exact runtimes differs by 0.04 of the range so, by 0.18 with means of
    zero and ends twice as large.
    """
    rows = rng.standard_normal((shape[0], int(np.prod(shape[1:]))), np.float32)
    mean, spread = 0.159, 0.341  # of the ReLU of a normal variable: squared mean, variance
    if shape[1] > 1:
        left = 0.0 if name in _OUTPUTS else 0.3
        rows -= np.float32(1 - left) * rows.mean(axis=1, keepdims=True)
        mean *= left**2
    gain = 1 / np.sqrt((mean + spread) * rows.shape[1])
    for part in name.split("."):
        gain *= _SMALL.get(part, 1)
    return (rows * np.float32(gain)).reshape(-1)
