"""Makes signed 8-bit activations unsigned: codes and zero point 128 higher, the same numbers.

Integer convolutions multiply u8 by s8. A tensor that only travels from a QuantizeLinear to
DequantizeLinears can have either type.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from .editor import Editor, attribute, is_op, operand
from .sink import moves


def unsign(editor: Editor) -> None:
    """Changes the types of such tensors where one of them is read by a convolution."""
    for node in editor.nodes:
        zero = editor.scalar(operand(node, 2)) if is_op(node, "QuantizeLinear") else None
        if zero is None or zero.dtype != np.int8 or attribute(node, "block_size", 0):
            continue
        values = [node.output[0]]
        ends: list[NodeProto] = []
        if not _follow(editor, values, ends) or not _wanted(editor, ends):
            continue
        moved = np.asarray(int(zero) + 128, np.uint8)
        name = editor.add_constant(moved, f"{node.input[2]}_unsigned")
        for reader in (node, *ends):
            reader.input[2] = name
        for value in values:
            editor.set_type(value, TensorProto.UINT8, editor.shape(value))


def _follow(editor: Editor, values: list[str], ends: list[NodeProto]) -> bool:
    """Collects the tensors behind values[0] and the dequantizations that end them."""
    for value in values:  # grows on the way
        if editor.is_output(value):
            return False
        for user in editor.users(value):
            if is_op(user, "DequantizeLinear") and user.input[0] == value:
                if not operand(user, 2) or editor.scalar(user.input[2]) is None:
                    return False
                ends.append(user)
            elif moves(user) and user.input[0] == value:
                values.extend(user.output)
            else:
                return False
    return bool(ends)


def _wanted(editor: Editor, ends: list[NodeProto]) -> bool:
    return any(is_op(user, "Conv") for end in ends for user in editor.users(end.output[0]))
