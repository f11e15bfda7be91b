"""One rule per operator: attribute values and constant operands that it can run with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .external import MAX_RANK
from .operands import Node

_PADDING = (b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID")


def check(node: Node) -> Iterator[str]:
    """What a node of the domain ai.onnx holds that its operator does not take."""
    for attribute in node.node.attribute:
        axes = [attribute.i] if attribute.name in ("axis", "batch_dims") else []
        axes += attribute.ints if attribute.name == "axes" else []
        if any(abs(axis) > MAX_RANK for axis in axes):  # onnx's inference crashes on some
            yield f"{attribute.name} {axes}; {-MAX_RANK} to {MAX_RANK} is allowed"
    rule = _RULES.get(node.node.op_type)
    if rule:
        yield from rule(node)


def _positive(node: Node, *names: str) -> Iterator[str]:
    for name in names:
        for value in np.atleast_1d(node.attribute(name, 1)):
            if value < 1:
                yield f"{name} {value}; 1 or more is allowed"
                break


def _window(node: Node) -> Iterator[str]:
    yield from _positive(node, "kernel_shape", "strides", "dilations")
    pads = list(node.attribute("pads", ()))
    if any(pad < 0 for pad in pads):
        yield f"pads {pads}; 0 or more is allowed"
    mode = node.attribute("auto_pad", b"NOTSET")
    if mode not in _PADDING:
        allowed = ", ".join(name.decode() for name in _PADDING)
        name = mode.decode(errors="replace") if isinstance(mode, bytes) else mode
        yield f"auto_pad {name!r}; {allowed} are allowed"
    elif mode != b"NOTSET" and any(pads):
        yield f"pads {pads} and auto_pad {mode.decode()}; one of them is allowed"


def _fits(node: Node, window: Sequence[int | None] | None) -> Iterator[str]:
    """The window in the padded data, where both are known."""
    data = node.dims(0)
    if data is None or window is None or len(data) != len(window) + 2:
        return
    rank = len(window)
    strides, dilations = (node.attribute(n, [1] * rank) for n in ("strides", "dilations"))
    pads = node.attribute("pads", [0] * (2 * rank))
    valid = len(dilations) == rank and len(pads) == 2 * rank and min([*strides, *dilations]) > 0
    explicit = node.attribute("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    if not valid or not explicit or node.attribute("ceil_mode", 0):
        return
    for size, k, d, p, q in zip(data[2:], window, dilations, pads, pads[rank:], strict=False):
        if size and k and (k - 1) * d + 1 > size + p + q:
            yield (
                f"a window of {(k - 1) * d + 1} elements over {size + p + q} with the pads; "
                "a window that fits is allowed"
            )
            return


def _pool(node: Node) -> Iterator[str]:
    yield from _window(node)
    kernel, pads = node.attribute("kernel_shape", []), node.attribute("pads", [])
    yield from _fits(node, kernel)
    dilations = node.attribute("dilations", [1] * len(kernel))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=False)]
    if any(pad >= r for pad, r in zip(pads, reach * 2, strict=False)):
        yield f"pads {list(pads)} for a window of {reach}; less than the window is allowed"


def _conv(node: Node) -> Iterator[str]:
    weight = 3 if node.node.op_type == "QLinearConv" else 1
    bias = {"QLinearConv": 8, "Conv": 2, "ConvTranspose": 2}.get(node.node.op_type)
    yield from _window(node)
    yield from _positive(node, "group")
    group, data, filters = node.attribute("group", 1), node.dims(0), node.dims(weight)
    if data is None or filters is None or group < 1 or len(data) < 3:
        return
    if len(filters) != len(data):
        yield f"filters have {len(filters)} dims; {len(data)}, as the data have, are allowed"
        return
    kernel = node.attribute("kernel_shape")
    if kernel is not None and any(
        None is not b != a for a, b in zip(kernel, filters[2:], strict=False)
    ):
        yield f"kernel_shape {list(kernel)}; {filters[2:]}, as the filters have, is allowed"
    if node.node.op_type != "ConvTranspose":
        yield from _fits(node, filters[2:])
    if 0 in filters:
        yield f"filters of shape {filters}; no dim may be 0"
    transposed = node.node.op_type == "ConvTranspose"
    channels, depth = data[1], filters[0] if transposed else filters[1]
    want = depth if transposed else None if depth is None else depth * group
    if None not in (channels, want) and channels != want:
        yield f"{channels} input channels; {want} are allowed for filters {filters}, group {group}"
    maps = filters[1] if transposed else filters[0]
    if maps is not None and not transposed and maps % group:
        yield f"{maps} filters in {group} groups; a multiple of the groups is allowed"
    length = node.dims(bias) if bias is not None else None
    maps = maps * group if transposed and maps is not None else maps
    if length is not None and len(length) != 1:
        yield f"bias of {len(length)} dims; 1 is allowed"
    elif length and maps is not None and length[0] not in (None, maps):
        yield f"bias of {length[0]} entries; {maps}, one per filter, is allowed"


def _gemm(node: Node) -> Iterator[str]:
    a, b = node.dims(0), node.dims(1)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return
    inner = a[0] if node.attribute("transA", 0) else a[1]
    other = b[1] if node.attribute("transB", 0) else b[0]
    if None not in (inner, other) and inner != other:
        yield f"inner dims {inner} and {other} of {a} and {b}; equal ones are allowed"
    rows = a[1] if node.attribute("transA", 0) else a[0]
    columns = b[0] if node.attribute("transB", 0) else b[1]
    bias = node.dims(2) or []
    for have, want in zip(reversed(bias), (columns, rows), strict=False):
        if None not in (have, want) and have not in (1, want):
            yield f"bias of shape {bias}; a shape that broadcasts to {[rows, columns]} is allowed"
            break
    if len(bias) > 2:
        yield f"bias of {len(bias)} dims; at most 2 are allowed"


def _split(node: Node) -> Iterator[str]:
    yield from _positive(node, "num_outputs")
    sizes = node.integers(1) if node.opset >= 13 else node.attribute("split")
    outputs = len(node.node.output)
    if node.attribute("num_outputs", outputs) != outputs:
        yield f"num_outputs {node.attribute('num_outputs')}; {outputs} is allowed"
    if sizes is None:
        return
    sizes = list(sizes)
    if len(sizes) != outputs or any(size < 0 for size in sizes):
        yield f"split sizes {sizes}; {outputs} sizes of 0 or more are allowed"
        return
    dims, axis = node.dims(0), node.attribute("axis", 0)
    if dims and -len(dims) <= axis < len(dims) and dims[axis] not in (None, sum(sizes)):
        yield f"split sizes {sizes}; sizes that add up to {dims[axis]} are allowed"


def _topk(node: Node) -> Iterator[str]:
    k, dims, axis = node.integers(1), node.dims(0), node.attribute("axis", -1)
    if k is None or len(k) != 1 or not dims or not -len(dims) <= axis < len(dims):
        return
    limit = dims[axis]
    if k[0] < 0 or (limit is not None and k[0] > limit):
        yield f"k {k[0]}; 0 to {limit if limit is not None else 'the dim'} is allowed"


def _range(node: Node) -> Iterator[str]:
    arrays = [node.constant(i) for i in range(3)]
    numbers = [a.item() if a is not None and a.size == 1 else None for a in arrays]
    if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
        yield "start, limit or delta is not finite; finite numbers are allowed"
    if numbers[2] == 0:
        yield "delta 0; any other number is allowed"


def _slice(node: Node) -> Iterator[str]:
    steps = node.integers(4)
    if steps is not None and 0 in steps:
        yield "step 0; any other number is allowed"


def _divide(node: Node) -> Iterator[str]:
    divisor = node.constant(1)
    if divisor is not None and divisor.dtype.kind in "iu" and (divisor == 0).any():
        yield f"integer division by the constant {node.node.input[1]!r}, which holds 0"


def _indices(default_axis: int) -> Callable[[Node], Iterator[str]]:
    def rule(node: Node) -> Iterator[str]:
        indices, dims = node.constant(1), node.dims(0)
        axis = node.attribute("axis", default_axis)
        if indices is None or not indices.size or not dims or indices.dtype.kind != "i":
            return
        if not -len(dims) <= axis < len(dims):
            yield f"axis {axis}; {-len(dims)} to {len(dims) - 1} are allowed"
        elif dims[axis] is not None:
            low, high, size = int(indices.min()), int(indices.max()), dims[axis]
            if low < -size or high >= size:
                worst = low if low < -size else high
                yield f"index {worst}; {-size} to {size - 1} are allowed"

    return rule


def _reshape(node: Node) -> Iterator[str]:
    target, dims = node.integers(1), node.dims(0)
    if target is None:
        return
    if any(t < -1 for t in target) or target.count(-1) > 1:
        yield f"target shape {target}; dims of 0 or more and at most one -1 are allowed"
        return
    copies = not node.attribute("allowzero", 0)  # 0 then stands for the input's dim
    if dims is not None and copies and 0 in target[len(dims) :]:
        yield f"target shape {target} copies a dim that the input {dims} does not have"
        return
    if dims is None or None in dims:
        return
    sizes = [d or 0 for d in dims]
    new = [sizes[i] if t == 0 and copies else t for i, t in enumerate(target)]
    total, rest = math.prod(sizes), math.prod(t for t in new if t != -1)
    if (-1 in new and (rest == 0 or total % rest)) or (-1 not in new and rest != total):
        yield f"target shape {target} for {dims}; one with {total} elements is allowed"


def _transpose(node: Node) -> Iterator[str]:
    order = list(node.attribute("perm", ()))
    if sorted(order) != list(range(len(order))):
        yield f"perm {order}; each axis once is allowed"


def _pad(node: Node) -> Iterator[str]:
    pads, dims = node.integers(1), node.dims(0)
    if pads is None or dims is None:
        return
    if not node.has(3) and len(pads) != 2 * len(dims):
        yield f"{len(pads)} pads; {2 * len(dims)}, two per dim, are allowed"


def _norm(node: Node) -> Iterator[str]:
    dims = node.dims(0)
    channels = dims[1] if dims and len(dims) > 1 else None
    for index in range(1, len(node.node.input)):
        length = node.dims(index)
        if channels is not None and length and length[0] not in (None, channels):
            name = node.node.input[index]
            yield f"{name!r} has {length[0]} entries; {channels}, one per channel, is allowed"


def _reduce_empty(node: Node) -> Iterator[str]:
    dims = node.dims(0)
    if dims is not None and 0 in dims:
        yield f"input of shape {dims}; a shape with elements is allowed"


_RULES: dict[str, Callable[[Node], Iterator[str]]] = {
    "ArgMax": _reduce_empty,
    "ArgMin": _reduce_empty,
    "AveragePool": _pool,
    "BatchNormalization": _norm,
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv,
    "Div": _divide,
    "Gather": _indices(0),
    "GatherElements": _indices(0),
    "Gemm": _gemm,
    "InstanceNormalization": _norm,
    "LpPool": _pool,
    "MaxPool": _pool,
    "Mod": _divide,
    "Pad": _pad,
    "QLinearConv": _conv,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _indices(0),
    "Slice": _slice,
    "Split": _split,
    "TopK": _topk,
    "Transpose": _transpose,
}
