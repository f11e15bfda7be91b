"""Embedding bags that are written as loops over the bags.

PyTorch's two exporters write nn.EmbeddingBag so, and the functions of `sls` are. TorchScript's
scans the bags: rows of ``indices[begins[i] : ends[i]]`` are gathered and reduced. The new
exporter gathers all rows first, then appends one reduced slice of them per bag to a sequence; a
padding index makes that a loop in a loop. In both an empty bag is meant to be 0; TorchScript's
graph gives NaN for the mean of one, in which this compiler follows PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from .editor import Editor, attribute, is_op, operand, static_size
from .patterns import ANY, Const, Matcher, body, zeros

_LAST = 2**31 - 1  # ends of slices from here on mean "to the end"


@dataclass
class Bag:
    """Bags over one table, as found: `pooled` trailing axes of `index` are summed over.

    `second` holds the offsets or lengths of the layout, "" for fixed bags; `weights` has as many
    elements as `index`.
    """

    output: str
    node: NodeProto  # the one whose place the bag takes
    table: str
    index: str
    mode: str
    layout: str = "fixed"
    second: str = ""
    weights: str = ""
    pooled: int = 1
    padding: int | None = None
    keep: bool = False  # the output keeps the pooled axes, of size one
    nodes: list[NodeProto] = field(default_factory=list)


def loop_bag(editor: Editor, node: NodeProto) -> Bag | None:
    """The bags that a Loop or a ConcatFromSequence behind one computes, or None."""
    if is_op(node, "Loop"):
        matcher = Matcher(editor, node)
        return _scan(matcher, node) if matcher.usable else None
    if attribute(node, "axis", 0) or attribute(node, "new_axis", 0):
        return None
    loop = editor.producer(node.input[0], "Loop")
    if loop is None or len(loop.output) != 2:
        return None
    matcher = Matcher(editor, loop)
    return _sequence(matcher, loop, node) if matcher.usable else None


_DIMS: Any = ("Shape", "x")
_DIM: Any = ("Shape", "x", {"end": 1})


# -- lengths and boundaries --------------------------------------------------------------------


def _one(value: Any) -> list[Any]:
    """A scalar made a vector of one."""
    return [
        ("Unsqueeze", value, Const([0])),
        ("Unsqueeze", value, {"axes": [0]}),
        ("Reshape", value, Const([-1])),
    ]


def flat(matcher: Matcher, name: str) -> str:
    """The value behind reshapes to one dim."""
    while True:
        found = matcher.match(("Reshape", "x", Const([-1])), name)
        if found is None:
            return matcher.source(name)
        name = found["x"]


def _is_length(matcher: Matcher, name: str, of: str) -> bool:
    """Whether a value is the number of elements of `of`, given as `flat` gives it."""
    size = static_size(matcher.editor.shape(of))
    if size is not None and matcher.match(Const([size]), name) is not None:
        return True
    first = [("Gather", _DIMS, Const([0])), ("Squeeze", _DIM)]
    for pattern, only in (
        ([("Size", "x"), *_one(("Size", "x"))], None),
        ([_DIMS, _DIM, *first, *_one(first)], 1),
    ):
        found = matcher.match(pattern, name)
        if found is not None and flat(matcher, found["x"]) == of:
            rank = len(matcher.editor.shape(found["x"]) or ())
            return only is None or rank == only
    return False


def _boundaries(matcher: Matcher, begins: str, ends: str, index: str) -> tuple[str, str] | None:
    """Layout and second operand of bags ``index[begins[i] : ends[i]]``."""
    found = matcher.match(("Sub", ("CumSum", "n", Const([0])), "n"), begins)
    if found and matcher.match(("CumSum", "n", Const([0])), ends, found):
        return "lengths", found["n"]
    tail: Any = ("Slice", "all", Const([1]), _is_last, Const([0]), [Const([1]), ""])
    if not matcher.match(tail, ends, {"all": begins}) and not _shifted(matcher, begins, ends):
        return None
    return _split_offsets(matcher, begins, index)


def _shifted(matcher: Matcher, begins: str, ends: str) -> bool:
    first, second = matcher.constant(begins), matcher.constant(ends)
    return first is not None and second is not None and np.array_equal(first[1:], second)


def _is_last(matcher: Matcher, name: str) -> bool:
    value = matcher.constant(name)
    return value is not None and value.size == 1 and value.item() >= _LAST


def _split_offsets(matcher: Matcher, offsets: str, index: str) -> tuple[str, str]:
    """Offsets that were given without the last end and completed, or with it."""
    node = matcher.node(offsets)
    if is_op(node, "Concat") and node is not None and len(node.input) == 2:
        if _is_length(matcher, node.input[1], flat(matcher, index)):
            return "offsets", matcher.source(node.input[0])
    return "offsets+1", offsets


def _make(matcher: Matcher, bag: Bag) -> Bag:
    """Sees that the offsets of two-dimensional indices make fixed bags; looks through reshapes."""
    base = flat(matcher, bag.index)
    shape = matcher.editor.shape(base) or ()
    if shape:
        bag.index = base
    if bag.layout.startswith("offsets") and len(shape) == 2 and isinstance(shape[1], int):
        if bag.padding is None or bag.padding >= 0:
            if _uniform(matcher, bag, base, shape[1]):
                bag.layout, bag.second = "fixed", ""
    return bag


def _uniform(matcher: Matcher, bag: Bag, base: str, step: int) -> bool:
    """Whether the offsets are 0, step, 2 * step, ... of all rows of `base`."""
    value = matcher.constant(bag.second)
    if value is not None:
        size = static_size(matcher.editor.shape(base))
        if size is None or not step:
            return False
        last = size + (step if bag.layout == "offsets+1" else 0)
        return np.array_equal(value, np.arange(0, last, step))
    if bag.layout != "offsets":
        return False
    found = matcher.match(("Range", Const([0]), "limit", Const([step])), bag.second)
    if found is None:
        return False
    first = [("Gather", _DIMS, Const([0])), ("Squeeze", _DIM)]
    limits: list[Any] = [
        ("ReduceProd", _DIMS, {"keepdims": 0}),
        ("ReduceProd", _DIMS, ANY, {"keepdims": 0}),
        ("Size", "x"),
        ("Mul", first, Const([step])),
    ]
    if step == 1:
        limits += first
    return matcher.match(limits, found["limit"], {"x": base}) is not None


# -- the loops ---------------------------------------------------------------------------------


def _scan(matcher: Matcher, loop: NodeProto) -> Bag | None:
    """A Loop over the bags whose result is stacked, as TorchScript writes it."""
    graph = body(loop)
    if len(graph.input) != 2 or len(graph.output) != 2 or len(loop.input) < 2:
        return None
    on: Any = [Const([1]), ("Cast", Const([1]), {"to": TensorProto.BOOL}), "on"]
    forever = not loop.input[1] or matcher.match(Const([1]), loop.input[1]) is not None
    known = {"on": graph.input[1].name}
    if not forever or matcher.match(on, graph.output[0].name, known) is None:
        return None
    begin, end = (_one(("Gather", name, "i")) for name in ("begins", "ends"))
    piece = lambda name: ("Slice", name, begin, end, [Const([0]), ""], [Const([1]), ""])  # noqa: E731
    gather = ("Gather", "table", piece("index"))
    weights = [("Unsqueeze", piece("weights"), Const([1]))]
    weights.append(("Unsqueeze", piece("weights"), {"axes": [1]}))  # type: ignore[arg-type]
    terms = [("Mul", gather, weights), gather]
    reduced = {
        op: [(op, terms, Const([0]), {"keepdims": 0}), (op, terms, {"axes": [0], "keepdims": 0})]
        for op in ("ReduceSum", "ReduceMean")
    }
    count = ("Cast", ("Max", ("Sub", end, begin), Const([1])), {"to": TensorProto.FLOAT})
    mean = [*reduced["ReduceMean"], ("Div", reduced["ReduceSum"], count)]
    row, known = graph.output[1].name, {"i": graph.input[0].name}
    mode, found = "sum", matcher.match(reduced["ReduceSum"], row, known)
    if found is None:
        mode, found = "mean", matcher.match(mean, row, known)
    if found is None or not _is_length(matcher, loop.input[0], found["ends"]):
        return None
    bounds = _boundaries(matcher, found["begins"], found["ends"], found["index"])
    if bounds is None:
        return None
    weight = found.get("weights", "")
    return _make(
        matcher, Bag(loop.output[0], loop, found["table"], found["index"], mode, *bounds, weight)
    )


def _sequence(matcher: Matcher, loop: NodeProto, concat: NodeProto) -> Bag | None:
    """A Loop that appends a row per bag to a sequence, as the new exporter writes it."""
    counted = _counter(matcher, loop, "SequenceInsert")
    if counted is None:
        return None
    i, result, first, insert = counted
    if not is_op(matcher.node(first), "SequenceEmpty") or concat.input[0] != result:
        return None
    again = ("Less", ("Add", "i", Const([1])), "num")
    known = matcher.match(again, body(loop).output[0].name, {"i": i})
    if known is None or loop.input[0]:
        return None
    known = matcher.match([("Less", Const([0]), "num"), Const([1])], loop.input[1], known)
    found_row = None if known is None else _any_row(matcher, insert.input[1], known)
    if found_row is None:
        return None
    mode, found = found_row
    terms = _terms(matcher, found["terms"])
    if terms is None:
        return None
    layout, second = _split_offsets(matcher, found["offsets"], terms["index"])
    size = ("Size", "second")
    bags = matcher.editor.shape(second)
    static = [Const([d - (layout != "offsets")]) for d in bags or () if isinstance(d, int)]
    number = size if layout == "offsets" else ("Sub", size, Const([1]))
    if matcher.match([number, *static], found["num"], {"second": second}) is None:
        return None
    if "length" in found:
        if not _is_length(matcher, found["length"], flat(matcher, terms["index"])):
            return None
    bag = Bag(concat.output[0], concat, terms["table"], terms["index"], mode, layout, second)
    bag.weights = terms.get("weights", "")
    bag.nodes = [loop]
    cast = matcher.editor.only_user(bag.output)
    if is_op(cast, "Cast") and cast is not None and attribute(cast, "to") == TensorProto.FLOAT:
        bag.output, bag.node, bag.nodes = cast.output[0], cast, [loop, concat]
    if "padding" in found:
        padding = matcher.constant(found["padding"])
        if padding is None or padding.size != 1:
            return None
        bag.padding = int(padding.item())
    return _make(matcher, bag)


def _counter(matcher: Matcher, loop: NodeProto, op: str) -> tuple[str, str, str, NodeProto] | None:
    """Of a Loop that carries a counter and one value that `op` extends: the counter inside, the
    value's result and start, and the node of `op`; the counter starts at 0."""
    graph = body(loop)
    if len(graph.input) != 4 or len(loop.input) != 4 or len(graph.output) != 3:
        return None
    for k in (0, 1):
        node = matcher.node(graph.output[1 + k].name)
        if is_op(node, op) and node is not None and node.input[0] == graph.input[2 + k].name:
            other = 1 - k
            i = graph.input[2 + other].name
            step = matcher.match(("Add", "i", Const([1])), graph.output[1 + other].name, {"i": i})
            if step is None or matcher.match(Const([0]), loop.input[2 + other]) is None:
                return None
            if operand(node, 2):
                return None
            return i, loop.output[k], loop.input[2 + k], node
    return None


_AT: Any = ("Reshape", "i", Const([-1]))
_NEXT: Any = ("Add", _AT, Const([1]))
_START: Any = ("Slice", "offsets", _AT, _NEXT)
_END: Any = ("Slice", "offsets", _NEXT, ("Add", _AT, Const([2])))
_ROWS: Any = ("Slice", "terms", _START, _END)
_SUM: Any = ("ReduceSum", _ROWS, Const([0]))
_COUNT: Any = ("Sub", "length", _START)


def _row(mode: str) -> Any:
    """One bag of the new exporter; of means, the last bag is divided by hand."""
    value: Any = _SUM
    if mode == "mean":
        last = ("Equal", "i", ("Sub", "num", Const([1])))
        quotient = ("Div", _SUM, ("Cast", _COUNT, {"to": TensorProto.FLOAT}))
        divided = ("If", ("Greater", _COUNT, Const([0])), quotient, _SUM)
        value = ("If", last, divided, ("ReduceMean", _ROWS, Const([0])))
    return ("If", ("Equal", _START, _END), zeros, value)


def _any_row(
    matcher: Matcher, row: str, known: dict[str, str]
) -> tuple[str, dict[str, str]] | None:
    """Mode and parts of one bag, as either of the new exporter's forms has it."""
    for mode in ("sum", "mean"):
        found = matcher.match(_row(mode), row, known)
        if found is not None:
            return mode, found
    return _padded(matcher, row, known)


def _padded(matcher: Matcher, row: str, known: dict[str, str]) -> tuple[str, dict[str, str]] | None:
    """One bag of which an inner loop picks the terms that are not padding."""
    for mode, op in (("sum", "ReduceSum"), ("mean", "ReduceMean")):
        value = (op, ("Gather", "terms", "picked"), Const([0]))
        empty = ("Equal", ("Size", "picked"), Const([0]))
        found = matcher.match(("If", empty, zeros, value), row, known)
        found = None if found is None else _picked(matcher, found)
        if found is not None:
            return mode, found
    return None


def _picked(matcher: Matcher, found: dict[str, str]) -> dict[str, str] | None:
    loop = matcher.node(found["picked"])
    if loop is None or not is_op(loop, "Loop") or len(loop.input) != 4 or loop.input[0]:
        return None
    graph = body(loop)
    place = list(loop.output).index(found["picked"])
    if len(graph.output) != 3:
        return None
    j, picked = graph.input[3 - place].name, graph.input[2 + place].name
    empty = matcher.constant(matcher.source(loop.input[2 + place]))
    if empty is None or empty.size:
        return None
    start, end = ("Gather", "offsets", "i"), ("Gather", "offsets", ("Add", "i", Const([1])))
    index = ("Gather", "all", "j")
    wrapped = ("If", ("Less", index, Const([0])), ("Add", index, "rows"), index)
    keep = ("Concat", "before", ("Reshape", "j", Const([-1])))
    extended = ("If", ("Not", ("Equal", wrapped, "padding")), keep, "before")
    state: dict[str, str] | None = {**found, "j": j, "before": picked}
    for pattern, name in (
        (start, loop.input[3 - place]),
        (("Less", start, end), loop.input[1]),
        (("Less", ("Add", "j", Const([1])), end), graph.output[0].name),
        (("Add", "j", Const([1])), graph.output[2 - place].name),
        (extended, graph.output[1 + place].name),
    ):
        state = None if state is None else matcher.match(pattern, name, state)
    if state is None:
        return None
    terms = _terms(matcher, state["terms"])
    same = terms is not None and flat(matcher, terms["index"]) == flat(matcher, state["all"])
    return state if same else None


def _terms(matcher: Matcher, name: str) -> dict[str, str] | None:
    """Table, index and weights of rows that are gathered, then weighted."""
    gather = ("Gather", "table", "index")
    column = ("Mul", gather, ("Unsqueeze", "weights", Const([1])))
    found: dict[str, str] | None = matcher.match([column, ("Mul", gather, "weights"), gather], name)
    if found and "weights" in found and _ones(matcher, found["weights"]):
        del found["weights"]
    if found and "weights" in found:
        sizes = [static_size(matcher.editor.shape(found[key])) for key in ("weights", "index")]
        shape = matcher.editor.shape(found["weights"]) or ()
        if sizes[0] != sizes[1] or (None in sizes and len(shape) != 1):
            return None
    return found


def _ones(matcher: Matcher, name: str) -> bool:
    value = matcher.constant(name)
    if value is not None:
        return bool(np.all(value == 1))
    return matcher.match(("Expand", Const([1]), ANY), name) is not None
