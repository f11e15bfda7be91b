"""Values of a graph in two forms, channels first and channels last, and what they share."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from .editor import Editor, Shape, attribute, is_op


class Forms:
    """Which forms of every value exist. `new` collects what replaces `node`."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.last: dict[str, str] = {}  # value -> its channels-last form
        self.only_last: set[str] = set()  # values whose own form is made on request
        self.new: list[NodeProto] = []
        self.node = NodeProto()

    def rank(self, name: str) -> int:
        shape = self.editor.shape(name)
        return -1 if shape is None else len(shape)

    def is_last(self, name: str) -> bool:
        return name in self.last

    def made(self, name: str) -> str:
        """A new name for the channels-last form of a value, which the node makes."""
        editor, shape = self.editor, self.editor.shape(name)
        assert shape is not None
        fresh = editor.fresh(f"{name}_nhwc")
        editor.set_type(fresh, editor.dtype(name), turn(shape))
        self.last[name] = fresh
        self.only_last.add(name)
        return fresh

    def as_last(self, name: str) -> str:
        """The channels-last form of a value."""
        if name not in self.last:
            editor, shape = self.editor, self.editor.shape(name)
            assert shape is not None
            fresh = editor.fresh(f"{name}_nhwc")
            editor.set_type(fresh, editor.dtype(name), turn(shape))
            back = self._dequantized(name)
            if back is not None:
                self._dequantize(back, self.as_last(back.input[0]), fresh)
            else:
                self.move(name, fresh, shape, [0, *range(2, len(shape)), 1])
            self.last[name] = fresh
        return self.last[name]

    def as_first(self, name: str) -> None:
        """Makes the value itself, channels first, where only its other form exists."""
        if name not in self.only_last:
            return
        shape = self.editor.shape(name)
        assert shape is not None
        rank = len(shape)
        back = self._dequantized(name)
        if back is not None:
            self.as_first(back.input[0])
            self._dequantize(back, back.input[0], name)
        else:
            self.move(self.last[name], name, turn(shape), [0, rank - 1, *range(1, rank - 1)])
        self.only_last.discard(name)

    def _dequantized(self, name: str) -> NodeProto | None:
        """The DequantizeLinear of a whole tensor that makes a value: its codes can move instead."""
        node = self.editor.producer(name, "DequantizeLinear")
        return node if node is not None and self.editor.is_scalar(node.input[1]) else None

    def _dequantize(self, node: NodeProto, codes: str, output: str) -> None:
        self.new.append(
            self.editor.node("DequantizeLinear", [codes, *node.input[1:]], node, output=output)
        )

    def move(self, source: str, target: str, shape: Shape, perm: list[int]) -> None:
        """A Transpose, or a Reshape where it moves dims of 1 only."""
        editor = self.editor
        order = [p for p in perm if shape[p] != 1]
        if order == sorted(order):
            dims = [0, *(shape[p] for p in perm[1:])]
            if all(isinstance(dim, int) for dim in dims):
                sizes = editor.add_constant(np.asarray(dims, np.int64), f"{target}_shape")
                self.new.append(editor.node("Reshape", [source, sizes], self.node, output=target))
                return
        self.new.append(editor.node("Transpose", [source], self.node, output=target, perm=perm))

    def copy(self, node: NodeProto, inputs: list[str], outputs: list[str]) -> NodeProto:
        new = NodeProto()
        new.CopyFrom(node)
        new.input[:], new.output[:] = inputs, outputs
        self.new.append(new)
        return new


def channel_shuffle(
    editor: Editor, node: NodeProto
) -> tuple[NodeProto, NodeProto, Shape, list[int]] | None:
    """Of the Reshape that splits channels to shuffle them: what follows, and the permutation.

    Returns the Transpose, the Reshape that merges them again, the parts that channels are split
    into and the order of these; None if it is another Reshape.
    """
    shape, split = editor.shape(node.input[0]), editor.shape(node.output[0])
    turn = editor.only_user(node.output[0])
    if shape is None or split is None or turn is None or not is_op(turn, "Transpose"):
        return None
    merge = editor.only_user(turn.output[0])
    if merge is None or not is_op(merge, "Reshape") or editor.shape(merge.output[0]) != shape:
        return None
    spatial = len(shape) - 2
    parts = split[1 : len(split) - spatial]
    if split[0] != shape[0] or split[len(split) - spatial :] != shape[2:] or len(parts) < 2:
        return None
    perm = attribute(turn, "perm") or [*range(len(split))][::-1]
    tail = [*range(len(split) - spatial, len(split))]
    if perm[0] != 0 or [*perm[1 + len(parts) :]] != tail or not static(shape[1:], parts):
        return None
    return turn, merge, parts, [p - 1 for p in perm[1 : 1 + len(parts)]]


def turn(shape: Shape) -> Shape:
    return (shape[0], *shape[2:], shape[1])


def moved_axis(axis: int, rank: int) -> int:
    """Where an axis of the channels-first form is in the other."""
    return 0 if axis == 0 else rank - 1 if axis == 1 else axis - 1


def static(*dims: Shape) -> bool:
    return all(isinstance(dim, int) for part in dims for dim in part)


def set_attribute(node: NodeProto, name: str, value: int | str | list[int]) -> None:
    drop_attribute(node, name)
    node.attribute.append(helper.make_attribute(name, value))


def drop_attribute(node: NodeProto, name: str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
