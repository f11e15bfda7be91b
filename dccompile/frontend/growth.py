"""Bounds on what shape inference would build, taken before it runs.

onnx's inference keeps every dim of every tensor, and with data propagation every entry of every
shape vector. ``Gather(x, x)`` doubles the rank and ``Concat(s, s)`` the vector: thirty such
nodes take all memory (measured: 4 GiB and 30 s, then std::bad_alloc). Both are bounded here by
one walk over the nodes; real models stay far below the limits.
"""

from __future__ import annotations

import math

import onnx

from dccompile.errors import Problem

from .external import MAX_RANK
from .structure import nodes_of, subgraphs, where

MAX_INFERRED_RANK = 1024
_MAX_DIMS = 2_000_000  # of all tensors together, beyond MAX_RANK for each
_MAX_SHAPE_DATA = 1 << 20  # entries of all propagated shape vectors together
_PROPAGATE = frozenset(
    "Add Cast Concat Constant Div Gather Identity Mul Shape Slice Squeeze Sub Unsqueeze".split()
)


def check_ranks(model: onnx.ModelProto) -> list[Problem]:
    """Refuses graphs whose tensors would have thousands of dims."""
    ranks = {t.name: len(t.dims) for t in model.graph.initializer}
    ranks.update((v.name, len(v.type.tensor_type.shape.dim)) for v in model.graph.input)
    lengths = {t.name: math.prod(t.dims) for t in model.graph.initializer}
    total = 0
    for node, _ in nodes_of(model):
        rank = max(0, _rank(node, ranks, lengths))
        ranks.update((name, rank) for name in node.output)
        total += max(0, rank - MAX_RANK) * len(node.output)
        if rank > MAX_INFERRED_RANK or total > _MAX_DIMS:
            found = f"its output may have {rank} dims; at most {MAX_RANK} are allowed"
            fix = "the model is damaged or hostile: no real one needs such ranks"
            return [Problem("DC3017", where(node), found, fix)]
    return []


def _rank(node: onnx.NodeProto, ranks: dict[str, int], lengths: dict[str, int]) -> int:
    """An upper bound for the rank of a node's outputs."""
    inputs = [ranks.get(name, 0) for name in node.input]
    first = inputs[0] if inputs else 0
    second = inputs[1] if len(inputs) > 1 else 0
    kind = node.op_type
    if kind == "Gather":
        return first + second - 1
    if kind == "GatherND":
        return first + second
    if kind in ("Unsqueeze", "Squeeze"):
        axes = lengths.get(node.input[1], 1) if len(node.input) > 1 else 0
        axes += sum(len(a.ints) for a in node.attribute if a.name == "axes")
        return first + axes if kind == "Unsqueeze" else first - axes
    if kind in ("ConstantOfShape", "Reshape", "Expand"):
        shape = node.input[0 if kind == "ConstantOfShape" else 1 : 2]
        return max(first if kind == "Expand" else 0, *(lengths.get(n, MAX_RANK) for n in shape), 0)
    if kind in ("OneHot", "ConcatFromSequence"):
        return first + 1
    if kind == "Einsum":
        equation = b"".join(a.s for a in node.attribute if a.name == "equation")
        letters = len(set(equation.rpartition(b"->")[2]) - set(b". "))
        return letters + (max(inputs, default=0) if b"..." in equation else 0)
    bodies = [
        ranks.get(value.name, len(value.type.tensor_type.shape.dim))
        for _, graph in subgraphs(node)
        for value in graph.output
    ]
    return max([*inputs, *(rank + 1 for rank in bodies)], default=0)


def propagates(model: onnx.ModelProto) -> bool:
    """Whether data propagation stays small, judged by the inferred types of `model`.

    Vectors of unknown values are propagated too, entry by entry.
    """
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    shapes = {v.name: v.type.tensor_type.shape.dim for v in values}
    lengths = {name: dims[0].dim_value for name, dims in shapes.items() if len(dims) == 1}
    lengths.update((t.name, t.dims[0]) for t in model.graph.initializer if len(t.dims) == 1)
    total = 0
    for node, _ in nodes_of(model):
        if node.op_type not in _PROPAGATE:
            continue
        sizes = [lengths.get(name, 1) for name in node.input]
        if any(len(shapes.get(name, ())) > 1 for name in node.output):
            size = 0  # only vectors and scalars are propagated
        elif node.op_type == "Shape":
            size = MAX_RANK
        elif node.op_type == "Concat":
            size = sum(sizes)
        else:
            size = max(sizes, default=0)
        for name in node.output:
            lengths[name] = max(size, lengths.get(name, 0))
        total += max(size, 0)
        if total > _MAX_SHAPE_DATA:
            return False
    return True
