"""Converter of DccPool: max and average pooling, channels last."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from .operator_tools import Converter, Node

_LAYOUTS = {1: ("NWC", "1d"), 2: ("NHWC", "2d"), 3: ("NDHWC", "3d")}


class Pool(Converter):
    """x (batch, spatial dims.., channels); numbers of three spatial dims each.

    `kind` is MaxPool, AveragePool, GlobalMax or Sum. `sizes` are the spatial dims of the result:
    with ceil_mode they reach beyond the pads. Sum is of 8-bit integers, in s32; outside of x is
    `fill`.
    """

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        shape = list(x.ty.shape.values)
        rank = len(shape) - 2
        layout, suffix = _LAYOUTS[rank]
        kernel, strides, dilations, sizes = (
            [int(v) for v in node.attr[name]][3 - rank :]
            for name in ("kernel", "strides", "dilations", "sizes")
        )
        pads = [int(v) for v in node.attr["pads"]][6 - 2 * rank :]
        before, after = pads[0::2], []
        for i in range(rank):
            reach = _reach(sizes, strides, kernel, dilations, i)
            after.append(max(0, reach - int(shape[1 + i]) - before[i]))
        kind = node.attr["kind"]
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
        if kind == "GlobalMax":
            return node.bb.emit_te(greatest, x, 1, primfunc_name_hint="global_max_pool")
        if kind == "Sum":
            fill = int(node.attr.get("fill", 0))
            return node.bb.emit_te(
                lambda t: _sum(t, kernel, strides, dilations, before, sizes, fill),
                x,
                primfunc_name_hint="sum_pool",
            )
        name = ("max_pool" if kind == "MaxPool" else "avg_pool") + suffix
        more = {}
        if kind == "AveragePool":
            more["count_include_pad"] = bool(node.attr.get("count_include_pad", 0))
        return getattr(relax.op.nn, name)(
            x,
            pool_size=kernel,
            strides=strides,
            padding=[*before, *after],
            dilation=dilations,
            layout=layout,
            **more,
        )


def greatest(x: te.Tensor, first: int) -> te.Tensor:
    """The greatest element of every channel that is not NaN; pixels are dims from `first` on."""
    last = first + len(x.shape) - 2
    over = [te.reduce_axis((0, extent), "k") for extent in x.shape[first:last]]
    best = te.comm_reducer(
        lambda a, b: tirx.Select(b > a, b, a), lambda t: tirx.min_value(str(t)), name="max"
    )
    ones = [tirx.const(1, "int64")] * len(over)
    shape = [*x.shape[:first], *ones, *x.shape[last:]]

    def body(*i: Any) -> Any:
        return best(x(*i[:first], *over, *i[last:]), axis=over)

    return te.compute(shape, body, name="max")


def _sum(
    x: te.Tensor,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    before: list[int],
    sizes: list[int],
    fill: int,
) -> te.Tensor:
    """Sums of windows (batch, sizes.., channels), s32."""
    rank = len(kernel)
    taps = [te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(kernel)]

    def body(*index: Any) -> Any:
        at = [index[1 + i] * strides[i] + taps[i] * dilations[i] - before[i] for i in range(rank)]
        value = x(index[0], *at, index[-1]).astype("int32")
        limits = []
        for i in range(rank):
            size = int(x.shape[1 + i])
            limits += [at[i] >= 0] if before[i] else []
            beyond = _reach(sizes, strides, kernel, dilations, i) > before[i] + size
            limits += [at[i] < size] if beyond else []
        if limits:
            value = tirx.if_then_else(tirx.all(*limits), value, tirx.const(fill, "int32"))
        return te.sum(value, axis=taps)

    return te.compute((x.shape[0], *sizes, x.shape[-1]), body, name="sum_pool")


def _reach(
    sizes: list[int], strides: list[int], kernel: list[int], dilations: list[int], i: int
) -> int:
    """Elements that the windows of a dim span."""
    return (sizes[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
