"""Gives dims that shape inference could not follow the name of the dim they are equal to.

Inference names the -1 of a Reshape, and the sum of two such tensors, anew each time. Where the
other dims say that it is the batch still, tensors have visibly equal shapes again.
"""

from __future__ import annotations

from math import prod

from onnx import NodeProto

from .editor import Editor, Shape, is_op

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Pow", "Where")


def unify(editor: Editor) -> None:
    """Renames such dims in the types of all values."""
    names: dict[int | str | None, int | str | None] = {}

    def shape(name: str) -> Shape | None:
        dims = editor.shape(name)
        return None if dims is None else tuple(names.get(d, d) for d in dims)

    for node in editor.nodes:
        for output in node.output:
            found = shape(output)
            if found is None or all(isinstance(dim, int) for dim in found):
                continue
            known = _known(editor, node, [shape(n) for n in node.input], found)
            for old, new in zip(found, known or found, strict=True):
                if isinstance(old, str) and old != new and old not in editor.symbols:
                    names[old] = new
            editor.set_type(output, editor.dtype(output), known or found)


def _known(
    editor: Editor, node: NodeProto, given: list[Shape | None], found: Shape
) -> Shape | None:
    """The output's shape as the inputs' dims say it."""
    if is_op(node, "Reshape") and len(node.input) == 2:
        source = given[0]
        if source is None:
            return None
        open_in = [d for d in source if not isinstance(d, int)]
        open_out = [i for i, d in enumerate(found) if not isinstance(d, int)]
        static = [prod(d for d in dims if isinstance(d, int)) for dims in (source, found)]
        if len(open_in) != 1 or len(open_out) != 1 or static[0] != static[1] or not static[0]:
            return None
        return tuple(open_in[0] if i == open_out[0] else d for i, d in enumerate(found))
    if is_op(node, *_ELEMENTWISE):
        full = [s for s in given if s is not None and len(s) == len(found)]
        same = [s for s in full if any(not isinstance(d, int) for d in s)]
        if None in given or not same or any(s != same[0] for s in same):
            return None
        fits = all(a == b or not isinstance(b, int) for a, b in zip(same[0], found, strict=True))
        return same[0] if fits else None
    return None
