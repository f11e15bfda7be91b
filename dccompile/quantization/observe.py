"""Values of tensors inside a model: it is compiled with them as outputs, then run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from .. import compiler
from ..errors import InputError
from .feeds import BATCH, Feed, Input

BUDGET = 384 << 20  # bytes of tensors that one call may return
_SMALL = 8192  # bytes of an initializer that shape inference may have to look into

Visit = Callable[[str, np.ndarray], None]


@dataclass
class Observed:
    """What watching took.

    `samples`: sum of the first dims of the feeds · `seconds`: for all of it, of which
    `compile_seconds` went into compiling · `runs`: calls of compiled models.
    """

    samples: int
    seconds: float
    compile_seconds: float
    runs: int


def watch(
    model: onnx.ModelProto,
    names: Sequence[str],
    feeds: Iterable[Feed],
    visit: Visit,
    *,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    threads: int | None = None,
    budget: int = BUDGET,
    finite: Collection[str] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Observed:
    """Runs a model on every feed and calls visit(name, array) for each of the tensors `names`.

    For one feed the order is the model's: inputs, then tensors as nodes make them; the arrays are
    the visitor's to keep, except inputs, which are the feed's. Feeds are iterated once. Tensors
    that together take more than `budget` bytes for the first feed are observed in several models,
    one after the other for every feed. Every feed has all inputs, as those of `feeds.read`; further
    arrays (labels) are left alone. `finite`: the tensors that may hold no NaN or inf, all of them
    unless told. `progress` receives the compiler's events and
    ``{"step": "observe", "done": feeds}``.

    Raises InputError for names that no tensor has (DC2130), a tensor with NaN or inf (DC2131), no
    feeds at all (DC2123), and what compiling and calling raise.
    """
    start = time.monotonic()
    inputs, computed = _locate(model, names)
    checked = set(names if finite is None else finite)
    iterator = iter(feeds)
    first = next(iterator, None)
    if first is None:
        raise InputError("calibration data: no samples. Fix: give one at least", "DC2123")
    seen = Observed(0, 0.0, 0.0, 0)
    made = []
    shapes_seen = {name: array.shape for name, array in first.items()}
    for part in _parts(computed, _sizes(model, shapes_seen), budget):
        observing = _with_outputs(model, part)
        made.append(compiler.compile(observing, targets=["host"], shapes=shapes, progress=progress))
        seen.compile_seconds += made[-1].seconds
    kept = made[0].load(threads) if len(made) == 1 else None
    for number, feed in enumerate(itertools.chain([first], iterator)):
        for name in inputs:
            _check(name, feed[name], number, checked)
            visit(name, feed[name])
        for artifact in made:
            # a loaded model keeps the memory of its largest call: of several, one at a time
            module = kept or artifact.load(threads)
            results = module({spec.name: feed[spec.name] for spec in module.inputs})
            seen.runs += 1
            for name, array in results.items():
                _check(name, array, number, checked)
                visit(name, array)
            del module, results, array  # before the next ones are made
        seen.samples += next((len(x) for x in feed.values() if x.ndim), 1)
        if progress:
            progress({"step": "observe", "done": number + 1})
    seen.seconds = time.monotonic() - start
    return seen


def largest_batch(
    model: onnx.ModelProto,
    names: Sequence[str],
    inputs: Sequence[Input],
    *,
    limit: int = BATCH,
    budget: int = BUDGET,
) -> int:
    """Samples of a feed, up to `limit`, for which `watch` needs one compiled model only.

    It then runs everything once: for the same data, more and smaller feeds take less time than
    several models. 1 where even one sample takes more than `budget`, or sizes are unknown.
    """
    shapes = {
        spec.name: [1 if isinstance(dim, str) else dim for dim in spec.shape]
        for spec in inputs
        if spec.shape is not None
    }
    sizes = _sizes(model, shapes)
    total = sum(sizes.get(name, budget) for name in _locate(model, names)[1])
    return max(1, min(limit, budget // max(total, 1)))


def _locate(model: onnx.ModelProto, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The inputs among the names, and the results of nodes; each once, in the model's order."""
    wanted = set(names)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [v.name for v in model.graph.input if v.name in wanted - constants]
    computed = [name for node in model.graph.node for name in node.output if name in wanted]
    missing = sorted(wanted - {*inputs, *computed})
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"tensor {', '.join(map(repr, missing[:3]))}{more}: neither an input of the model nor "
            "a result of one of its nodes. Fix: name tensors of this model",
            "DC2130",
        )
    return inputs, computed


def _check(name: str, array: np.ndarray, number: int, finite: Collection[str]) -> None:
    """Raises InputError for NaN or inf in one of the tensors `finite`."""
    if name not in finite or array.dtype.kind != "f" or not array.size:
        return
    # NaN survives min and max, and neither makes an array
    for value in array.min(), array.max():
        if not np.isfinite(value):
            raise InputError(
                f"tensor '{name}': feed {number} makes it hold {value}, finite values are "
                "allowed: the float model itself computes them. Fix: correct the model or the "
                "data",
                "DC2131",
            )


def _parts(names: list[str], sizes: Mapping[str, int], budget: int) -> Iterator[list[str]]:
    """Runs of names that take up to `budget` bytes together; a name of unknown size, the most."""
    most = max(sizes.values(), default=0)
    part: list[str] = []
    total = 0
    for name in names:
        size = sizes.get(name, most)
        if part and total + size > budget:
            yield part
            part, total = [], 0
        part.append(name)
        total += size
    if part:
        yield part


def _without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without initializers and outputs."""
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    copy.graph.name = model.graph.name
    copy.graph.input.extend(model.graph.input)
    copy.graph.node.extend(model.graph.node)
    return copy


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy that has these outputs; the compiler infers their types, and drops other nodes."""
    copy = _without_data(model)
    copy.graph.initializer.extend(model.graph.initializer)
    copy.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def _sizes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Bytes of every tensor whose shape follows from those of the inputs."""
    copy = _without_data(model)
    for value in copy.graph.input:
        if value.name in shapes:
            kind, shape = value.type.tensor_type.elem_type, shapes[value.name]
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    declared = {value.name for value in copy.graph.input}
    for tensor in model.graph.initializer:
        if prod(tensor.dims) * 4 <= _SMALL and tensor.data_location != TensorProto.EXTERNAL:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            copy.graph.input.append(info)
    sizes = {}
    for value in onnx.shape_inference.infer_shapes(copy, data_prop=True).graph.value_info:
        tensor_type = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor_type.shape.dim]
        if tensor_type.HasField("shape") and None not in dims and tensor_type.elem_type:
            item = onnx.helper.tensor_dtype_to_np_dtype(tensor_type.elem_type).itemsize
            sizes[value.name] = prod(d for d in dims if d is not None) * item
    return sizes
