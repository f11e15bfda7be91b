"""Makes a dequantization of sums of codes that is quantized one step without a division.

Sums of 8-bit codes, as means are computed by, have few possible values. Where
rint((q - zero) * factor) + output_zero gives for each of them what the two operators give, bit by
bit, they become a DccRequantize (attributes of these names, and `to`, its type). A division takes
as long as all the rest. Of 8-bit codes themselves, `code_tables` makes tables.
"""

from __future__ import annotations

from math import prod

import numpy as np
from onnx import NodeProto

from dccompile.workload import INT8_LIMITS

from .code_tables import scalar_pair
from .editor import Editor, attribute, is_op, operand
from .quantized import INT8

DOMAIN, OP = "dccompile", "DccRequantize"
_MOST = 1 << 16  # possible sums


def requantize(editor: Editor) -> None:
    """Rewrites the graph."""
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        if not is_op(node, "QuantizeLinear") or not scalar_pair(editor, node):
            continue
        back = editor.producer(node.input[0], "DequantizeLinear")
        pool = None if back is None else editor.producer_of(back.input[0], DOMAIN, "DccPool")
        if back is None or pool is None or attribute(pool, "kind") != b"Sum":
            continue
        scale, output_scale = (editor.scalar(n.input[1]) for n in (back, node))
        zero, output_zero = (_zero(editor, n) for n in (back, node))
        low, high = _range(editor, pool)
        codes = np.arange(low, high + 1, dtype=np.int64) - zero
        with np.errstate(all="ignore"):
            wanted = np.rint(codes.astype(np.float32) * scale / output_scale)
            factor = np.float32(scale / output_scale)
            got = np.rint(codes.astype(np.float32) * factor)
        limits = INT8_LIMITS[INT8[editor.dtype(node.output[0])]]
        same = [np.clip(v + output_zero, *limits) for v in (wanted, got)]
        if codes.size and np.isfinite(factor) and np.array_equal(*same):
            changes[node.name] = [
                editor.node(
                    OP,
                    [back.input[0]],
                    node,
                    output=node.output[0],
                    domain=DOMAIN,
                    factor=float(factor),
                    zero=zero,
                    output_zero=output_zero,
                    to=editor.dtype(node.output[0]),
                )
            ]
    editor.rewrite(changes)


def _zero(editor: Editor, node: NodeProto) -> int:
    return int(editor.scalar(node.input[2])) if operand(node, 2) else 0


def _range(editor: Editor, pool: NodeProto) -> tuple[int, int]:
    """Least and most that a sum of codes can be; nothing where that is too much to try."""
    count = prod(attribute(pool, "kernel"))
    low, high = INT8_LIMITS[INT8[editor.dtype(pool.input[0])]]
    return (count * low, count * high) if count * 256 <= _MOST else (0, -1)
