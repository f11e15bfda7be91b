"""Bags over several tables become one: one kernel call whose output is (bags, tables, dim).

Where their indices are slices of one tensor, the call reads that tensor. The tables are taken out
of its output one by one again, except where `restack` finds them stacked or concatenated in the
group's order. Where every table has indices of its own and the results are put together, the
indices are put together instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto

from .bag_loops import Bag
from .editor import Editor, attribute, is_op, operand


@dataclass
class Group:
    """Bags that one kernel call computes; `index` and `weights` hold those of all tables.

    `place` is the node whose place the call takes, `before` makes what it reads, `changes` puts
    nodes in the place of others, behind the call.
    """

    bags: list[Bag]
    index: str
    weights: str
    output: str
    place: NodeProto
    grouped: bool = False
    before: list[NodeProto] = field(default_factory=list)
    changes: dict[str, list[NodeProto]] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """One position along an axis of a tensor."""

    source: str
    axis: int
    position: int


def gather_groups(editor: Editor, bags: list[Bag]) -> list[Group]:
    """Every bag in one group; many groups are of one."""
    order = {node.name: i for i, node in enumerate(editor.nodes)}
    families: dict[Any, list[tuple[int, Bag]]] = {}
    joined = _joined(editor, bags)
    taken = {bag.node.name for group in joined for bag in group.bags}
    for bag in bags:
        if bag.node.name in taken:
            continue
        key, position = _family(editor, bag)
        families.setdefault(key, []).append((position, bag))
    groups = joined
    for members in families.values():
        if len(members) > 1:
            members.sort(key=lambda m: m[0])
            groups.append(_group(editor, members, order))
        else:
            bag = members[0][1]
            groups.append(Group([bag], bag.index, bag.weights, bag.output, bag.node))
    return groups


def _family(editor: Editor, bag: Bag) -> tuple[Any, int]:
    """What bags of one group have in common, and the position of this one's indices."""
    alone = (bag.node.name,), 0
    shape = editor.shape(bag.index) or ()
    if bag.layout != "fixed" or bag.keep or bag.padding is not None:
        return alone
    piece = slice_of(editor, bag.index)
    lead = len(shape) - bag.pooled
    if piece is None or lead != 1 or bag.pooled > 1 or piece.axis != lead:
        return alone
    weights: Slice | None = None
    if bag.weights:
        weights = slice_of(editor, bag.weights)
        if weights is None or (weights.axis, weights.position) != (lead, piece.position):
            return alone
    table = editor.shape(bag.table) or ()
    key = (
        piece.source, bag.pooled, bag.mode, table[1], editor.dtype(bag.table),
        weights.source if weights else "",
    )  # fmt: skip
    return key, piece.position


def slice_of(editor: Editor, name: str) -> Slice | None:
    """One position of a tensor's axis, with the axis gone: Gather, Split or Slice and Squeeze."""
    gather = editor.producer(name, "Gather")
    if gather is not None:
        index = editor.constant(gather.input[1])
        shape = editor.shape(gather.input[0])
        if index is None or index.ndim or shape is None:
            return None
        return _slice(shape, gather.input[0], attribute(gather, "axis", 0), int(index))
    squeeze = editor.producer(name, "Squeeze", "Reshape")
    if squeeze is None:
        return None
    part = squeeze.input[0]
    shape, inner = editor.shape(name), editor.shape(part)
    split = editor.producer(part, "Split")
    cut = editor.producer(part, "Slice")
    if split is not None:
        source, axis = split.input[0], attribute(split, "axis", 0)
        position = list(split.output).index(part)
        if any((editor.shape(o) or ())[axis:][:1] != (1,) for o in split.output):
            return None
    elif cut is not None:
        bounds = [editor.constant(operand(cut, i)) for i in (1, 2, 3)]
        if any(b is None or b.size != 1 for b in bounds) or operand(cut, 4):
            return None
        begin, end, axis = (int(b.item()) for b in bounds if b is not None)
        source, position = cut.input[0], begin
        if end != begin + 1 or begin < 0:
            return None
    else:
        return None
    if shape is None or inner is None or axis < 0 or (*inner[:axis], *inner[axis + 1 :]) != shape:
        return None
    return _slice(editor.shape(source) or (), source, axis, position)


def _slice(shape: tuple[Any, ...], source: str, axis: int, position: int) -> Slice | None:
    axis += len(shape) if axis < 0 else 0
    if not 0 <= axis < len(shape) or not isinstance(shape[axis], int):
        return None
    position += shape[axis] if position < 0 else 0
    return Slice(source, axis, position) if 0 <= position < shape[axis] else None


def _group(editor: Editor, members: list[tuple[int, Bag]], order: dict[str, int]) -> Group:
    positions = [position for position, _ in members]
    bags = [bag for _, bag in members]
    first = min((bag.node for bag in bags), key=lambda n: order[n.name])
    output = editor.fresh(f"{first.name}_tables")
    group = Group(bags, "", "", output, first, grouped=True)
    for part in ("index", "weights"):
        name = getattr(bags[0], part)
        if name:
            piece = slice_of(editor, name)
            assert piece is not None
            setattr(group, part, _together(editor, group, piece, positions))
    for position, bag in enumerate(bags):
        at = editor.add_constant(np.asarray(position), f"{bag.output}_at")
        gather = editor.node("Gather", [output, at], bag.node, bag.output, axis=1)
        group.changes[bag.node.name] = [gather]
    return group


def _together(editor: Editor, group: Group, piece: Slice, positions: list[int]) -> str:
    """The slices of a tensor that the tables read, in their order."""
    shape = list(editor.shape(piece.source) or ())
    if positions == list(range(shape[piece.axis])):  # type: ignore[arg-type]
        return piece.source
    at = editor.add_constant(np.array(positions), f"{piece.source}_tables")
    node = editor.node("Gather", [piece.source, at], group.place, axis=piece.axis)
    shape[piece.axis] = len(positions)
    editor.set_type(node.output[0], editor.dtype(piece.source), tuple(shape))
    group.before.append(node)
    return str(node.output[0])


def _joined(editor: Editor, bags: list[Bag]) -> list[Group]:
    """Groups of bags with indices of their own whose results follow each other in a Concat."""
    by_output = {bag.output: bag for bag in bags}
    groups = []
    for node in editor.nodes:
        rank = len(editor.shape(node.output[0]) or ())
        if not is_op(node, "Concat") or rank not in (2, 3):
            continue
        if attribute(node, "axis") not in (1, 1 - rank):
            continue
        runs: list[tuple[Any, list[Bag]]] = []  # what its bags have in common, the bags
        for name in node.input:
            bag = _read_once(editor, name, rank, by_output)
            key = None if bag is None else _shared(editor, bag)
            if bag is not None and key is not None and runs and runs[-1][0] == key:
                runs[-1][1].append(bag)
            else:
                runs.append((key, [bag] if bag is not None and key is not None else []))
        longest = max((run for _, run in runs), key=len)
        if len(longest) > 1:
            groups.append(_join(editor, node, longest))
    return groups


def _read_once(editor: Editor, name: str, rank: int, by_output: dict[str, Bag]) -> Bag | None:
    """The bag whose result goes into one input of a Concat of a rank, and nowhere else."""
    if editor.only_user(name) is None:
        return None
    if rank == 2:
        return by_output.get(name)
    node = editor.producer(name, "Unsqueeze")
    if node is None or _axes(editor, node) != [1] or editor.only_user(node.input[0]) is None:
        return None
    return by_output.get(node.input[0])


def _axes(editor: Editor, node: NodeProto) -> list[int]:
    """The axes that an Unsqueeze adds to a matrix; [] where they are not constant."""
    axes = attribute(node, "axes")
    if axes is None:
        value = editor.constant(operand(node, 1))
        axes = [] if value is None else value.reshape(-1).tolist()
    return [int(a) % 3 for a in axes]


def _shared(editor: Editor, bag: Bag) -> Any:
    """What bags must have in common to be joined; None for one that cannot be."""
    shape = editor.shape(bag.index) or ()
    single = bag.layout != "fixed" or bag.keep or bag.padding is not None or bag.weights
    if single or len(shape) != 1 + bag.pooled or bag.pooled > 1 or None in shape:
        return None
    if slice_of(editor, bag.index) is not None:
        return None
    dim, kind = (editor.shape(bag.table) or ())[1], editor.dtype(bag.table)
    return shape, editor.dtype(bag.index), bag.mode, dim, kind


def _join(editor: Editor, concat: NodeProto, bags: list[Bag]) -> Group:
    """One call for bags, in place of their Concat."""
    output = editor.fresh(f"{concat.name}_tables")
    group = Group(bags, "", "", output, concat, grouped=True)
    axis = editor.add_constant(np.array([1]), f"{concat.name}_axis")
    parts = [editor.node("Unsqueeze", [bag.index, axis], bag.node) for bag in bags]
    together = editor.node("Concat", [n.output[0] for n in parts], concat, axis=1)
    group.index = together.output[0]
    group.before = [*parts, together]
    shape, kind = list(editor.shape(bags[0].index) or ()), editor.dtype(bags[0].index)
    for part in parts:
        editor.set_type(part.output[0], kind, (shape[0], 1, *shape[1:]))
    editor.set_type(group.index, kind, (shape[0], len(bags), *shape[1:]))
    results = [bag.output for bag in bags]
    stacked = len(editor.shape(concat.output[0]) or ()) == 3
    if stacked:
        results = [editor.users(name)[0].output[0] for name in results]
    first = list(concat.input).index(results[0])
    inputs = list(concat.input)
    value = output
    nodes = []
    if not stacked:
        dims = editor.add_constant(np.array([0, -1]), f"{output}_dims")
        nodes.append(editor.node("Reshape", [output, dims], concat))
        value = nodes[0].output[0]
        width = len(bags) * int((editor.shape(bags[0].table) or (0, 0))[1])  # type: ignore[arg-type]
        editor.set_type(value, editor.dtype(bags[0].output), (shape[0], width))
    inputs[first : first + len(bags)] = [value]
    nodes.append(editor.node("Concat", inputs, concat, concat.output[0], axis=1))
    group.changes[concat.name] = nodes
    return group


def restack(editor: Editor) -> None:
    """Concatenations of all tables' results, in their order, read the groups' outputs as a whole.

    Stacked along a new axis 1 that is the output itself, along the vectors its reshape.
    """
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        rank = len(editor.shape(node.output[0]) or ())
        if is_op(node, "Concat") and rank and attribute(node, "axis") in (1, 1 - rank):
            replaced = _restacked(editor, node)
            if replaced:
                changes[node.name] = replaced
    editor.rewrite(changes)


def _restacked(editor: Editor, node: NodeProto) -> list[NodeProto]:
    """The nodes to put in the place of a Concat; [] where it holds no group's output."""
    inputs: list[str] = []
    before: list[NodeProto] = []
    at = 0
    while at < len(node.input):
        name = node.input[at]
        piece = _member(editor, name)
        shape = editor.shape(piece[0]) if piece else None
        tables = shape[1] if shape else None
        run = [_member(editor, n) for n in node.input[at : at + (tables or 0)]]  # type: ignore[operator]
        if (
            piece
            and isinstance(tables, int)
            and run == [(piece[0], t, piece[2]) for t in range(tables)]
        ):
            source = piece[0]
            if not piece[2]:
                dims = editor.add_constant(np.array([0, -1]), f"{source}_dims")
                before.append(editor.node("Reshape", [source, dims], node))
                source = before[-1].output[0]
                assert shape is not None
                width = tables * int(shape[2])  # type: ignore[arg-type]
                editor.set_type(source, editor.dtype(piece[0]), (shape[0], width))
            inputs.append(source)
            at += tables
        else:
            inputs.append(name)
            at += 1
    if len(inputs) == len(node.input):
        return []
    if len(inputs) == 1:
        return [*before, editor.node("Identity", inputs, node, node.output[0])]
    return [*before, editor.node("Concat", inputs, node, node.output[0], axis=1)]


def _member(editor: Editor, name: str) -> tuple[str, int, bool] | None:
    """The group's output that a value is one table of, which one, and whether it has an axis 1."""
    node = editor.producer(name)
    stacked = is_op(node, "Unsqueeze")
    if stacked and node is not None:
        if _axes(editor, node) != [1]:
            return None
        node = editor.producer(node.input[0])
    if node is None or not is_op(node, "Gather") or attribute(node, "axis", 0) != 1:
        return None
    made = editor.producer(node.input[0])
    at = editor.constant(node.input[1])
    if made is None or made.domain != "dccompile" or at is None or at.ndim:
        return None
    return node.input[0], int(at), stacked
