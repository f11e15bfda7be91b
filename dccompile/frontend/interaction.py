"""Finds the dot products of all pairs of a sample's vectors and makes each one node.

The vectors X (bags, vectors, dim) are a dense one and those of the tables; X times its transpose
is taken apart, in one of many ways, into a triangle of products behind a copy of the dense vector.
A DccInteraction (domain "dccompile", attribute "site") computes the workload.Interaction of that
site: inputs dense (bags, dim) and rows (bags, vectors - 1, dim); output (bags, dim + pairs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from dccompile.workload import Interaction

from . import movement
from .editor import Editor, attribute, is_op
from .quantized import Refused

OP = "DccInteraction"
_LIMITS = 8, 128, 64 << 10  # least dim, most vectors, most bytes of a sample: see the kernels


@dataclass(frozen=True)
class InteractionSite:
    """One recovered interaction."""

    name: str
    workload: Interaction
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    precision: str = "float32"


@dataclass
class Found:
    """Sites by name, and reasons by node."""

    sites: dict[str, InteractionSite] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def recover_interactions(editor: Editor) -> Found:
    """Rewrites the graph."""
    found = Found()
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        pair = is_op(node, "Concat") and len(node.input) == 2
        if not pair or attribute(node, "axis") not in (1, -1):
            continue
        triangle = movement.chain(editor, node.input[1])
        if triangle is None or len(triangle.sources) != 1:
            continue
        product = editor.producer(triangle.sources[0], "MatMul")
        if product is None or not _is_square(editor, product):
            continue
        try:
            site, nodes = _recover(editor, node, product, triangle)
        except Refused as refused:
            found.reasons[product.name] = str(refused)
            continue
        found.sites[site.name] = site
        changes[node.name] = nodes
    editor.rewrite(changes)
    return found


def _is_square(editor: Editor, node: NodeProto) -> bool:
    """Whether a MatMul multiplies a batch of matrices with their transposes."""
    turned = editor.producer(node.input[1], "Transpose")
    if turned is None or turned.input[0] != node.input[0]:
        return False
    shape = editor.shape(node.input[0]) or ()
    return len(shape) == 3 and list(attribute(turned, "perm", [])) == [0, 2, 1]


def _recover(
    editor: Editor, concat: NodeProto, product: NodeProto, triangle: movement.Chain
) -> tuple[InteractionSite, list[NodeProto]]:
    x, dense = product.input[0], concat.input[0]
    shape = editor.shape(dense) or ()
    stack = movement.chain(editor, x)
    if len(shape) != 2 or stack is None or editor.dtype(x) != TensorProto.FLOAT:
        raise Refused("the vectors are not float32 rows behind a first one")
    bags = shape[0] if isinstance(shape[0], int) else None
    vectors, rows = _vectors(editor, stack, dense, bags)
    dim = shape[1]
    least, most, room = _LIMITS
    if not isinstance(dim, int) or dim < least or vectors > most or dim * (vectors + 32) * 4 > room:
        raise Refused(f"{vectors} vectors of {dim} have no hand-written kernel")
    order, diagonal = _order(editor, triangle, bags, vectors)
    nodes: list[NodeProto] = []
    if not rows:
        bounds = [np.array([v]) for v in (1, vectors, 1)]
        names = [editor.add_constant(b, f"{product.name}_rows") for b in bounds]
        nodes.append(editor.node("Slice", [x, *names], product))
        rows = nodes[0].output[0]
        editor.set_type(rows, TensorProto.FLOAT, (shape[0], vectors - 1, dim))
    output, name = concat.output[0], product.name
    node = editor.node(OP, [dense, rows], concat, output, domain="dccompile", site=name)
    turned = editor.producer(product.input[1])
    assert turned is not None
    covered = [concat, product, turned, *triangle.nodes, *stack.nodes]
    origins = tuple(dict.fromkeys(o for n in covered for o in editor.origin[n.name]))
    editor.origin[node.name] = origins
    work = Interaction(vectors, dim, bags, order, diagonal)
    return InteractionSite(name, work, origins, (dense, rows), output), [*nodes, node]


def _order(
    editor: Editor, triangle: movement.Chain, bags: int | None, vectors: int
) -> tuple[str, bool]:
    """The pairs of vectors whose products are taken, as an Interaction names them."""
    taken: np.ndarray | None = None
    for batch in (2, 3) if bags is None else (bags,):
        shape = (batch, vectors, vectors)
        if prod(shape) > movement.LIMIT:
            raise Refused("the products are too many to be followed")
        numbers = np.arange(prod(shape)).reshape(shape)
        moved = movement.run(editor, triangle, {triangle.sources[0]: numbers}, batch)
        if moved is None or moved[0].ndim != 2 or len(moved[0]) != batch:
            raise Refused("what becomes of the products cannot be followed")
        pairs = moved[0] - np.arange(batch)[:, None] * vectors * vectors
        if (pairs != pairs[0]).any() or (taken is not None and not np.array_equal(taken, pairs[0])):
            raise Refused("the products are mixed across samples")
        taken = pairs[0]
    for order in ("lower", "upper"):
        for diagonal in (False, True):
            work = Interaction(vectors, 1, None, order, diagonal)
            wanted = [i * vectors + j for i in range(vectors) for j in work.row(i)]
            if taken is not None and wanted == taken.tolist():
                return order, diagonal
    raise Refused("the products taken are not a triangle in its order")


def _vectors(
    editor: Editor, stack: movement.Chain, dense: str, bags: int | None
) -> tuple[int, str]:
    """How many vectors are stacked, and the value whose rows follow `dense` ("": no such one).

    Raises Refused where `dense` is not the first vector.
    """
    batch = 2 if bags is None else bags
    feeds: dict[str, np.ndarray] = {}
    begin = 0
    for name in stack.sources:
        dims = [d if isinstance(d, int) else batch for d in editor.shape(name) or ()]
        size = prod(dims)
        if begin + size > movement.LIMIT:
            raise Refused("the stack is too large to be followed")
        feeds[name] = np.arange(begin, begin + size).reshape(dims)
        begin += size
    made = {name for node in stack.nodes for name in node.output}
    known = dense in feeds or dense in made
    moved = movement.run(editor, stack, feeds, batch, dense) if known else None
    if moved is None:
        raise Refused("the vector in front is not in the stack")
    x, first = moved
    if x.ndim != 3 or len(x) != batch or not np.array_equal(x[:, 0], first):
        raise Refused("the vector in front is not the first one of the stack")
    same = [n for n, v in feeds.items() if np.array_equal(v, x[:, 1:])]
    return x.shape[1], same[0] if same else ""
