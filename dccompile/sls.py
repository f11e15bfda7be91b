"""SparseLengthsSum and its kin as operators of an ONNX model: domain "dccompile", version 1.

======================================================== =====================================
operator                                                 output (bags, dim), f32
======================================================== =====================================
SparseLengthsSum(data, indices, lengths)                 sum of the rows of each bag
SparseLengthsMean(data, indices, lengths)                their mean, 0 for an empty bag
SparseLengthsWeightedSum(data, weights, indices, lengths) sum of weights[i] * data[indices[i]]
======================================================== =====================================

data (rows, dim) f32; indices (terms,) and lengths (bags,) int32 or int64, of one type; weights
(terms,) f32. Bag b has the lengths[b] terms after those of the bags before it; an index lies in
0 .. rows - 1. Each operator is an ONNX function: a model that carries the functions it calls runs
in ONNX Runtime too, if slowly; dccompile recognises the function's body, not its name::

    model = onnx.helper.make_model(graph, functions=dccompile.sls.functions(), opset_imports=[
        onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("dccompile", 1)])

What an exporter knows by another name, e.g. a torch.library operator, maps to these nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "dccompile"
OPERATORS = ("SparseLengthsSum", "SparseLengthsMean", "SparseLengthsWeightedSum")

_BODY = """
<domain: "dccompile", opset_import: ["" : 17]>
{name} (data, {weights}indices, lengths) => (output) {{
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    axis = Constant <value = int64[1] {{0}}> ()
    outside = Constant <value = int64 {{2147483647}}> ()
    on = Constant <value = bool {{1}}> ()
    none = CastLike (zero, indices)
    along = CastLike (axis, lengths)
    wrong = CastLike (outside, indices)
    negative = Less (indices, none)
    checked = Where (negative, wrong, indices)
    ends = CumSum (lengths, zero)
    begins = Sub (ends, lengths)
    bags = Size (ends)
    output = Loop (bags, on) <body = bag (int64 i, bool more) => (bool again, float[d] pooled) {{
        again = Identity (more)
        first = Gather (begins, i)
        last = Gather (ends, i)
        begin = Unsqueeze (first, axis)
        end = Unsqueeze (last, axis)
        here = Slice (checked, begin, end, along)
        rows = Gather (data, here)
        {pool}
    }}>
}}
"""
_SUM = "pooled = ReduceSum <keepdims = 0> (rows, axis)"
_MEAN = """sum = ReduceSum <keepdims = 0> (rows, axis)
        terms = Sub (end, begin)
        least = CastLike (one, terms)
        count = Max (terms, least)
        divisor = Cast <to = 1> (count)
        pooled = Div (sum, divisor)"""
_WEIGHTED = """column = Constant <value = int64[1] {1}> ()
        some = Slice (weights, begin, end, along)
        factors = Unsqueeze (some, column)
        scaled = Mul (rows, factors)
        pooled = ReduceSum <keepdims = 0> (scaled, axis)"""


def functions(*names: str) -> list[onnx.FunctionProto]:
    """The named operators as functions for a model; all of them if none is named."""
    import onnx.parser

    pool = dict(zip(OPERATORS, (_SUM, _MEAN, _WEIGHTED), strict=True))
    made = []
    for name in names or OPERATORS:
        weights = "weights, " if name == "SparseLengthsWeightedSum" else ""
        text = _BODY.format(name=name, weights=weights, pool=pool[name])
        made.append(onnx.parser.parse_function(text))
    return made
