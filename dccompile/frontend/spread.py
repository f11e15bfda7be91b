"""Gives every elementwise reader of an 8-bit tensor a DequantizeLinear of its own.

Shared by several, it would make a float tensor in memory for them; alone it is fused with what
reads it, and costs a few instructions there.
"""

from __future__ import annotations

from onnx import NodeProto

from .code_tables import ELEMENTWISE
from .editor import Editor, is_op
from .quantized import INT8

FUSED = (*ELEMENTWISE, "Cast", "Where")  # elementwise, fused where one reads the other alone


def spread_dequantize(editor: Editor) -> None:
    """Rewrites the graph."""
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        if not is_op(node, "DequantizeLinear") or editor.dtype(node.input[0]) not in INT8:
            continue
        name = node.output[0]
        readers = {reader.name: reader for reader in editor.users(name)}
        fused = [reader for reader in readers.values() if is_op(reader, *FUSED, "QuantizeLinear")]
        kept = editor.is_output(name) or len(fused) < len(readers)
        for reader in fused if kept else fused[1:]:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name, copy.output[0] = editor.fresh(f"{node.name}_copy"), editor.fresh(name)
            editor.origin[copy.name] = editor.origin[node.name]
            editor.set_type(copy.output[0], editor.dtype(name), editor.shape(name))
            reader.input[:] = [copy.output[0] if given == name else given for given in reader.input]
            changes.setdefault(node.name, [node]).append(copy)
    editor.rewrite(changes)
