"""Finds the embedding bags over constant tables and makes each one node, ``DccEmbeddingBag``.

A DccEmbeddingBag (domain "dccompile", attribute "site") computes the workload.EmbeddingBag of
that site. Inputs: index; unless the bags are fixed their offsets or lengths; the weights, if there
are any. The output (..., dim) has the shape of index without its pooled axis, which with several
tables is (..., tables, dim); with offsets or lengths it is (bags, dim).

Found are Gather of rows and ReduceSum or ReduceMean over the trailing axes of the index, with a
Mul by a weight per row between or not, the loops of `bag_loops`, and Gather alone where a table is
large or asked to be smaller. `bag_groups` then serves tables together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from dccompile.tables import RowError
from dccompile.workload import EmbeddingBag

from .bag_groups import Group, gather_groups, restack
from .bag_loops import Bag, loop_bag
from .editor import Editor, attribute, is_op, operand, static_size
from .patterns import Const, Matcher
from .quantized import Refused

OP = "DccEmbeddingBag"
PRECISIONS = {"keep": "", "fp16": "f16", "int8": "u8", "int4": "u4"}
_NAMES = {"f32": "float32", "f16": "fp16-rows", "u8": "int8-rows", "u4": "int4-rows"}
_LARGE = 1 << 20  # bytes of a table that is not worth copying into the code's constants
_INDEX = {TensorProto.INT32: "s32", TensorProto.INT64: "s64"}


@dataclass(frozen=True)
class BagSite:
    """Recovered bags: `tables` names the initializers, `arrays` are their float rows.

    `trailing` axes of the index are pooled; `grouped` says that the axis before them numbers the
    tables. Every array is (rows, dim) f32 or f16, mapped from the model's file where it is large.
    """

    name: str
    workload: EmbeddingBag
    tables: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    trailing: int
    grouped: bool
    precision: str
    errors: dict[str, RowError] = field(default_factory=dict)  # by table, once it is written


@dataclass
class Found:
    """What `recover_bags` did: sites by name, reasons by node, lines about tables kept as is."""

    sites: dict[str, BagSite] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def recover_bags(editor: Editor, embedding: str = "keep") -> Found:
    """Rewrites the graph; `embedding` is how tables are to be stored: keep, fp16, int8 or int4."""
    found = Found()
    bags: list[Bag] = []
    for node in editor.nodes:
        try:
            bag = _visit(editor, node, embedding != "keep")
            if bag is not None:
                _check(editor, bag)
                bags.append(bag)
        except Refused as refused:
            found.reasons[node.name] = str(refused)
    changes: dict[str, list[NodeProto]] = {}
    for group in gather_groups(editor, bags):
        site, nodes = _emit(editor, group, PRECISIONS[embedding])
        found.sites[site.name] = site
        for place, new in nodes.items():
            changes[place] = new
    editor.rewrite(changes)
    if any(site.grouped for site in found.sites.values()):
        restack(editor)
    return found


def table_of(editor: Editor, name: str) -> str | None:
    """The initializer that holds a table's rows, behind a cast from float16."""
    node = editor.producer(name, "Cast")
    if node is not None and editor.dtype(node.input[0]) == TensorProto.FLOAT16:
        name = node.input[0]
    return name if editor.constant(name) is not None else None


def _visit(editor: Editor, node: NodeProto, smaller: bool) -> Bag | None:
    """The bags that end in a node, if any do."""
    if is_op(node, "Loop", "ConcatFromSequence"):
        return loop_bag(editor, node)
    if is_op(node, "ReduceSum", "ReduceMean"):
        return _reduced(editor, node)
    if is_op(node, "Gather"):
        return _lookup(editor, node, smaller)
    return None


def _rows(editor: Editor, name: str) -> tuple[NodeProto, list[NodeProto], str] | None:
    """The Gather of table rows behind a value, through a cast: the Gather, the nodes, the table."""
    nodes = []
    node = editor.producer(name)
    if is_op(node, "Cast") and node is not None and attribute(node, "to") == TensorProto.FLOAT:
        nodes.append(node)
        node = editor.producer(node.input[0])
    if node is None or not is_op(node, "Gather") or attribute(node, "axis", 0):
        return None
    table = table_of(editor, node.input[0])
    if table is None or len(editor.shape(table) or ()) != 2:
        return None
    if editor.dtype(table) not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        return None
    if editor.dtype(name) != TensorProto.FLOAT:
        return None
    return node, [node, *nodes], table


def _reduced(editor: Editor, node: NodeProto) -> Bag | None:
    """Bags as Gather, perhaps Mul, then a reduction over trailing axes of the index."""
    value, weights, nodes = node.input[0], "", [node]
    rows = _rows(editor, value)
    if rows is None:
        mul = editor.producer(value, "Mul")
        if mul is None or editor.only_user(value) is None:
            return None
        for place in (0, 1):
            rows = _rows(editor, mul.input[place])
            if rows is not None:
                value, weights = mul.input[place], mul.input[1 - place]
                nodes.append(mul)
                break
    if rows is None:
        return None
    gather, covered, table = rows
    index = gather.input[1]
    shape = editor.shape(index)
    if shape is None:
        raise Refused("rank of the indices is not known")
    if editor.only_user(value) is None:
        raise Refused("the gathered rows are used in several places")
    axes = _axes(editor, node, len(shape) + 1)
    pooled = len(axes)
    if not pooled or axes != list(range(len(shape) - pooled, len(shape))):
        raise Refused("the reduction is not over the trailing axes of the indices")
    bag = Bag(node.output[0], node, table, index, "sum", pooled=pooled, nodes=[*nodes, *covered])
    bag.mode = "sum" if node.op_type == "ReduceSum" else "mean"
    bag.keep = bool(attribute(node, "keepdims", 1))
    if weights:
        wanted = editor.shape(weights)
        if wanted is None or list(wanted) != [*shape, 1]:
            raise Refused("the rows are multiplied by something other than a weight each")
        column = editor.producer(weights, "Unsqueeze")
        inner = column.input[0] if column is not None else weights
        bag.weights = inner if editor.shape(inner) == shape else weights
    return bag


def _axes(editor: Editor, node: NodeProto, rank: int) -> list[int]:
    """The sorted axes of a reduction; [] where they are not constant."""
    given = attribute(node, "axes")
    if given is None and operand(node, 1):
        value = editor.constant(node.input[1])
        given = None if value is None else value.reshape(-1).tolist()
    return sorted(int(a) % rank for a in given or ())


def _lookup(editor: Editor, node: NodeProto, smaller: bool) -> Bag | None:
    """Single rows, where the table is worth it; what a reduction takes is left to it."""
    cast = editor.only_user(node.output[0])
    value = node.output[0]
    if editor.dtype(value) == TensorProto.FLOAT16:
        if not is_op(cast, "Cast") or cast is None or attribute(cast, "to") != TensorProto.FLOAT:
            return None
        value = cast.output[0]
    rows = _rows(editor, value)
    if rows is None or rows[0] is not node:
        return None
    _, nodes, table = rows
    user = editor.only_user(value)
    if user is not None and _bag_or_none(editor, user):
        return None
    behind = editor.only_user(user.output[0]) if is_op(user, "Mul") and user is not None else None
    if behind is not None and _bag_or_none(editor, behind):
        return None
    size = static_size(editor.shape(table)) or 0
    wide = 2 if editor.dtype(table) == TensorProto.FLOAT16 else 4
    if size * wide < (_LARGE >> 4 if smaller else _LARGE):
        return None
    index = node.input[1]
    if editor.constant(index) is not None:
        return None
    return Bag(value, nodes[-1], table, index, "sum", pooled=0, nodes=nodes)


def _bag_or_none(editor: Editor, node: NodeProto) -> bool:
    try:
        return is_op(node, "ReduceSum", "ReduceMean") and _reduced(editor, node) is not None
    except Refused:
        return False


def _check(editor: Editor, bag: Bag) -> None:
    """Raises Refused for bags that no kernel takes."""
    table = table_of(editor, bag.table)
    if table is None or len(editor.shape(table) or ()) != 2:
        raise Refused("the table is not constant")
    bag.table = table
    if 0 in (editor.shape(table) or ()):
        raise Refused("the table is empty")
    if editor.dtype(table) not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        raise Refused("the table does not hold floats")
    if editor.dtype(bag.index) not in _INDEX:
        raise Refused("the indices are neither int32 nor int64")
    if bag.weights and editor.dtype(bag.weights) != TensorProto.FLOAT:
        raise Refused("the weights are not float32")
    shape = editor.shape(bag.index)
    if shape is None:
        raise Refused("rank of the indices is not known")
    if bag.layout == "fixed":
        pooled = static_size(shape[len(shape) - bag.pooled :])
        if pooled is None:
            raise Refused("the number of terms in a bag is not fixed")
        if pooled == 0:
            raise Refused("the bags are empty")


def _emit(editor: Editor, group: Group, storage: str) -> tuple[BagSite, dict[str, list[NodeProto]]]:
    """The site of a group, and the nodes to put in the place of others."""
    first = group.bags[0]
    arrays = tuple(_array(editor, bag.table) for bag in group.bags)
    if not storage:
        storage = "f16" if arrays[0].dtype == np.float16 else "f32"
    before: list[NodeProto] = list(group.before)
    index, negative = _unchecked(editor, group.index)
    shape = editor.shape(index) or ()
    kept = len(shape) - first.pooled
    inputs = [index]
    kind = editor.dtype(index)
    if first.layout != "fixed":
        second = first.second
        if editor.dtype(second) != kind:
            before.append(editor.node("Cast", [second], first.node, to=kind))
            second = before[-1].output[0]
            editor.set_type(second, kind, editor.shape(first.second))
        inputs.append(second)
    if group.weights:
        inputs.append(group.weights)
    fixed = first.layout == "fixed"
    rows = tuple(len(array) for array in arrays)
    many = group.grouped
    workload = EmbeddingBag(
        rows=rows,
        dim=arrays[0].shape[1],
        storage=storage,
        scale="f16" if storage == "u4" else "f32",
        mode=first.mode,
        layout=first.layout,
        bags=_bags(editor, first, shape, kept - many),
        pooling=prod(int(d or 0) for d in shape[kept:]) if fixed else None,  # type: ignore[misc]
        index=_INDEX[kind],
        weighted=bool(group.weights),
        padding=first.padding,
        negative=negative,
    )
    lead = shape[:kept] if fixed else (workload.bags,)
    output, after = group.output, []
    node = editor.node(OP, inputs, first.node, output, domain="dccompile", site=first.node.name)
    if first.keep and fixed:
        inner = editor.fresh(f"{output}_rows")
        node.output[0] = inner
        axes = editor.add_constant(np.arange(kept, kept + first.pooled), f"{output}_axes")
        after.append(editor.node("Unsqueeze", [inner, axes], first.node, output))
        lead, final = shape[:kept], (*shape[:kept], *[1] * first.pooled, workload.dim)
        editor.set_type(output, TensorProto.FLOAT, final)
    editor.set_type(node.output[0], TensorProto.FLOAT, (*lead, workload.dim))
    covered = [n for bag in group.bags for n in (*bag.nodes, bag.node)]
    origins = tuple(dict.fromkeys(o for n in covered for o in editor.origin[n.name]))
    editor.origin[node.name] = origins
    site = BagSite(
        first.node.name,
        workload,
        tuple(bag.table for bag in group.bags),
        arrays,
        origins,
        tuple(inputs),
        node.output[0],
        first.pooled if fixed else 0,
        group.grouped,
        _NAMES[storage],
    )
    changes = {bag.node.name: list[NodeProto]() for bag in group.bags}
    changes.update(group.changes)
    place = group.place
    changes[place.name] = [*before, node, *after, *changes.get(place.name, [])]
    return site, changes


def _bags(editor: Editor, bag: Bag, shape: tuple[int | str | None, ...], lead: int) -> int | None:
    if bag.layout == "fixed":
        return static_size(shape[:lead])
    size = static_size(editor.shape(bag.second))
    return size if size is None or bag.layout != "offsets+1" else size - 1


def _array(editor: Editor, name: str) -> np.ndarray:
    value = editor.constant(name)
    assert value is not None
    return value


def _unchecked(editor: Editor, index: str) -> tuple[str, bool]:
    """The indices, and whether negative ones count from the end, as ONNX's Gather has it.

    They do not behind a Where that replaces the negative ones by others that are out of range.
    """
    pattern = ("Where", ("Less", "index", Const([0])), "other", "index")
    matcher = Matcher(editor)
    found = matcher.match(pattern, index)
    if found is None:
        return index, True
    value = matcher.constant(found["other"])
    outside = value is not None and value.size == 1 and value.item() >= 2**31 - 1
    return (found["index"], False) if outside else (index, True)
